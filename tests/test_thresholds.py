"""A threshold reports at least the stated fraction of the validation images, and few more."""

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.core.errors import UserError
from pipeline.models.build import build
from pipeline.models.files import load_config, save_config, save_weights
from pipeline.prediction.model import LoadedModel, answer_of, find_threshold, load
from pipeline.tracking.model_files import find_model_files
from pipeline.training.thresholds import COVERAGES, MIN_GAP, fit_thresholds
from tests.test_model import config


def two_classes(highest: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return probabilities (N, 2) with these highest ones."""
    values = np.asarray(highest, dtype=np.float64)
    return np.stack([1 - values, values], axis=1)


def num_reported(probabilities: npt.NDArray[np.float64], threshold: float) -> int:
    chosen = config(classes=probabilities.shape[1])
    answers = [answer_of(row, config=chosen, top=1, threshold=threshold) for row in probabilities]
    return sum(not each.is_unknown for each in answers)


@pytest.mark.parametrize("number", [1, 2, 3, 7, 10, 20, 99, 138, 200])
def test_exactly_the_stated_fraction_of_the_validation_images_is_reported(number: int) -> None:
    probabilities = np.random.default_rng(number).dirichlet([0.3] * 5, number)
    for coverage, threshold in fit_thresholds(probabilities).items():
        # in exact arithmetic: 0.7 * 10 is 7 images and not 8
        assert num_reported(probabilities, threshold) == math.ceil(Fraction(str(coverage)) * number)


def test_equal_probabilities_are_reported_together() -> None:
    probabilities = two_classes([0.6, 0.8, 0.8, 0.8, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9])
    found = {each: num_reported(probabilities, threshold) for each, threshold in fit_thresholds(probabilities).items()}
    assert (found[0.5], found[0.6], found[0.7], found[0.9], found[0.95]) == (6, 6, 9, 9, 10)


@pytest.mark.parametrize("value", [0.5, 0.9, 1.0])
def test_every_image_is_reported_if_all_are_equally_certain(value: float) -> None:
    assert set(fit_thresholds(two_classes([value] * 50)).values()) == {0.0}


def test_the_threshold_of_a_single_image_is_0() -> None:
    assert fit_thresholds(two_classes([0.7])) == dict.fromkeys(COVERAGES, 0.0)


@pytest.mark.parametrize("scale", [1e-2, 1e-5, 1e-9, 1e-15])
def test_no_reported_image_is_lost_by_rounding(scale: float) -> None:
    probabilities = two_classes(1 - scale * np.random.default_rng(0).random(200))
    for coverage, threshold in fit_thresholds(probabilities).items():
        assert num_reported(probabilities.astype(np.float32).astype(np.float64), threshold) >= coverage * 200


def test_images_that_differ_by_rounding_are_reported_together() -> None:
    """Two equal images in different batches, of which one is the last that is needed for the coverage."""
    probabilities = two_classes([0.6, 0.8, 0.8 + 1e-9, 0.9])
    threshold = fit_thresholds(probabilities)[0.5]
    assert threshold == pytest.approx(0.7)
    assert num_reported(probabilities - 2e-9, threshold) == 3


def test_many_close_probabilities_do_not_merge() -> None:
    probabilities = two_classes(np.linspace(0.9, 0.9001, 100_001))
    assert MIN_GAP > 1e-9  # the distance of two of them
    for coverage, threshold in fit_thresholds(probabilities).items():
        assert coverage <= (probabilities[:, 1] >= threshold).mean() < coverage + 0.1


def test_thresholds_fall_as_the_coverage_rises() -> None:
    thresholds = list(fit_thresholds(np.random.default_rng(0).dirichlet([0.3] * 5, 300)).values())
    assert thresholds == sorted(thresholds, reverse=True)


def model_in(folder: Path, **changes: Any) -> LoadedModel:
    chosen = config(**changes)
    save_config(chosen, folder)
    save_weights(build(chosen), folder / "best.safetensors")
    return load(find_model_files(str(folder)))


def test_thresholds_are_stored_with_the_model(tmp_path: Path) -> None:
    thresholds = fit_thresholds(np.random.default_rng(0).dirichlet([0.3] * 10, 300))
    assert model_in(tmp_path, thresholds=thresholds).config.thresholds == thresholds


def test_a_model_of_an_earlier_version_has_a_clear_error(tmp_path: Path) -> None:
    model = model_in(tmp_path)
    values = json.loads((tmp_path / "model.json").read_text())
    del values["thresholds"]
    (tmp_path / "model.json").write_text(json.dumps(values))
    model = load(find_model_files(str(tmp_path)))
    assert find_threshold(model, None) is None
    with pytest.raises(UserError, match="has no thresholds, since an earlier version trained it; allowed: no coverage"):
        find_threshold(model, 0.95)


def test_a_coverage_without_a_threshold_is_refused_with_the_allowed_ones(tmp_path: Path) -> None:
    model = model_in(tmp_path, thresholds={0.5: 0.9, 0.95: 0.4})
    assert find_threshold(model, 0.95) == 0.4
    with pytest.raises(UserError, match=r"--coverage is 0.94; allowed: 0.5, 0.95"):
        find_threshold(model, 0.94)


@pytest.mark.parametrize("found", ['{"0.5": 2}', '{"1.5": 0.5}', '{"half": 0.5}', "0.5"])
def test_thresholds_that_are_not_allowed_are_reported(tmp_path: Path, found: str) -> None:
    model_in(tmp_path)
    path = tmp_path / "model.json"
    path.write_text(path.read_text().replace('"thresholds": null', f'"thresholds": {found}'))
    with pytest.raises(UserError, match=r"model\.json: damaged"):
        load_config(tmp_path)
