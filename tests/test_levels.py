"""The benchmark of the comparisons' levels reads a folder of models, and its fractions are those of known cases."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import levels
from benchmarks.levels import draw_groups, exact_level, jackknife_error, read_population
from pipeline.core.errors import UserError

IMAGES, MODELS = 400, 8


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of equally good models of one recipe, and one model of another recipe."""
    folder, random = tmp_path_factory.mktemp("models"), np.random.default_rng(0)
    actual = random.integers(0, 3, IMAGES)
    for seed, recipe in [*((seed, "a-b") for seed in range(MODELS)), (0, "c")]:
        predicted = np.where(random.random(IMAGES) < 0.8, actual, (actual + 1) % 3)
        np.savez(folder / f"{recipe}-{seed}.npz", test_probabilities=np.eye(3, dtype=np.float16)[predicted])
    names = np.array(["x", "y", "z"])
    np.savez(folder / "labels.npz", test_labels=actual.astype(np.uint8), class_names=names)
    return folder


def test_the_models_of_a_folder_are_found_by_recipe(folder: Path) -> None:
    population = read_population(folder)
    assert {name: found.shape for name, found in population.correct.items()} == {"a-b": (8, IMAGES), "c": (1, IMAGES)}
    assert population.correct["a-b"].mean() == pytest.approx(0.8, abs=0.03)


def test_a_folder_without_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found no labels\.npz and 0 recipes; allowed: a folder with labels\.npz"):
        read_population(tmp_path)


def test_the_benchmark_prints_its_tables(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(levels, "POWER_GROUPS", 5)
    monkeypatch.setattr(sys, "argv", ["levels", "--models", str(folder), "--draws", "200", "--groups", "10"])
    levels.main()
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith(("| a-b", "| c"))]
    # 2 pairs of models with 400 and 300 images, the pairs of seeds, groups of 2 and 3 seeds, and their power
    assert [row.split(" | ")[0] for row in rows] == ["| a-b, 2 seeds"] * 2 + ["| a-b, c"] * 2 + ["| a-b"] * 5
    assert "| a-b | 8 | " in printed
    assert " | 28 | " in printed
    assert len(re.findall(r"\d+\.\d% ± \d+\.\d%", printed)) == 6


def test_the_exact_level_is_that_of_the_binomial_distribution() -> None:
    # of 8 discordant images, only 0 or 8 for one model have a p-value of at most 0.05
    assert exact_level(8, images=100) == pytest.approx(2 / 2**8)


def test_the_jackknifes_error_is_that_of_independent_draws_where_the_models_do_not_matter() -> None:
    groups = draw_groups(60, seeds=2, draws=4000)
    assert all(len(set(each)) == 4 for each in groups.tolist())
    by_chance = np.random.default_rng(1).random(4000) < 0.05
    assert jackknife_error(by_chance, groups, models=60) == pytest.approx((0.05 * 0.95 / 4000) ** 0.5, abs=0.003)


def test_the_jackknifes_error_is_that_of_the_models_where_one_model_decides() -> None:
    """A draw is shown if its first model is of one half: the fraction has the error of the mean of 60 models."""
    groups = draw_groups(60, seeds=1, draws=4000)
    shown = groups[:, 0] < 30
    assert jackknife_error(shown, groups, models=60) == pytest.approx((0.25 / 60) ** 0.5, rel=0.25)
