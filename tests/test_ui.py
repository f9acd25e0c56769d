"""`make ui` starts both servers on loopback, and leaves no process behind."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import ports, server, ui
from flows.ports import free_port
from pipeline.artifacts import write_json
from pipeline.core.errors import TemporaryError, UserError
from pipeline.core.processes import start_of

PAGE = "/#/experiments/1/runs/a?workflowType=machine_learning"
PROGRAM = "from pathlib import Path; from flows import ui; ui.PROJECT = Path.cwd(); ui.main()"
REPOSITORY = str(Path(__file__).parents[1])


@contextmanager
def open_ui(folder: Path, *, mlflow_port: int, prefect_port: int) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "MLFLOW_PORT": str(mlflow_port), "PREFECT_PORT": str(prefect_port)}
    environment |= {"PYTHONPATH": REPOSITORY, "PREFECT_HOME": str(folder / ".prefect"), "PREFECT_API_URL": ""}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=folder,
        env={name: value for name, value in environment.items() if name != "MLFLOW_TRACKING_URI"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.communicate()


@pytest.mark.slow
def test_both_servers_answer_and_ctrl_c_leaves_no_process(tmp_path: Path, stores: Path) -> None:
    (tmp_path / ".prefect").mkdir()
    shutil.copy(stores / "prefect.db", tmp_path / ".prefect")
    shutil.copy(stores / "mlflow.db", tmp_path)
    mlflow_port, prefect_port = free_port(), free_port()
    with open_ui(tmp_path, mlflow_port=mlflow_port, prefect_port=prefect_port) as process:
        assert process.stdout
        lines = [process.stdout.readline() for _ in range(4)]
        assert lines[0] == f"MLflow:  http://127.0.0.1:{mlflow_port}/#/experiments?workflowType=machine_learning\n"
        assert lines[2] == f"Prefect: http://127.0.0.1:{prefect_port}\n"
        assert server.answers(f"http://127.0.0.1:{mlflow_port}/")
        assert server.answers(f"http://127.0.0.1:{prefect_port}/")
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 0
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert ports.is_free(mlflow_port)
    assert ports.is_free(prefect_port)


def test_links_use_the_port_of_mlflows_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_PORT", raising=False)
    assert ui.mlflow_page("a", experiment_id="1", project=tmp_path) == f"http://127.0.0.1:5000{PAGE}"
    report = ui.mlflow_page("a", experiment_id="1", artifact="report.html", project=tmp_path)
    assert report == f"http://127.0.0.1:5000{PAGE.replace('?', '/artifacts/report.html?')}"
    (tmp_path / ".prefect").mkdir()
    record = {"pid": os.getpid(), "started": start_of(os.getpid()), "port": 5003}
    write_json(tmp_path / ".prefect" / "mlflow.json", record)
    assert ui.mlflow_page("a", experiment_id="1", project=tmp_path) == f"http://127.0.0.1:5003{PAGE}"


def test_a_server_that_was_running_before_stays_and_the_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "start", lambda _project: (server.Server(1, "", 4200), False))
    monkeypatch.setattr(server, "stop", lambda _project: pytest.fail("the server is stopped"))
    with temporary_settings(restore_defaults=[PREFECT_API_URL]), ui.prefect_server(tmp_path) as line:
        assert line == "http://127.0.0.1:4200 (was running already, keeps running; `make stop` stops it)"


@pytest.mark.parametrize("name", ["MLFLOW_PORT", "PREFECT_PORT"])
def test_a_port_in_use_is_reported_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    port = free_port()
    monkeypatch.setenv(name, str(port))
    refused = pytest.raises(UserError, match=f"port {port} is in use; .* {name}=")
    with socket.create_server(("127.0.0.1", port)), refused:
        open_page(name, tmp_path)


def open_page(name: str, folder: Path) -> None:
    page = ui.mlflow_server if name == "MLFLOW_PORT" else ui.prefect_server
    # other tests in this process may have set a server
    with temporary_settings(restore_defaults=[PREFECT_API_URL]), page(folder):
        pass


def test_a_port_that_is_not_a_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_PORT", "http")
    with pytest.raises(UserError, match="MLFLOW_PORT: found 'http'; allowed: a port number"):
        ports.port_variable("MLFLOW_PORT", 5000)


@pytest.mark.slow
def test_stop_ends_the_server_and_a_second_start_reuses_it(tmp_path: Path, stores: Path) -> None:
    (tmp_path / ".prefect").mkdir()
    shutil.copy(stores / "prefect.db", tmp_path / ".prefect")
    first, new = server.start(tmp_path, port=free_port())
    assert (server.start(tmp_path), new) == ((first, False), True)
    assert server.stop(tmp_path) == first
    assert server.running(tmp_path) is None
    assert ports.is_free(first.port)
    assert server.stop(tmp_path) is None


def test_a_server_that_does_not_start_is_reported_in_one_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = server.launch(["nothing_here"], log=log, environment=dict(os.environ))
    with pytest.raises(TemporaryError, match=r"the server did not start: .*No module named nothing_here; see "):
        server.wait_for("http://127.0.0.1:9/", process, name="the server", log=log)
