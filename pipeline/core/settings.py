"""Environment variables that decide where a run is recorded, MLflow's and those of proxies: checked before use.

docs/settings.md lists them all, with their effect here.
"""

import os
import shlex
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from urllib.request import url2pathname

from pipeline.core.errors import UserError, shown
from pipeline.core.sqlite import sqlite_path, sqlite_uri

DEFAULT_STORE = "sqlite:///mlflow.db"
SERVER_SCHEMES = ("http", "https")
DATABASE_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql")
DATABASE_SUFFIXES = (".db", ".sqlite", ".sqlite3")
DATABRICKS = ("databricks", "databricks-uc", "uc")
ALLOWED_STORES = "sqlite:///PATH, postgresql://USER:PASSWORD@HOST/NAME (or mysql, mssql), http(s)://HOST:PORT"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
PROXIES = ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY")


def tracking_uri(project: Path) -> str:
    """Return MLFLOW_TRACKING_URI, by default the project's own sqlite file; a relative file is one in the project.

    Raises UserError where no run can be recorded there.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "") or DEFAULT_STORE
    check_tracking_uri(uri)
    path = sqlite_path(uri)
    if path is None or path.is_absolute():
        return uri
    scheme, _, rest = uri.partition(":///")
    query = "".join(rest.partition("?")[1:])
    return sqlite_uri(project / path, driver=scheme.partition("+")[2]) + query


def is_server(uri: str) -> bool:
    """Whether the MLflow store is a server, not a database."""
    return uri.partition(":")[0].lower() in SERVER_SCHEMES


def check_tracking_uri(uri: str) -> None:
    """Raise UserError where MLFLOW_TRACKING_URI names no store that a run can be recorded in."""
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
        problem = "is no store that runs can be recorded in here"
    if problem:
        raise UserError(
            f"MLFLOW_TRACKING_URI: found {shown(uri)!r}, which {problem}; allowed: {ALLOWED_STORES}; "
            "unset it to record into mlflow.db here"
        )


def has_host(uri: str) -> bool:
    """Whether the URL names a host, and a port only if that is a number."""
    try:
        parts = urlsplit(uri)
        return bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a bracket that is not closed, a port that is no number
        return False


def _sqlite_problem(rest: str) -> str | None:
    name, _, query = rest.partition("?")
    options = parse_qs(query)
    path = name.removeprefix("///")
    in_memory = "memory" in options.get("mode", []) or "memdb" in options.get("vfs", [])
    if in_memory or name in ("", "//", "///") or path.removeprefix("file:").startswith(":memory:"):
        return "is a database in memory: it would end with the process"
    if path.startswith("file:"):
        return "has `file:` before the path, which MLflow would take for a folder: leave it and `uri=true` out"
    return None if name.startswith("///") else "lacks the three slashes before the path"


def _file_store(uri: str) -> str:
    """One line on a folder such as `./mlruns`, which MLflow keeps in maintenance mode: no new run goes there.

    Or on a file, which is meant to be a database.
    """
    folder = Path(url2pathname(urlsplit(uri).path) if uri.lower().startswith("file:") else uri)
    if folder.is_file() or (folder.suffix in DATABASE_SUFFIXES and not folder.exists()):
        return (
            f"MLFLOW_TRACKING_URI: found {shown(uri)!r}, a file without the kind of database; "
            f"allowed: {ALLOWED_STORES}; set it to {sqlite_uri(folder)}"
        )
    line = (
        f"MLFLOW_TRACKING_URI: found {shown(uri)!r}, a file store, which MLflow no longer supports; "
        f"allowed: {ALLOWED_STORES}"
    )
    if not folder.is_dir():
        return f"{line}; unset it to record into mlflow.db here"
    database = f"sqlite:///{folder}.db"
    command = f"mlflow migrate-filestore --source {shlex.quote(str(folder))} --target {shlex.quote(database)}"
    return f"{line}; `{command}` copies its runs into a database: then set MLFLOW_TRACKING_URI={database}"


def unreachable(uri: str, reason: str) -> str:
    """One line on a store that cannot be used, with what can be done about it."""
    scheme = uri.partition(":")[0].lower()
    if scheme in SERVER_SCHEMES:
        remedy = "start that server"
    elif scheme.startswith("sqlite") or "://" not in uri:
        remedy = "check that its folder exists and can be written"
    else:
        remedy = "start that database, and check name and password"
    return (
        f"MLFLOW_TRACKING_URI is {shown(uri)}, which does not answer ({reason}); {remedy}, "
        "or unset the variable to record into mlflow.db here"
    )


def missing_package(uri: str, package: str | None) -> str:
    """One line on a database whose driver is not installed."""
    extra = " (`make install EXTRAS=postgresql`)" if uri.lower().startswith("postgresql") else ""
    return f"MLFLOW_TRACKING_URI is {shown(uri)}, for which the Python package {package} is missing; install it{extra}"


def check_recording(uri: str) -> None:
    """Raise UserError where a variable of MLflow would have runs recorded elsewhere than this project says."""
    if run_id := os.environ.get("MLFLOW_RUN_ID"):
        raise UserError(
            f"MLFLOW_RUN_ID: found {run_id!r}; not allowed: each training makes a run of its own, or resumes its own; "
            "unset it"
        )
    for name in ("MLFLOW_WORKSPACE", "MLFLOW_ENABLE_WORKSPACES"):
        value = os.environ.get(name, "")
        if value.lower() not in ("", "0", "false") and not is_server(uri):
            raise UserError(
                f"{name}: found {value!r}; allowed only with an MLflow server (MLFLOW_TRACKING_URI=http://…), "
                f"not with {shown(uri)}; unset it"
            )


def keep_loopback_off_proxies() -> None:
    """Have NO_PROXY and no_proxy name loopback, where our servers are, beside the hosts that they name already.

    Other addresses, such as those of downloads, go through the user's proxies as before.
    """
    found = [os.environ.get(name, "") for name in ("no_proxy", "NO_PROXY")]  # clients read one of the two
    if not any([*found, *(os.environ.get(name) or os.environ.get(name.lower()) for name in PROXIES)]):
        return
    hosts = (_plain_host(host) for text in found for host in text.split(","))
    everything = dict.fromkeys(filter(None, [*hosts, *LOOPBACK]))
    value = "*" if "*" in everything else ",".join(everything)
    os.environ |= {"NO_PROXY": value, "no_proxy": value}


def _plain_host(host: str) -> str:
    """An entry of NO_PROXY as all clients understand it: Prefect's client, httpx, fails on `[::1]` and `fd00::/8`."""
    host = host.strip().removeprefix("[").removesuffix("]")
    return "" if ":" in host and "/" in host and "://" not in host else host
