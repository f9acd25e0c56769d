"""The systemd units of docs/systemd/, and what they start, without systemd."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from flows import server
from flows.ports import free_port
from pipeline.core.errors import EXIT_TEMPORARY
from tests.conftest import PROJECT
from tests.test_flows import make_project

UNITS = sorted((PROJECT / "docs/systemd").glob("*.service"))
READY_SECONDS, STOP_SECONDS = 300, 30  # TimeoutStartSec and TimeoutStopSec of the units


def values(unit: Path) -> dict[str, str]:
    """The last value of each key of a unit."""
    return dict(line.split("=", 1) for line in unit.read_text().splitlines() if "=" in line)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    """`verify` ends with status 0 also where it ignores a line, and prints which."""
    command = ["systemd-analyze", "--user", "verify", *map(str, UNITS)]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert len(UNITS) == 3
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_starts_a_module_of_the_project_and_stops_it_in_time(unit: Path) -> None:
    found = values(unit)
    module = shlex.split(found["ExecStart"])[3]
    assert (PROJECT / f"{module.replace('.', '/')}.py").is_file()
    grace = server.DEPENDENT_END_SECONDS if module == "flows.worker" else 10
    assert int(found["TimeoutStopSec"]) > grace
    assert found["Restart"] == "on-failure"
    assert "_URL" not in unit.read_text()  # who has the port may be another user; the project's own record is not


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prefect", "mlflow"])
def test_a_service_reports_when_it_answers_and_ends_what_it_started(name: str, tmp_path: Path, stores: Path) -> None:
    project, port = make_project(tmp_path), free_port()
    shutil.copy(PROJECT / "python", project)
    (project / ".prefect").mkdir()
    shutil.copy(stores / "mlflow.db", project)
    shutil.copy(stores / "prefect.db", project / ".prefect")
    command = shlex.split(values(PROJECT / f"docs/systemd/classifier-{name}.service")["ExecStart"])
    environment = {f"{name.upper()}_PORT": str(port), "NOTIFY_SOCKET": str(tmp_path / "notify")}
    environment |= {"PIPELINE_PYTHON": sys.executable, "HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    health = f"http://127.0.0.1:{port}{'/api' if name == 'prefect' else ''}/health"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(environment["NOTIFY_SOCKET"])
        manager.settimeout(READY_SECONDS)
        for number, status in ((signal.SIGTERM, 0), (signal.SIGKILL, EXIT_TEMPORARY)):
            process = subprocess.Popen(command, cwd=project, env=environment)
            try:
                assert manager.recv(100) == b"READY=1"
                assert server.answers(health)
                [child] = psutil.Process(process.pid).children()
                (psutil.Process(process.pid) if number == signal.SIGTERM else child).send_signal(number)
                assert process.wait(STOP_SECONDS) == status
                assert not server.answers(health)
            finally:
                process.kill()
                process.wait()
