"""Find, copy and check the sqlite files of MLflow and of the project's Prefect server."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from flows import server
from flows.prefect_database import database_path
from flows.settings import PrefectServer, configured_server, own_server_environment
from pipeline.core.errors import UserError, redact_url
from pipeline.core.project import artifact_folder
from pipeline.core.sqlite import MOVE_AWAY, sqlite_errors, sqlite_path
from pipeline.tracking.relocation import LOCATIONS
from pipeline.tracking.sqlite_store import MLFLOW, PREFECT
from pipeline.tracking.store_uri import tracking_uri

TOOLS = {"mlflow.db": MLFLOW, "prefect.db": PREFECT}
URL_VARIABLES = {"mlflow.db": "MLFLOW_TRACKING_URI", "prefect.db": "PREFECT_API_DATABASE_CONNECTION_URL"}
LOCK_SECONDS = 60.0  # how long to wait for another process to end its transaction
_REMEDY = "back it up where it runs, PostgreSQL with `pg_dump`, and all the rest here with --files-only"


def find_databases(project: Path) -> dict[str, Path]:
    """Return the sqlite files in use, which may not exist yet, by their name in a backup.

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
    configured = configured_server()
    if configured and not _is_own(configured, project):
        raise UserError(f"{configured.source}: found {configured.page}; allowed: the project's own server; {_REMEDY}")
    path = database_path(own_server_environment(server.DEFAULT_PORT, home=project / ".prefect"))
    if path is None:
        raise UserError(f"Prefect's database: found another one than a sqlite file; allowed: a sqlite file; {_REMEDY}")
    return path


def _is_own(configured: PrefectServer, project: Path) -> bool:
    """Return whether the configured server is the one that the project has started itself."""
    own = server.running(project)
    return own is not None and configured.api_url.rstrip("/") == own.api_url


def copy_database(source: Path, target: Path) -> None:
    """Copy a database in one consistent state while other processes write to it.

    Raises UserError where it is damaged, TemporaryError where it stays locked.
    """
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


def artifact_places_elsewhere(path: Path, *, project: Path) -> list[str]:
    """Return the places outside the project where runs and models of an MLflow database keep their files, sorted."""
    own = artifact_folder(project)
    ours = (f"{own.as_uri()}/", f"{own}/", "mlflow-artifacts:", "runs:", "models:")  # the last two name another row
    with sqlite_errors(path), closing(_open(path)) as connection:
        return sorted({place for place in _artifact_places(connection) if place and not place.startswith(ours)})


def _artifact_places(connection: sqlite3.Connection) -> Iterator[str | None]:
    for table, column in LOCATIONS:
        columns = {name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})")}
        if table != "experiments" and column in columns:  # an experiment's place is that of its next run
            query = f"SELECT {column} FROM {table}"  # noqa: S608  # our own names
            yield from (place for (place,) in connection.execute(query))


def _open(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=LOCK_SECONDS)
