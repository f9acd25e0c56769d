"""Parallel flow runs are recorded by MLflow and Prefect in a real PostgreSQL on loopback."""

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest
from mlflow import MlflowClient

from flows import server
from flows.ports import free_port
from tests.conftest import copy_project

# Debian keeps these commands out of PATH.
COMMANDS = Path(
    shutil.which("initdb") or max(Path("/usr/lib/postgresql").glob("*/bin/initdb"), default="initdb")
).parent
PASSWORD = "s3cret-of-the-test"
RATES = ("0.02", "0.1")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (COMMANDS / "initdb").exists(), reason="PostgreSQL is not installed (Debian: apt install postgresql)"
    ),
]


def as_server(*command: str, cwd: Path) -> None:
    """Run a command of PostgreSQL, as the user postgres if this process is root, as PostgreSQL refuses root."""
    user = "postgres" if os.geteuid() == 0 else None
    subprocess.run(
        [str(COMMANDS / command[0]), *command[1:]], cwd=cwd, check=True, user=user, stdout=subprocess.DEVNULL
    )


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Start a PostgreSQL with the empty databases mlflow and prefect, and yield `user:password@host:port`."""
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
    (folder / "password").write_text(PASSWORD)
    if os.geteuid() == 0:
        owner = pwd.getpwnam("postgres")
        for path in (folder, folder / "password"):
            os.chown(path, owner.pw_uid, owner.pw_gid)
    port = free_port()
    options = ["-U", "pipeline", "-A", "scram-sha-256", "--pwfile", "password", "-D", "data"]
    as_server("initdb", *options, cwd=folder)
    as_server("pg_ctl", "start", "-w", "-D", "data", "-l", "log", "-o", f"-h 127.0.0.1 -p {port} -k ''", cwd=folder)
    try:
        with psycopg.connect(
            f"postgresql://pipeline:{PASSWORD}@127.0.0.1:{port}/postgres", autocommit=True
        ) as connection:
            for name in ("mlflow", "prefect"):
                connection.execute(f"CREATE DATABASE {name}")
        yield f"pipeline:{PASSWORD}@127.0.0.1:{port}"
    finally:
        as_server("pg_ctl", "stop", "-w", "-m", "fast", "-D", "data", cwd=folder)
        shutil.rmtree(folder)


def rows(address: str, database: str, query: LiteralString) -> list[tuple[object, ...]]:
    with psycopg.connect(f"postgresql://{address}/{database}") as connection:
        return connection.execute(query).fetchall()


def test_parallel_flow_runs_are_recorded_in_postgresql(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = copy_project(tmp_path / "project")
    uri = f"postgresql://{address}/mlflow"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", f"postgresql+asyncpg://{address}/prefect")
    monkeypatch.setenv("PREFECT_HOME", str(project / ".prefect"))
    monkeypatch.setenv("PREFECT_API_URL", server.start(project, port=free_port())[0].api_url)
    try:
        command = [sys.executable, "-m", "flows.train_classifier", "--set", "train.epochs=1", "--set"]
        processes = [
            subprocess.Popen(
                [*command, f"train.learning_rate={rate}"],
                cwd=project,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rate in RATES
        ]
        outputs = [process.communicate()[0] for process in processes]
    finally:
        server.stop(project)
    assert [process.returncode for process in processes] == [0] * len(RATES), "\n".join(outputs)
    assert PASSWORD not in "".join(outputs)
    runs = MlflowClient(uri).search_runs(["1"])
    assert sorted(run.data.params["train.learning_rate"] for run in runs) == sorted(RATES)
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len({run.data.tags["model.md5"] for run in runs}) == len(RATES)
    assert PASSWORD not in str([run.to_dictionary() for run in runs])
    assert rows(address, "mlflow", "SELECT count(*) FROM runs WHERE status = 'FINISHED'") == [(len(RATES),)]
    assert rows(address, "prefect", "SELECT state_type, count(*) FROM flow_run GROUP BY 1") == [
        ("COMPLETED", len(RATES))
    ]
    assert not (project / "mlflow.db").exists()
    assert not list((project / ".prefect").glob("*.db"))
