"""README and recipes have the figures of docs/results.json, which `make results` measures."""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.published import (
    PICTURE,
    README,
    TABLE,
    RecipeResult,
    SeedResult,
    in_prose,
    picture,
    publish,
    published_texts,
    read_results,
    report,
    with_head,
    with_rows,
)
from pipeline.artifacts import EVALUATE, read_json
from pipeline.core.git import output
from pipeline.core.yaml import read_yaml
from tests.conftest import PROJECT, copy_project

SEEDS = (SeedResult(0, 0.70, 0.69, 9.0, "a"), SeedResult(1, 0.72, 0.71, 8.0, "b"), SeedResult(2, 0.74, 0.73, 30.0, "c"))
RESULT = RecipeResult(SEEDS, test_images=10_000, test_duplicates=258, setting={"CPU": "a CPU", "kernels": "portable"})
TABLES = """| `digits` | 1 |
<!-- results -->
| recipe | test accuracy |
| --- | --- |
| `digits` | 1 |
| `other` | 2 |
<!-- end of results -->
| `digits` | 1 |
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a folder with copies of the files that contain figures."""
    for name in ("docs", "recipes"):
        shutil.copytree(PROJECT / name, tmp_path / name)
    shutil.copy(PROJECT / README, tmp_path)
    return tmp_path


def test_the_picture_is_of_docs_results() -> None:
    """`python -m benchmarks.published` draws it."""
    assert (PROJECT / PICTURE).read_bytes() == picture(read_results())


@pytest.mark.parametrize("path", sorted(str(path.relative_to(PROJECT)) for path in published_texts(read_results())))
def test_the_figures_in_a_file_are_those_of_docs_results(path: str) -> None:
    """If this fails, run `python -m benchmarks.published`, which writes the figures."""
    assert (PROJECT / path).read_text(encoding="utf-8") == published_texts(read_results())[PROJECT / path]


def test_the_figure_for_digits_is_of_the_committed_model() -> None:
    """If this fails after a change of the model, run `python -m benchmarks.results digits --write`."""
    if read_yaml(PROJECT / "params.yaml")["download"]["dataset"] != "digits":
        pytest.skip("params.yaml has another data set than the digits")
    assert read_results()["digits"].accuracies[0] == read_json(PROJECT / EVALUATE / "metrics.json")["accuracy"]


def test_the_rows_that_name_make_results_are_the_measured_recipes() -> None:
    [table] = TABLE.findall((PROJECT / README).read_text(encoding="utf-8"))
    rows = [line for line in table.splitlines() if line.endswith("| `make results` |")]
    assert {row.split("`")[1] for row in rows} == read_results().keys()
    assert all(len(result.seeds) >= results.SEEDS for result in read_results().values())


def test_a_figure_is_the_mean_and_the_sample_standard_deviation() -> None:
    assert in_prose(RESULT.accuracies) == "72.0 % ± 2.0"
    text = report({"digits": RESULT, "other": replace(RESULT, test_duplicates=0)})
    assert "72.00% ± 2.00% | 72.00% ± 2.00%" in text
    assert "without near-duplicates | 71.00% ± 2.00% | the same: there are none |" in text
    assert "training, median | 9.0 s" in text


def test_only_the_row_of_a_measured_recipe_changes() -> None:
    row = "| `digits` | 72.0 % ± 2.0 | 71.0 % ± 2.0 | 9 s | `make results` |"
    before, table, after = TABLES.partition("| --- | --- |\n| `digits` | 1 |")
    assert with_rows(TABLES, {"digits": RESULT}) == before + table.replace("| `digits` | 1 |", row) + after


def test_only_three_lines_of_a_recipe_change() -> None:
    text = "#\n# command    x\n# hardware   y\n# time       z\n# expect     1 %\ntrain:\n  epochs: 1 # time 3\n"
    lines = with_head(text, RESULT).splitlines()
    assert [line for line, old in zip(lines, text.splitlines(), strict=True) if line != old] == [
        "# hardware   a CPU",
        "# time       9 s for the step train (median of 3 seeds)",
        "# expect     72.0 % ± 2.0 test accuracy (mean and standard deviation of 3 seeds)",
    ]


