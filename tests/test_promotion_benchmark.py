"""The simulated models are as good as stated, and the tables are made of decisions about them."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import promotion
from benchmarks.simulated_models import ACCURACY, BetaSplit, discordance_of_equals, read_populations
from pipeline.core.errors import UserError
from pipeline.evaluation.calibration import expected_calibration_error
from tests.conftest import params

POLICY = params().promote


def write_population(folder: Path, *, models: int = 3, images: int = 400) -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, images)
    for seed in range(models):
        probabilities = generator.dirichlet(np.ones(4), images) + 0.6 * np.eye(4)[labels]
        probabilities = (probabilities / probabilities.sum(1, keepdims=True)).astype(np.float16)
        np.savez(folder / f"lenet-{seed}.npz", test_probabilities=probabilities, validation_probabilities=probabilities)
    np.savez(folder / "labels.npz", test_labels=labels, validation_labels=labels, class_names=list("abcd"))


@pytest.mark.parametrize("discordance", promotion.DISCORDANCES)
def test_simulated_models_have_the_stated_accuracy_gain_and_discordance(discordance: float) -> None:
    generator = np.random.default_rng(0)
    equal = discordance_of_equals(discordance, gain=0.02)
    split = BetaSplit.make(200_000, discordance=equal, generator=generator)
    champion, better = split.draw(generator), split.better(0.02).draw(generator)
    gain = better.is_correct.mean() - champion.is_correct.mean()
    assert champion.is_correct.mean() == pytest.approx(ACCURACY, abs=0.005)
    assert gain == pytest.approx(0.02, abs=0.003)
    assert (better.is_correct != champion.is_correct).mean() == pytest.approx(discordance, abs=0.004)
    confidences = better.confidences(better.probabilities)
    assert expected_calibration_error(confidences, better.is_correct) < 0.03
    assert np.allclose(better.probabilities.sum(1), 1, atol=1e-5)


def test_an_unlucky_champion_is_right_more_often_than_a_median_one_on_the_same_images() -> None:
    generator = np.random.default_rng(0)
    split = BetaSplit.make(10_000, discordance=0.15, generator=generator)
    median, unlucky = (split.draw_ranked(percentile, generator).is_correct.mean() for percentile in (50, 95))
    assert unlucky - median == pytest.approx(1.645 * np.sqrt(0.075 / 10_000), rel=0.4)


def test_real_models_of_a_population_are_drawn_image_by_image(tmp_path: Path) -> None:
    write_population(tmp_path)
    [population] = read_populations(tmp_path)
    test, validation = population.draw_splits(np.random.default_rng(0))
    drawn = test.draw(np.random.default_rng(1))
    assert (population.recipe, len(drawn), len(validation.rows)) == ("lenet", 400, 400)
    assert np.array_equal(drawn.predicted, drawn.probabilities.argmax(1))
    assert np.array_equal(drawn.actual, population.test.labels[test.rows])
    of_population = population.test.probabilities[:, test.rows]
    assert all((drawn.probabilities[row] == of_population[:, row]).all(1).any() for row in range(400))


def test_a_folder_without_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--models: found no recipe with two or more models"):
        read_populations(tmp_path)
    write_population(tmp_path)
    np.savez(tmp_path / "lenet-1.npz", accuracy=0.7)
    with pytest.raises(UserError, match=r"lenet-1\.npz: found accuracy; allowed: an array test_probabilities"):
        read_populations(tmp_path)


def test_a_year_counts_its_looks_and_promotions_and_a_lenient_policy_promotes_falsely(tmp_path: Path) -> None:
    write_population(tmp_path)
    [population] = read_populations(tmp_path)
    lenient = POLICY.model_copy(update={"validation_level": 0.5, "false_promotion_budget": 0.5, "max_looks": 1})
    loose = lenient.model_copy(update={"max_class_recall_loss": 1.0, "max_calibration_error": None})
    years = [promotion.simulate_year(s, population=population, policy=loose, nights=20) for s in range(8)]
    assert sum(year.promotions for year in years) > 0
    assert all(year.looks == int(year.is_spent) for year in years)
    badly = loose.model_copy(update={"max_calibration_error": 0.01})
    assert not any(
        promotion.simulate_year(s, population=population, policy=badly, nights=20).promotions for s in range(8)
    )


def test_the_upper_bound_is_that_of_clopper_and_pearson() -> None:
    """With no event in n, it is 1 - 0.05 ** (1 / n)."""
    assert promotion.upper_bound(0, 1000) == pytest.approx(1 - 0.05 ** (1 / 1000))
    assert promotion.upper_bound(5, 5) == 1.0


def test_the_tables_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_population(tmp_path)
    for name, value in {"TEST_IMAGES": 2000, "VALIDATION_IMAGES": (1000,), "NIGHTS_BEFORE_LATE": 3}.items():
        monkeypatch.setattr(promotion, name, value)
    monkeypatch.setattr("sys.argv", ["promotion", "--models", str(tmp_path), "--years=3", "--nights=4", "--trials=2"])
    promotion.main()
    output = capsys.readouterr().out
    assert "| 3 of lenet |" in output
    assert output.count("| 1,000 | unlucky |") == 2
    assert "max_looks 100" in output
