"""Check MLFLOW_TRACKING_URI and the other variables that decide where a run is recorded, without importing MLflow."""

import shlex
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from urllib.request import url2pathname

import requests

from pipeline.core.errors import TemporaryError, UserError, redact_url
from pipeline.core.network import has_host, is_server
from pipeline.core.settings import get_settings
from pipeline.core.sqlite import sqlite_path, sqlite_uri

DEFAULT_STORE = "sqlite:///mlflow.db"
DATABASE_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql")
DATABASE_SUFFIXES = (".db", ".sqlite", ".sqlite3")
DATABRICKS = ("databricks", "databricks-uc", "uc")
ALLOWED_STORES = "sqlite:///PATH, postgresql://USER:PASSWORD@HOST/NAME (or mysql, mssql), http(s)://HOST:PORT"
CONNECT_SECONDS = 5.0


def tracking_uri(project: Path) -> str:
    """Return MLFLOW_TRACKING_URI, by default that of `mlflow.db` in the project.

    A relative path is relative to the project. Raises UserError where no run can be recorded there.
    """
    uri = get_settings().mlflow_tracking_uri or DEFAULT_STORE
    check_tracking_uri(uri)
    path = sqlite_path(uri)
    if path is None or path.is_absolute():
        return uri
    scheme, _, rest = uri.partition(":///")
    query = "".join(rest.partition("?")[1:])
    return sqlite_uri(project / path, driver=scheme.partition("+")[2]) + query


def check_tracking_uri(uri: str) -> None:
    """Raise UserError where `uri`, the value of MLFLOW_TRACKING_URI, names no store that can record runs."""
    scheme, separator, rest = uri.partition(":")
    dialect = scheme.partition("+")[0]
    if scheme.lower() == "file" or not (separator or uri in DATABRICKS):
        raise UserError(_file_store(uri))
    problem = None
    if is_server(uri):
        problem = None if has_host(uri) else "names no host"
    elif dialect == "sqlite":
        problem = _sqlite_problem(rest)
    elif dialect not in DATABASE_SCHEMES or not rest.startswith("//"):
        problem = "is no store that can record runs"
    if problem:
        raise UserError(
            f"MLFLOW_TRACKING_URI: found {redact_url(uri)!r}, which {problem}; allowed: {ALLOWED_STORES}; "
            "unset it to record into mlflow.db here"
        )


def _sqlite_problem(rest: str) -> str | None:
    """Return what is wrong with an address of a sqlite file, of which `rest` follows `sqlite:`, or None."""
    name, _, query = rest.partition("?")
    options = parse_qs(query)
    path = name.removeprefix("///")
    in_memory = "memory" in options.get("mode", []) or "memdb" in options.get("vfs", [])
    if in_memory or name in ("", "//", "///") or path.removeprefix("file:").startswith(":memory:"):
        return "is a database in memory, which is lost when the process ends"
    if path.startswith("file:"):
        return "has `file:` before the path, which MLflow takes for a folder: remove it and `uri=true`"
    return None if name.startswith("///") else "has no three slashes before the path"


def _file_store(uri: str) -> str:
    """Return the error message for a folder such as `./mlruns`, or for a database file without `sqlite:///`."""
    folder = Path(url2pathname(urlsplit(uri).path) if uri.lower().startswith("file:") else uri)
    if folder.is_file() or (folder.suffix in DATABASE_SUFFIXES and not folder.exists()):
        return (
            f"MLFLOW_TRACKING_URI: found {redact_url(uri)!r}, a file without the type of the database; "
            f"allowed: {ALLOWED_STORES}; set it to {sqlite_uri(folder)}"
        )
    line = (
        f"MLFLOW_TRACKING_URI: found {redact_url(uri)!r}, a file store, which MLflow no longer supports; "
        f"allowed: {ALLOWED_STORES}"
    )
    if not folder.is_dir():
        return f"{line}; unset it to record into mlflow.db here"
    database = f"sqlite:///{folder}.db"
    command = f"mlflow migrate-filestore --source {shlex.quote(str(folder))} --target {shlex.quote(database)}"
    return f"{line}; `{command}` copies its runs into a database: then set MLFLOW_TRACKING_URI={database}"


def unreachable(uri: str, reason: str) -> str:
    """Return the error message for a store that cannot be used, with the remedy."""
    scheme = uri.partition(":")[0].lower()
    if is_server(uri):
        remedy = "start that server"
    elif scheme.startswith("sqlite") or "://" not in uri:
        remedy = "check that its folder exists and can be written"
    else:
        remedy = "start that database, and check name and password"
    return (
        f"MLFLOW_TRACKING_URI is {redact_url(uri)}, which does not answer ({reason}); {remedy}, "
        "or unset the variable to record into mlflow.db here"
    )


def missing_package(uri: str, package: str | None) -> str:
    """Return the error message for a database whose driver is not installed."""
    extra = " (`make install EXTRAS=postgresql`)" if uri.lower().startswith("postgresql") else ""
    address = redact_url(uri)
    return f"MLFLOW_TRACKING_URI is {address}, for which the Python package {package} is missing; install it{extra}"


def check_recording(uri: str) -> None:
    """Raise UserError where a variable of MLflow would send runs to another place than this project reports."""
    settings = get_settings()
    if settings.mlflow_run_id:
        raise UserError(
            f"MLFLOW_RUN_ID: found {settings.mlflow_run_id!r}; not allowed: each training makes a run of its own, or "
            "resumes its own; unset it"
        )
    workspaces = {
        "MLFLOW_WORKSPACE": settings.mlflow_workspace,
        "MLFLOW_ENABLE_WORKSPACES": settings.mlflow_enable_workspaces,
    }
    for name, value in workspaces.items():
        if value.lower() not in ("", "0", "false") and not is_server(uri):
            raise UserError(
                f"{name}: found {value!r}; allowed only with an MLflow server (MLFLOW_TRACKING_URI=http://…), "
                f"not with {redact_url(uri)}; unset it"
            )


def check_connection(uri: str) -> None:
    """Raise TemporaryError where `uri` is that of a server and nothing answers there; other stores are not checked.

    `check_server` later checks that it is MLflow and accepts the login and the certificates.
    """
    if not is_server(uri):
        return
    try:
        ask_health(uri)
    except requests.exceptions.SSLError:  # MLflow's client may have certificates of its own
        return
    except requests.RequestException as error:
        raise no_answer(uri, error) from None


def ask_health(uri: str, **login: Any) -> requests.Response:
    """Return the answer of an MLflow server's health check; `login` is passed to `requests.get`."""
    return requests.get(f"{uri.rstrip('/')}/health", timeout=CONNECT_SECONDS, **login)


def no_answer(uri: str, error: requests.RequestException) -> UserError | TemporaryError:
    """Return the error to raise where `ask_health` failed: UserError for an invalid address, else TemporaryError."""
    kind = UserError if isinstance(error, requests.exceptions.InvalidURL) else TemporaryError
    return kind(unreachable(uri, type(error).__name__))
