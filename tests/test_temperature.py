"""The temperature makes probabilities agree with the fraction of correct answers, and changes no predicted class."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from pipeline.core.errors import UserError
from pipeline.models.build import build
from pipeline.models.files import load_config, load_model, save_config, save_weights
from pipeline.models.inference import class_probabilities, probabilities_of
from pipeline.training.temperature import fit_temperature
from tests.conftest import colored_images
from tests.test_model import config


def drawn(temperature: float, *, number: int = 20_000, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Return random logits (number, classes), and labels that are drawn with the probabilities at a temperature."""
    generator = np.random.default_rng(0)
    logits = (3 * generator.normal(size=(number, classes))).astype(np.float32)
    probabilities = probabilities_of(torch.from_numpy(logits), temperature=temperature)
    labels = (probabilities.cumsum(1) > generator.random((number, 1))).argmax(1)
    return logits, labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_with_which_labels_were_drawn_is_found(temperature: float) -> None:
    assert fit_temperature(*drawn(temperature)) == pytest.approx(temperature, rel=0.03)


def test_no_other_temperature_is_more_probable() -> None:
    logits, labels = drawn(2.0, number=500)

    def loss(temperature: float) -> float:
        scaled = logits.astype(np.float64) / temperature
        prior = np.log(temperature) ** 2 / (2 * 0.5**2)
        return float((logsumexp(scaled, axis=1) - scaled[np.arange(500), labels]).sum() + prior)

    found = fit_temperature(logits, labels)
    assert loss(found) < min(loss(found * 0.99), loss(found * 1.01))
    assert found == float(f"{found:.4g}")


def test_the_number_of_images_in_memory_at_a_time_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = drawn(2.0, number=500)
    expected = fit_temperature(logits, labels)
    monkeypatch.setattr("pipeline.training.temperature.ROWS_PER_BLOCK", 7)
    assert fit_temperature(logits, labels) == expected


@pytest.mark.parametrize("number", [20, 138])
def test_a_network_without_an_error_on_few_images_does_not_become_certain(number: int) -> None:
    logits = drawn(1.0, number=number)[0]
    temperature = fit_temperature(logits, logits.argmax(1))
    probabilities = probabilities_of(torch.from_numpy(logits), temperature=temperature)
    assert 0.05 < temperature < 1
    assert probabilities.max(1).mean() < 1 - 1 / (10 * number)


def test_a_network_trained_with_mse_gets_a_low_temperature() -> None:
    labels = np.arange(200) % 10
    temperature = fit_temperature(np.eye(10, dtype=np.float32)[labels], labels)
    assert probabilities_of(torch.eye(10), temperature=temperature).max() > 0.97
    assert probabilities_of(torch.eye(10), temperature=None).max() < 0.24


@pytest.mark.parametrize(
    ("logits", "labels", "expected"),
    [
        ([[1e30, 0.0], [0.0, 1e30]], [0, 1], 1.0),  # all correct at every temperature
        ([[1e30, 0.0], [0.0, 1e30]], [0, 0], 20.0),
        ([[1e-4, 0.0]] * 40_000, [0] * 40_000, 0.05),
        ([[0.0, 0.0]], [0], 1.0),
    ],
)
def test_the_temperature_is_bounded(logits: list[list[float]], labels: list[int], expected: float) -> None:
    assert fit_temperature(np.array(logits, np.float32), np.array(labels)) == pytest.approx(expected, rel=1e-3)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    chosen = config(temperature=3.0)
    save_config(chosen, tmp_path)
    save_weights(build(chosen), tmp_path / "best.safetensors")
    return tmp_path


def test_probabilities_are_calibrated_and_keep_their_order(model: Path) -> None:
    classifier, chosen = load_model(model)
    images = colored_images(20, size=chosen.image_size, channels=chosen.channels)[0]
    calibrated = class_probabilities(classifier, images, config=chosen)
    raw = class_probabilities(classifier, images, config=chosen.model_copy(update={"temperature": None}))
    assert (calibrated.max(1) < raw.max(1)).all()
    assert np.array_equal(calibrated.argsort(1), raw.argsort(1))
    np.testing.assert_allclose(calibrated.sum(1), 1)


@pytest.mark.parametrize("found", ["0", "-1", "1000", "NaN", '"hot"'])
def test_a_temperature_that_is_not_allowed_is_reported(model: Path, found: str) -> None:
    path = model / "model.json"
    path.write_text(path.read_text().replace('"temperature": 3.0', f'"temperature": {found}'))
    with pytest.raises(UserError, match=r"model\.json: damaged"):
        load_config(model)
