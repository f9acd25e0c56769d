"""Queued DVC experiments are recorded, and a second machine pulls and reproduces; real trainings on tiny data."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from pipeline.artifacts import file_md5
from pipeline.core.yaml import read_yaml
from pipeline.tracking.models import recorded_model_md5
from pipeline.tracking.search import find_runs
from pipeline.tracking.store import connect
from tests.conftest import copy_project, start_repository, write_normalized
from tests.test_flows import wait_until

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
SHORT_TRAINING = {
    "  epochs: 20": "  epochs: 1",
    "  log_every_steps: 20": "  log_every_steps: 1",
}


def command(*arguments: str, folder: Path, status: int = 0) -> str:
    """Run a command in the folder without MLFLOW_TRACKING_URI, and return its output.

    The output goes to a file: the workers that `dvc queue start` leaves running would keep a pipe open until they end.
    """
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    environment |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}
    with tempfile.TemporaryFile("w+") as output:
        done = subprocess.run(
            arguments, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True, check=False
        )
        output.seek(0)
        text = output.read()
    assert done.returncode == status, text
    return text


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, stores: Path) -> Path:
    """Return a committed project whose download and normalize copy a tiny data set from git."""
    folder = copy_project(tmp_path_factory.mktemp("first") / "project")
    shutil.rmtree(folder / ".git")
    for name in ("dvc.lock", "artifacts"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "dvc.lock").unlink(missing_ok=True)
    text = (folder / "params.yaml").read_text()
    for old, new in SHORT_TRAINING.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "params.yaml").write_text(text)
    write_normalized(folder)
    (folder / "source").mkdir()
    for path in (folder / "artifacts/normalize").iterdir():
        path.rename(folder / "source" / path.name)
    shutil.rmtree(folder / "artifacts/normalize")
    stages = json.loads(json.dumps(read_yaml(folder / "dvc.yaml")))
    stages["stages"]["download"] |= {"cmd": "mkdir -p artifacts/download && echo x > artifacts/download/raw"}
    stages["stages"]["normalize"] |= {"cmd": "mkdir -p artifacts/normalize && cp source/* artifacts/normalize/"}
    (folder / "dvc.yaml").write_text(json.dumps(stages))
    start_repository(folder)
    for name in ("user.name", "user.email"):
        command("git", "config", name, "t", folder=folder)
    shutil.copy(stores / "mlflow.db", folder)
    command("dvc", "repro", folder=folder)
    command("git", "add", "dvc.lock", "artifacts/evaluate/metrics.json", folder=folder)
    command("git", "commit", "-qm", "Train", folder=folder)
    return folder


@pytest.fixture
def store(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/mlflow.db")
    connect()


@pytest.mark.timeout(900)
def test_queued_experiments_are_recorded_in_the_project_with_their_names(project: Path, store: None) -> None:
    command("dvc", "exp", "run", "--queue", "-S", "train.seed=range(1,3)", folder=project)
    command("dvc", "queue", "start", "-j", "2", folder=project)
    while "Running" in (listing := command("dvc", "queue", "status", folder=project)) or "Queued" in listing:
        time.sleep(1)
    assert listing.count("Success") == 2, listing
    listed = json.loads(command("dvc", "exp", "show", "--json", folder=project).partition("\n")[0])
    names = {experiment["name"] for experiment in listed[1]["experiments"]}
    runs = [run for run in find_runs({"dvc.experiment": "%"}) if run.tags["dvc.experiment"] in names]
    assert {run.tags["dvc.experiment"] for run in runs} == names
    assert all(run.name.startswith("digits ") and f"seed={run.params['train.seed']}" in run.name for run in runs)
    assert {run.tags["git.dirty"] for run in runs} == {"false"}
    assert {(run.status, run.params["train.seed"]) for run in runs} == {("FINISHED", "1"), ("FINISHED", "2")}
    for run in runs:
        assert "test/accuracy" in run.metrics
        assert recorded_model_md5(run.run_id) == run.tags["model.md5"]
        assert run.tags["mlflow.source.git.commit"] == command("git", "rev-parse", "HEAD", folder=project).strip()
    wait_until(lambda: not list((project / ".dvc/tmp/exps").glob("tmp*")))  # removed after the queue lists a success


def test_a_second_machine_pulls_predicts_and_reproduces_without_the_store_of_the_first(
    project: Path, tmp_path: Path
) -> None:
    remote, second = tmp_path / "remote", tmp_path / "second"
    command("dvc", "remote", "add", "--local", "--default", "own", str(remote), folder=project)
    command("dvc", "push", folder=project)
    command("git", "clone", "-q", str(project), str(second), folder=tmp_path)
    for name in ("user.name", "user.email"):
        command("git", "config", name, "t", folder=second)
    command("dvc", "remote", "add", "--local", "--default", "own", str(remote), folder=second)
    command("dvc", "pull", folder=second)
    model = Path("artifacts/train/best.safetensors")
    assert file_md5(second / model) == file_md5(project / model)
    picture = project / "artifacts/evaluate/confusion_matrix.png"
    assert "class " in command(sys.executable, "-m", "pipeline.predict", str(picture), folder=second)
    assert "Data and pipelines are up to date" in command("dvc", "repro", folder=second)
    output = command(sys.executable, "-m", "flows.reproduce", "HEAD", folder=second)
    assert output.splitlines()[-1] == "identical", output
    assert f"{'train':<11} identical" in output
    assert "environment not compared: a dvc.lock does not record it; an MLflow run does" in output
    assert command("git", "status", "--porcelain", folder=second) == ""


def test_a_commit_without_results_and_an_unknown_name_are_refused(project: Path) -> None:
    output = command(sys.executable, "-m", "flows.reproduce", "HEAD~1", folder=project, status=2)
    assert (
        "its dvc.lock has no hash of artifacts/normalize; allowed: a commit with a dvc.lock that `dvc repro` wrote"
        in output
    )
    output = command(sys.executable, "-m", "flows.reproduce", "nothing", folder=project, status=2)
    assert "nothing: no MLflow run, commit or experiment of this name here" in output