def test_published_results_are_read_back_and_written_into_all_files(project: Path) -> None:
    publish({"cifar10_lenet": RESULT}, project)
    assert read_results(project) == {"cifar10_lenet": RESULT}
    assert "| `cifar10_lenet` | 72.0 % ± 2.0 |" in (project / README).read_text(encoding="utf-8")
    assert "72.0 % ± 2.0" in (project / "recipes/cifar10_lenet.yaml").read_text(encoding="utf-8")
    assert published_texts({"cifar10_lenet": RESULT}, project) == {
        path: path.read_text(encoding="utf-8") for path in published_texts({"cifar10_lenet": RESULT}, project)
    }


def test_models_are_compared_seed_by_seed(capsys: pytest.CaptureFixture[str]) -> None:
    other = replace(RESULT, seeds=(SEEDS[0], replace(SEEDS[1], model_md5="x")))
    assert results.compare({"digits": replace(RESULT, seeds=SEEDS[:2])}, {"digits": RESULT})
    assert not results.compare({"digits": other}, {"digits": RESULT})
    assert not results.compare({"digits": RESULT}, {})
    assert (
        "digits: other models here, 72.00% ± 2.00%, a CPU, portable; in docs/results.json none"
        in capsys.readouterr().out
    )


def test_a_seed_that_is_done_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[int] = []

    def measure(_: Path, seed: int) -> SeedResult:
        trained.append(seed)
        return SEEDS[seed]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "measure", measure)
    monkeypatch.setattr(results, "git", lambda *_: "commit")
    shutil.copy(PROJECT / "params.yaml", tmp_path)
    assert [results.measured_once(tmp_path, "digits", 0) for _ in range(2)] == [SEEDS[0]] * 2
    assert trained == [0]
    text = (tmp_path / "params.yaml").read_text(encoding="utf-8")
    (tmp_path / "params.yaml").write_text(text.replace("  seed: 0", "  seed: 1"), encoding="utf-8")
    assert results.measured_once(tmp_path, "digits", 1) == SEEDS[1]
    assert trained == [0, 1]


@pytest.mark.parametrize("options", [["--seeds", "4"], ["--set", "train.epochs=1"]])
def test_a_trial_is_not_published(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["results", "digits", "--write", *options])
    with pytest.raises(SystemExit, match="2"):
        results.parse_arguments()
    assert "--write: allowed without --set and with 5 seeds or more" in capsys.readouterr().err


def test_without_images_the_recipes_of_cifar10_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "ARCHIVE", tmp_path / "none.tar.gz")
    monkeypatch.chdir(PROJECT)
    arguments = argparse.Namespace(recipes=["cifar10_lenet"], images=None, overrides=[], seeds=1)
    assert results.measure_all(arguments) == {}
    assert capsys.readouterr().out == (
        "cifar10_lenet: skipped, as there are no images of CIFAR-10; name them: --images FOLDER\n"
    )


@pytest.mark.slow
def test_two_seeds_are_trained_and_the_checkout_stays_as_it_was(tmp_path: Path) -> None:
    project = copy_project(tmp_path / "project")
    command = [sys.executable, "-m", "benchmarks.results", "digits", "--seeds", "2", "--set", "train.epochs=1"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((project / ".cache/benchmarks/results.json").read_text(encoding="utf-8"))["digits"]
    first, second = (seed["model_md5"] for seed in found["seeds"])
    assert first != second
    assert all(0.2 < seed["accuracy"] < 1 and seed["train_seconds"] > 0 for seed in found["seeds"])
    assert found["setting"]["command"] == '`python -m benchmarks.results digits --seeds 2 --set "train.epochs=1"`'
    assert (project / ".cache/benchmarks/results.md").read_text(encoding="utf-8") in done.stdout
    assert sorted(path.name for path in (project / ".cache/benchmarks").iterdir()) == ["results.json", "results.md"]
    assert output(project, "status", "--porcelain") == b""
