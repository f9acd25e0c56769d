"""A training killed in a flow run or in `dvc repro` resumes to the same model in the same MLflow run."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest

from flows import server
from pipeline.artifacts import file_md5
from tests.conftest import copy_project, hold_at, run_step, start_server

pytestmark = pytest.mark.slow
EPOCHS = 4


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stores: Path) -> Iterator[Path]:
    folder = copy_project(tmp_path / "project")
    for name in ("user.name", "user.email"):
        subprocess.run(["git", "config", name, "t"], cwd=folder, check=True)
    text = (folder / "params.yaml").read_text()
    text = text.replace("cpu_threads: 2", "cpu_threads: 1").replace("  epochs: 20\n", f"  epochs: {EPOCHS}\n")
    text = text.replace("checkpoint_every_minutes: 10", "checkpoint_every_minutes: 0.000001")  # after each step
    (folder / "params.yaml").write_text(text)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(stores / "mlflow.db", folder)
    monkeypatch.setenv("PREFECT_API_URL", start_server(folder, stores))
    monkeypatch.setenv("PREFECT_HOME", str(folder / ".prefect"))
    yield folder
    server.stop(folder)


def run_and_kill_at(line: str | None, project: Path, *command: str) -> tuple[int, str]:
    """Run a command, kill its training at a line, and return the exit status and the output of the command."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", *command],
        cwd=project,
        env=os.environ
        | {"PYTHONUNBUFFERED": "1", "DVC_NO_ANALYTICS": "1"}
        | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        | (hold_at(line, folder=project.parent) if line else {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout
    output, killed = "", False
    for printed in process.stdout:
        output += printed
        if line and not killed and line in printed:
            training_below(process.pid).kill()
            killed = True
    assert killed == bool(line), output
    return process.wait(), output


def training_below(pid: int) -> psutil.Process:
    children = psutil.Process(pid).children(recursive=True)
    [found] = [child for child in children if child.cmdline()[1:] == ["-m", "pipeline.train"]]
    return found


def only_run(project: Path) -> Any:
    """Return the only run of the project, which must be finished and have a validation loss of each epoch, from 0."""
    client = mlflow.MlflowClient(f"sqlite:///{project}/mlflow.db")
    [run] = client.search_runs([found.experiment_id for found in client.search_experiments()])
    history = client.get_metric_history(run.info.run_id, "validation/loss")
    assert [point.step for point in history] == list(range(EPOCHS + 1))
    assert run.info.status == "FINISHED"
    return run


def test_a_killed_training_resumes_in_the_flow_run_and_in_dvc_repro(project: Path, stores: Path) -> None:
    status, output = run_and_kill_at("epoch 2/4", project, "flows.train_classifier")
    assert status == 0, output
    assert output.count("resumes from its checkpoint") == 1
    by_flow = only_run(project)
    for name in (".dvc/cache", "mlflow.db", "mlartifacts"):  # the project starts again without the result
        subprocess.run(["rm", "-rf", name], cwd=project, check=True)
    for name in ("mlflow.db", "other.db"):
        shutil.copy(stores / "mlflow.db", project / name)

    status, output = run_and_kill_at("epoch 2/4", project, "dvc", "repro", "train")
    assert status != 0
    # the status depends on DVC's shell: dash replaces itself by the command, bash waits for it
    assert any(f"exited with {code}" in output for code in (-signal.SIGKILL, 128 + signal.SIGKILL)), output
    status, output = run_and_kill_at(None, project, "dvc", "repro", "train")
    assert status == 0, output
    assert "resumes from its checkpoint" in output
    by_dvc = only_run(project)

    model = file_md5(project / "artifacts/train/best.safetensors")
    assert by_flow.data.tags["model.md5"] == by_dvc.data.tags["model.md5"] == model
    environment = os.environ | {"PIPELINE_CACHE_DIR": "other", "MLFLOW_TRACKING_URI": f"sqlite:///{project}/other.db"}
    done = run_step("train", folder=project, environment=environment)  # this training is not interrupted
    assert done.returncode == 0, done.stderr
    assert file_md5(project / "artifacts/train/best.safetensors") == model
