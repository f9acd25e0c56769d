"""After a process is killed while it creates or migrates a store, the next process can use it without any loss."""

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pipeline.tracking.sqlite_store import MLFLOW, PREFECT, Tool, is_current
from tests.conftest import PROJECT

pytestmark = pytest.mark.slow

KILLED = [-signal.SIGKILL]
TOOLS = {"mlflow.db": MLFLOW, "prefect.db": PREFECT}
# Schema revisions to which the installed versions can downgrade, and from which they can upgrade.
OLDER_REVISIONS = {"mlflow.db": "7d34483879f0", "prefect.db": "a3b9c7d2e5f1"}
RUN = {
    "mlflow.db": "INSERT INTO runs (run_uuid, name, status, experiment_id) VALUES ('1f', 'old', 'FINISHED', 0)",
    "prefect.db": "INSERT INTO flow (id, name, tags, labels) VALUES ('1f', 'old', '[]', '{}')",
}
CREATION = [("mlflow.db", [1, 27]), ("prefect.db", [1, 40])]
SendRequest = Callable[..., list[int]]


@pytest.fixture(scope="module")
def send_request() -> Iterator[SendRequest]:
    """Yield a function that sends a request to create or migrate a store, and returns the exit statuses."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.faults.store_child"],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin
        assert process.stdout

        def send(file: Path, **request: Any) -> list[int]:
            assert process.stdin
            assert process.stdout
            line = json.dumps({"tool": TOOLS[file.name].name, "folder": str(file.parent), **request})
            process.stdin.write(f"{line}\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())  # type: ignore[no-any-return]

        yield send
        process.kill()


def output(file: Path) -> str:
    return (file.parent / "output.txt").read_text()


def content(file: Path) -> list[str]:
    with closing(sqlite3.connect(file)) as connection:
        return list(connection.iterdump())


def has_run(file: Path) -> bool:
    table = "runs" if file.name == "mlflow.db" else "flow"
    with closing(sqlite3.connect(file)) as connection:
        return bool(connection.execute(f"SELECT 1 FROM {table} WHERE name = 'old'").fetchall())


def tool(file: Path) -> Tool:
    return TOOLS[file.name]


def leftovers(file: Path) -> list[str]:
    known = {file.name, f"{file.name}.lock", "output.txt", "mlartifacts"}
    return [path.name for path in file.parent.iterdir() if path.name not in known]


@pytest.mark.parametrize(("name", "numbers"), CREATION)
def test_a_store_whose_creation_was_killed_is_created_by_the_next_process(
    send_request: SendRequest, tmp_path: Path, name: str, numbers: list[int]
) -> None:
    file = tmp_path / name
    for kill in [*(["migration", number] for number in numbers), ["replace", 1]]:
        assert send_request(file, kill=kill) == KILLED, output(file)
        assert not file.exists()
    assert send_request(file) == [0], output(file)
    assert is_current(file, tool=tool(file))
    assert not leftovers(file)


@pytest.fixture(params=TOOLS)
def older(send_request: SendRequest, tmp_path: Path, stores: Path, request: pytest.FixtureRequest) -> Path:
    """Return a store with a run and with the schema of an older version of its tool."""
    file = Path(shutil.copy(stores / request.param, tmp_path))
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute(RUN[request.param])
    assert send_request(file, revision=OLDER_REVISIONS[request.param]) == [0], output(file)
    assert not is_current(file, tool=tool(file))
    return file


def test_a_store_whose_migration_was_killed_keeps_its_content(send_request: SendRequest, older: Path) -> None:
    before = content(older)
    for kill in (["migration", 1], ["migration", 2], ["replace", 1]):
        assert send_request(older, kill=kill) == KILLED, output(older)
        assert content(older) == before
    assert send_request(older, kill=["replace after", 1]) == KILLED
    assert is_current(older, tool=tool(older))
    assert send_request(older) == [0], output(older)
    assert has_run(older)
    assert not leftovers(older)


def test_processes_that_start_at_the_same_time_create_one_store(send_request: SendRequest, tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    assert send_request(file, processes=3) == [0, 0, 0], output(file)
    assert is_current(file, tool=MLFLOW)
