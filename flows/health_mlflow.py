"""Check the MLflow store for `flows.health` without changing it, as MLflow would by a migration or corrected paths."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from flows import doctor
from flows.workspace import existing_store
from pipeline.core.errors import TemporaryError, UserError, redact_url
from pipeline.core.network import is_server
from pipeline.core.sqlite import sqlite_errors, sqlite_path
from pipeline.tracking.relocation import needs_relocation
from pipeline.tracking.sqlite_store import MLFLOW, is_current, revisions
from pipeline.tracking.store_uri import tracking_uri, unreachable

NUM_RUNS = "SELECT count(*) FROM runs"
REVISION = "SELECT version_num FROM alembic_version"
OTHER_VERSION = "has the database schema of another version of MLflow; the next `make run` or `make ui` migrates it"


class CheckFailedError(Exception):
    """The error for a check that found something wrong; its text states what to do."""


def check_mlflow(project: Path) -> str:
    """Return the MLflow store in use and its number of runs, or, for a server, that it answers."""
    try:
        uri = tracking_uri(project)
        if is_server(uri):
            return _ask_server(uri)
        path = sqlite_path(uri)
        if path and not path.exists():
            raise TemporaryError(f"{path} does not exist yet; the first run makes it")
        name = path or redact_url(uri)
        if not _is_current(uri):
            raise CheckFailedError(f"{name} {OTHER_VERSION}")
        return f"{name} has {_query(uri, NUM_RUNS)} runs"
    except UserError as error:
        raise CheckFailedError(str(error)) from None


def mlflow_runs(project: Path) -> Iterator[doctor.Finding]:
    """Yield what killed runs left in MLflow, or why that was not checked: where MLflow would change the store first."""
    uri = existing_store(project)
    if uri and not is_server(uri):
        if not _is_current(uri):
            yield doctor.Finding(f"MLflow's runs were not checked: the store {OTHER_VERSION}")
            return
        if needs_relocation(uri, project):
            yield doctor.Finding(
                "MLflow's runs were not checked: the project was moved, and the store has its old paths; "
                "`python -m flows.doctor` corrects them"
            )
            return
    yield from doctor.mlflow_runs(project)


def _ask_server(uri: str) -> str:
    from pipeline.tracking.store import check_server  # noqa: PLC0415  # MLflow takes 2 s to import

    try:
        check_server(uri)
    except TemporaryError as error:
        raise CheckFailedError(str(error)) from None
    return f"{redact_url(uri)} answers"


def _is_current(uri: str) -> bool:
    """Return whether the database has the newest schema that the installed MLflow knows."""
    path = sqlite_path(uri)
    return is_current(path, tool=MLFLOW) if path else _query(uri, REVISION) == revisions(MLFLOW)[1]


def _query(uri: str, query: str) -> int | str:
    """Return the one value that an SQL query finds in MLflow's database."""
    path = sqlite_path(uri)
    return _query_file(path, query) if path else _query_database(uri, query)


def _query_file(path: Path, query: str) -> int | str:
    uri = f"{path.absolute().as_uri()}?mode=rw"  # rw does not create the file, and can read one with a write-ahead log
    with sqlite_errors(path), closing(sqlite3.connect(uri, uri=True, timeout=30)) as connection:
        found: int | str = connection.execute(query).fetchone()[0]
    return found


def _query_database(uri: str, query: str) -> int | str:
    import sqlalchemy  # noqa: PLC0415  # it takes 0.3 s, and sqlite does without

    try:
        engine = sqlalchemy.create_engine(uri)
        with closing(engine.connect()) as connection:
            found: int | str = connection.execute(sqlalchemy.text(query)).scalar_one()
    except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        raise CheckFailedError(unreachable(uri, type(error).__name__)) from None
    return found
