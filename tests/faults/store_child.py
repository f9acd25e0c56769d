"""Create or migrate a store in processes that are killed by SIGKILL at a chosen event, or not at all.

`python -m tests.faults.store_child` reads JSON requests, one per line: {"tool", "folder", "kill", "processes"}. For
each it forks processes that create or migrate the store in the folder, and prints their exit statuses, negative after
a signal. "kill" is the name of an event and its number among those of that name, such as ["migration", 9]. A migration
is killed after its statements, before alembic records its revision. {"tool", "folder", "revision"} downgrades the store
to that revision.
"""

import asyncio
import functools
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import mlflow.store.db.utils
from alembic import command
from alembic.runtime.migration import HeadMaintainer
from anyio.to_thread import run_sync
from prefect.server.database import provide_database_interface
from prefect.server.database.alembic_commands import alembic_downgrade
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, temporary_settings

from pipeline.core.settings import get_settings
from pipeline.tracking import sqlite_store
from pipeline.tracking.store import connect


def kill_at(owner: Any, name: str, *, label: str, kill: Any, counts: Counter[str]) -> None:
    """Kill this process before a chosen call of `owner.name`, or after one."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*values: Any, **options: Any) -> Any:
        counts[label] += 1
        if kill == [label, counts[label]]:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*values, **options)
        if kill == [f"{label} after", counts[label]]:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapped)


def ensure(tool: str) -> None:
    """Create or migrate the store in the current folder, as the project does before it uses the store."""
    if tool == "MLflow":
        connect()
    else:  # as flows/prefect_database.py does, without a process for Prefect's command, which takes seconds to start
        sqlite_store.ensure_store(Path("prefect.db"), tool=sqlite_store.PREFECT, migrate=upgrade_prefect)


def upgrade_prefect(copy: Path, _lock: int) -> None:
    with temporary_settings({PREFECT_API_DATABASE_CONNECTION_URL: f"sqlite+aiosqlite:///{copy}"}):
        asyncio.run(provide_database_interface().create_db())


def downgrade(tool: str, *, revision: str) -> None:
    """Downgrade the store in the current folder to the schema of an older version of the tool."""
    if tool == "Prefect":
        with temporary_settings({PREFECT_API_DATABASE_CONNECTION_URL: "sqlite+aiosqlite:///prefect.db"}):
            asyncio.run(run_sync(alembic_downgrade, revision))
        return
    uri = "sqlite:///mlflow.db"
    config = mlflow.store.db.utils._get_alembic_config(uri)  # type: ignore[no-untyped-call]
    with mlflow.store.db.utils.create_sqlalchemy_engine(uri).begin() as connection:  # type: ignore[no-untyped-call]
        config.attributes["connection"] = connection
        command.downgrade(config, revision)


def run(tool: str, folder: str, kill: Any, revision: str | None) -> None:
    os.chdir(folder)
    with Path("output.txt").open("ab") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    if revision:
        downgrade(tool, revision=revision)
        return
    counts = Counter[str]()
    kill_at(HeadMaintainer, "update_to_step", label="migration", kill=kill, counts=counts)
    kill_at(Path, "replace", label="replace", kill=kill, counts=counts)
    ensure(tool)


def fork(request: dict[str, Any]) -> int:
    """Start a process for the request, and return its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            run(request["tool"], request["folder"], request.get("kill"), request.get("revision"))
        finally:
            sys.stdout.flush()
            os._exit(0 if sys.exc_info()[0] is None else 1)
    return pid


def main() -> None:
    """Fork processes for each request."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    get_settings.cache_clear()
    for line in sys.stdin:
        request = json.loads(line)
        pids = [fork(request) for _ in range(request.get("processes", 1))]
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


if __name__ == "__main__":
    main()
