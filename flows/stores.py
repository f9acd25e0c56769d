"""The sqlite files behind MLflow and the project's Prefect server: where they are, how they are copied and checked."""

import sqlite3
from contextlib import closing
from pathlib import Path

from flows import server
from flows.prefect_database import database_path
from flows.settings import configured_server, own_server_environment
from pipeline.core.errors import UserError, redact_url
from pipeline.core.sqlite import MOVE_AWAY, sqlite_errors, sqlite_path
from pipeline.tracking.sqlite_store import MLFLOW, PREFECT
from pipeline.tracking.store_uri import tracking_uri

TOOLS = {"mlflow.db": MLFLOW, "prefect.db": PREFECT}
LOCK_SECONDS = 60.0  # how long to wait for another process to end its transaction
_REMEDY = "back it up where it runs, PostgreSQL with `pg_dump`, and all the rest here with --files-only"


def find_databases(project: Path) -> dict[str, Path]:
    """Return the sqlite files in force, which may not exist yet, by their name in a backup.

    Raises UserError where MLflow or Prefect keep their records in another database or on a server elsewhere.
    """
    return {"mlflow.db": _mlflow_database(project), "prefect.db": _prefect_database(project)}


def _mlflow_database(project: Path) -> Path:
    uri = tracking_uri(project)
    path = sqlite_path(uri)
    if path is None:
        raise UserError(f"MLFLOW_TRACKING_URI: found {redact_url(uri)}; allowed: a sqlite file; {_REMEDY}")
    return path


def _prefect_database(project: Path) -> Path:
    configured, own = configured_server(), server.running(project)
    if configured and not (own and configured.api_url.rstrip("/") == own.api_url):
        raise UserError(f"{configured.source}: found {configured.page}; allowed: the project's own server; {_REMEDY}")
    path = database_path(own_server_environment(server.DEFAULT_PORT, home=project / ".prefect"))
    if path is None:
        raise UserError(f"Prefect's database: found another one than a sqlite file; allowed: a sqlite file; {_REMEDY}")
    return path


def copy_database(source: Path, target: Path) -> None:
    """Copy a database as it is at one moment, while others write to it; raises UserError, TemporaryError."""
    with sqlite_errors(source), closing(_open(source)) as connection, closing(sqlite3.connect(target)) as copy:
        connection.backup(copy)
        copy.execute("PRAGMA journal_mode = DELETE")  # all of it in one file
    check_database(target)


def check_database(path: Path) -> None:
    """Raise UserError where sqlite finds damage in the file."""
    with sqlite_errors(path), closing(_open(path)) as connection:
        found = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if found != "ok":
        raise UserError(f"{path}: damaged ({found}); {MOVE_AWAY}")


def _open(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=LOCK_SECONDS)
