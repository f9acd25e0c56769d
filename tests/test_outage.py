"""A training survives that its real MLflow server stops in the middle, whether the server returns or not."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest

from flows import server
from flows.ports import free_port
from tests.conftest import read_until, release, run_step
from tests.test_resume import Project, outcome, train_uninterrupted

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, mlflow_store: Path) -> Any:
    return train_uninterrupted(tmp_path_factory.mktemp("whole"), mlflow_store)


class Server:
    """An MLflow server on loopback that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.uri = f"http://127.0.0.1:{free_port()}"
        self._folder = folder
        self.start()

    def start(self) -> None:
        store, port = f"sqlite:///{self._folder}/server.db", self.uri.rpartition(":")[2]
        command = ["mlflow", "server", "--backend-store-uri", store, "--host", "127.0.0.1", "--port", port]
        command += ["--artifacts-destination", str(self._folder / "served"), "--workers", "1"]
        environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
        environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
        log = self._folder / "server.log"
        self._process = server.launch(command, log=log, environment=environment)
        server.wait_for(f"{self.uri}/health", self._process, name="MLflow", log=log)

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture
def mlflow_server(workspace: Path, mlflow_store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    shutil.copy(mlflow_store / "mlflow.db", workspace / "server.db")
    found = Server(workspace)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", found.uri.replace("//", "//me:secret@"))
    for name, value in {"MAX_RETRIES": "0", "TIMEOUT": "300"}.items():  # they apply to the requests of the test, too
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", value)
    yield found
    found.kill()


def test_metrics_are_queued_while_the_server_is_down_and_sent_when_it_is_back(
    mlflow_server: Server, uninterrupted: Any
) -> None:
    process = Project(Path.cwd()).start_until("epoch 2/4")
    mlflow_server.kill()
    output = read_until("warning: MLflow does not answer, metrics are queued", process)
    mlflow_server.start()
    output += read_until("MLflow answers again", process)
    release(Path.cwd())
    output += process.communicate()[0]
    assert process.returncode == 0, output
    assert "secret" not in output
    assert outcome() == uninterrupted


def test_metrics_stay_queued_for_a_server_that_stays_down(mlflow_server: Server, uninterrupted: Any) -> None:
    process = Project(Path.cwd()).start_until("epoch 2/4")
    mlflow_server.kill()
    release(Path.cwd())
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "is queued for the next training or evaluation" in output
    assert "secret" not in output
    mlflow_server.start()
    done = run_step("evaluate")
    assert done.returncode == 0, done.stderr
    assert "what was queued for it is sent" in done.stdout
    model, steps = outcome()
    assert (model, {name: found for name, found in steps.items() if not name.startswith("test/")}) == uninterrupted
    [run] = mlflow.MlflowClient(mlflow_server.uri).search_runs(["1"])
    assert run.outputs
    assert len(run.outputs.model_outputs) == 1
    assert not list(Path(".cache/mlflow").iterdir())


def test_a_server_that_is_down_at_the_start_is_a_temporary_failure(workspace: Path) -> None:
    os.environ["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{free_port()}"  # the fixture `workspace` restores it
    process = Project(workspace).start()
    output, _ = process.communicate()
    assert process.returncode == 75
    assert "which does not answer" in output.splitlines()[-1]
