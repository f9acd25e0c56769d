"""Connect to the MLflow store, create or migrate its database, report its failures.

The store is `mlflow.db` in the project unless MLFLOW_TRACKING_URI names another one.
"""

import atexit
import fcntl
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import mlflow
import requests
from mlflow.exceptions import MlflowException
from mlflow.store.db import utils as db_utils
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.utils.credentials import get_default_host_creds

from pipeline.artifacts import bytes_md5
from pipeline.core.errors import TemporaryError, UserError, first_line, redact_url
from pipeline.core.network import is_server, keep_loopback_off_proxies
from pipeline.core.project import artifact_folder, project_folder
from pipeline.core.sqlite import sqlite_path, sqlite_uri
from pipeline.tracking import sqlite_store
from pipeline.tracking.relocation import relocate
from pipeline.tracking.store_uri import ask_health, missing_package, no_answer, tracking_uri, unreachable

# statuses of a health check that a working server may return, since that check can need another login than the rest
OTHER_LOGIN_STATUSES = (401, 403)
SYSTEM_METRICS_INTERVAL_SECONDS = 2


def connect(uri: str | None = None) -> None:
    """Make MLflow use the store at `uri`, by default the one that the settings name; create or migrate its database.

    Raises TemporaryError where a server cannot be used, UserError where a file or a database cannot be used.
    """
    _set_variables()
    keep_loopback_off_proxies()
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    project = project_folder()
    uri = uri or tracking_uri(project)
    if message := relocate(uri, project):
        print(message, file=sys.stderr, flush=True)
    if redact_url(uri) != uri:
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # it would print the password too
    with store_errors(uri):
        if is_server(uri):
            check_server(uri)
        else:
            _ensure_database(uri)
    mlflow.set_tracking_uri(uri)
    mlflow.set_system_metrics_sampling_interval(SYSTEM_METRICS_INTERVAL_SECONDS)  # type: ignore[no-untyped-call]
    mlflow.set_system_metrics_samples_before_logging(1)  # type: ignore[no-untyped-call]


def _set_variables() -> None:
    """Set options of MLflow that exist as environment variables only; keep the user's value, except for the last."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # with the defaults, 7 retries of 120 s, the failure of a server would be noticed after minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ["MLFLOW_ENABLE_ASYNC_LOGGING"] = "false"  # `RunLogger` has its own thread, and must see the errors


def shorten_timeout() -> None:
    """Make MLflow wait only 2 seconds for a server, since SIGKILL may follow SIGTERM soon."""
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "2"


def check_server(uri: str) -> None:
    """Raise TemporaryError where no MLflow server answers at `uri`, UserError where that is no valid address."""
    creds = get_default_host_creds(uri)  # type: ignore[no-untyped-call]
    try:
        response = ask_health(
            uri,
            # the credentials that MLflow's own client uses, from the variables MLFLOW_TRACKING_…
            auth=(creds.username, creds.password) if creds.username and creds.password else None,
            headers={"Authorization": f"Bearer {creds.token}"} if creds.token and not creds.username else {},
            verify=creds.verify,
            cert=creds.client_cert_path,
        )
        if response.status_code not in OTHER_LOGIN_STATUSES:
            response.raise_for_status()
    except requests.RequestException as error:
        raise no_answer(uri, error) from None


def _ensure_database(uri: str) -> None:
    """Create or migrate the tables of a database; its artifacts are in the project, whatever the current folder is.

    Only one process at a time does this, since MLflow fails where two create the tables at once.
    """
    folder = artifact_folder(project_folder())
    folder.mkdir(parents=True, exist_ok=True)
    link_migrations()
    if path := sqlite_path(uri):
        sqlite_store.ensure_store(path, tool=sqlite_store.MLFLOW, migrate=migrate)
        return
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        SqlAlchemyStore(uri, folder.as_uri())  # type: ignore[no-untyped-call]


def migrate(copy: Path, _lock: int) -> None:
    """Migrate a database, or an empty file, to the schema of the installed MLflow."""
    uri = sqlite_uri(copy)
    engine = db_utils.create_sqlalchemy_engine(uri)  # type: ignore[no-untyped-call]
    if not db_utils._is_empty_database(engine):  # type: ignore[no-untyped-call]
        db_utils._upgrade_db(engine)  # type: ignore[no-untyped-call]
    engine.dispose()
    store = SqlAlchemyStore(uri, artifact_folder(project_folder()).as_uri())  # type: ignore[no-untyped-call]
    store.engine.dispose()


def link_migrations() -> None:
    """Let MLflow read its database migrations through a symbolic link if the path of the MLflow package has a `%`.

    The migration tool (Alembic) cannot read a path with a `%`. This replaces a function of MLflow in this process; the
    link is removed at the end of the process.
    """
    package = Path(db_utils._get_package_dir())  # type: ignore[no-untyped-call]
    if "%" in str(package):
        until_exit = ExitStack()
        atexit.register(until_exit.close)
        link = until_exit.enter_context(sqlite_store.without_percent(package))
        db_utils._get_package_dir = lambda: str(link)


@contextmanager
def store_errors(uri: str | None = None) -> Iterator[None]:
    """Report MLflow's failures in one line: TemporaryError for a server, UserError for a file or a database."""
    try:
        yield
    except (MlflowException, OSError, ValueError, ImportError) as error:
        if isinstance(error, UserError):
            raise
        uri = uri or mlflow.get_tracking_uri()
        if isinstance(error, ImportError):
            raise UserError(missing_package(uri, error.name)) from None
        kind = TemporaryError if is_server(uri) else UserError
        raise kind(unreachable(uri, error_reason(error, uri=uri))) from None


@contextmanager
def warn_on_failure(what: str) -> Iterator[None]:
    """Print a warning that begins with `what` where MLflow fails in the block; the program continues after it."""
    try:
        yield
    except (MlflowException, OSError) as error:
        print(f"warning: {what}: {error_reason(error)}", flush=True)


def error_reason(error: Exception, *, uri: str | None = None) -> str:
    """Return the message of an error in one line, without the password that the address of the store may have."""
    uri = uri or mlflow.get_tracking_uri()
    return first_line(error).replace(uri, redact_url(uri))


def store_md5() -> str:
    """Return a hash that identifies the connected store; its address itself may hold a password."""
    return bytes_md5(mlflow.get_tracking_uri().encode())
