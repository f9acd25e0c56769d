"""The table of experiments fits the terminal, and shows the parameters that differ."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dvc.repo import Repo

from flows.experiments import METRICS, Row, as_table
from pipeline.core.yaml import dump_yaml
from pipeline.recipes import compose
from tests.conftest import PROJECT, start_repository

STAGES = {
    "evaluate": {
        "cmd": "true",
        "deps": ["array.npy"],
        "params": ["download", "normalize", "train", "evaluate"],
        "metrics": [{"artifacts/evaluate/metrics.json": {"cache": False}}],
    }
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a project with five experiments of four recipes, each with its own metrics."""
    folder = tmp_path_factory.mktemp("experiments")
    shutil.copytree(PROJECT / "flows", folder / "flows")
    shutil.copytree(PROJECT / "pipeline", folder / "pipeline")
    shutil.copytree(PROJECT / "recipes", folder / "recipes")
    shutil.copy(PROJECT / "params.yaml", folder)
    (folder / "dvc.yaml").write_text(json.dumps({"stages": STAGES}))
    (folder / "array.npy").write_text("")
    metrics = folder / "artifacts/evaluate/metrics.json"
    metrics.parent.mkdir(parents=True)
    metrics.write_text(json.dumps(dict.fromkeys((*METRICS, "accuracy_low", "top_5_accuracy"), 0.5)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for role in ("AUTHOR", "COMMITTER"):
            patch.setenv(f"GIT_{role}_NAME", "t")
            patch.setenv(f"GIT_{role}_EMAIL", "t@t")
        subprocess.run(["git", "init", "-q"], check=True)
        Repo.init(str(folder)).close()
        start_repository(folder)
        committed = Path("params.yaml").read_text()
        with Repo(str(folder)) as repo:
            for number, recipe in enumerate(("digits", "cifar10_lenet", "cifar10_resnet18", "my_images", "digits")):
                Path("params.yaml").write_text(committed)
                Path("params.yaml").write_text(dump_yaml(compose(recipe, {"train.seed": number})))
                metrics.write_text(json.dumps(dict.fromkeys(METRICS, number / 10)))
                Path("array.npy").write_text(recipe)
                repo.experiments.save(name=f"{recipe.replace('_', '-')}-{number}", force=True)
    return folder


def test_five_experiments_fit_160_columns_with_metrics_and_changed_parameters(project: Path) -> None:
    environment = os.environ | {"COLUMNS": "160", "DVC_NO_ANALYTICS": "1"}
    command = [sys.executable, "-m", "flows.experiments"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 160
    [digits] = [line for line in lines if line.startswith("- digits-4")]
    assert digits.split()[4:] == ["0.4000"] * 3 + ["train.seed=4"]
    text = " ".join(" ".join(line.split()) for line in lines)
    for change in ("train.model=resnet18", "train.weights=DEFAULT", "download.dataset=imagefolder", "train.seed=3"):
        assert change in text


def test_a_failed_or_queued_experiment_shows_its_state_and_no_metrics() -> None:
    rows = [Row("- bold-name", "2026-11-25 21:12", "failed", {}, {"train.weights": ("DEFAULT", None)})]
    assert as_table(rows, width=120).splitlines()[1].split() == [
        "-",
        "bold-name",
        "2026-11-25",
        "21:12",
        "failed",
        "train.weights=null",
    ]


def test_in_a_narrow_terminal_the_parameters_are_below_their_experiment() -> None:
    changed = {
        "download.dataset": ("digits", "imagefolder"),
        "download.folder": ("data/images", "/a/long/path/to/images"),
    }
    lines = as_table([Row("- bold-name", "2026-11-25 21:12", "success", {}, changed)], width=60).splitlines()
    assert lines[2].startswith("- bold-name")
    assert lines[3:] == ["    download.dataset=imagefolder,", "    download.folder=/a/long/path/to/images"]


def test_a_metric_that_is_null_is_shown_as_null() -> None:
    metrics = {"accuracy": 0.5, "macro_f1": None, "loss": None}
    [_, line] = as_table([Row("- bold-name", "2026-11-25 21:12", "success", metrics, {})], width=120).splitlines()
    assert line.split()[4:] == ["0.5000", "null", "null"]
