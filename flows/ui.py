"""Serve MLflow's and Prefect's pages on loopback until Ctrl-C: `make ui`, or `python -m flows.ui`."""

import os
import signal
import subprocess
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import requests

from flows import PROJECT, ports, server
from flows.settings import configured_server
from pipeline.artifacts import write_json
from pipeline.core.errors import UserError, escape_control_chars, redact_url, report_errors
from pipeline.core.network import LOOPBACK, is_server
from pipeline.core.processes import start_of
from pipeline.core.project import artifact_folder
from pipeline.core.sqlite import sqlite_path
from pipeline.tracking.links import EXPERIMENTS_PAGE, VIEW_TAG, run_page, runs_page
from pipeline.tracking.relocation import relocate
from pipeline.tracking.sqlite_store import MLFLOW, is_current, without_percent
from pipeline.tracking.store_uri import tracking_uri

MLFLOW_PORT = 5000
MAX_EXPERIMENTS = 5  # whose tables of runs are printed
# variables that would let our MLflow server serve other runs, or at another address: they are not passed on to it
MLFLOW_VARIABLES_NOT_PASSED_ON = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_BACKEND_STORE_URI",
    "MLFLOW_READ_REPLICA_BACKEND_STORE_URI",
    "MLFLOW_REGISTRY_STORE_URI",
    "MLFLOW_DEFAULT_ARTIFACT_ROOT",
    "MLFLOW_ARTIFACTS_DESTINATION",
    "MLFLOW_ARTIFACTS_ONLY",
    "MLFLOW_SERVE_ARTIFACTS",
    "MLFLOW_STATIC_PREFIX",
    "MLFLOW_GUNICORN_OPTS",
    "MLFLOW_UVICORN_OPTS",
    "MLFLOW_HOST",
    "MLFLOW_PORT",
    "MLFLOW_WORKERS",
    "MLFLOW_WORKSPACE",
    "MLFLOW_ENABLE_WORKSPACES",
    "MLFLOW_WORKSPACE_STORE_URI",
)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def mlflow_page(run_id: str, *, experiment_id: str | None, artifact: str | None = None, project: Path = PROJECT) -> str:
    """Return the address of the page of a run, or of an artifact of the run.

    It is on the server that MLFLOW_TRACKING_URI names, else on that of `make ui`.
    """
    page = run_page(run_id, experiment_id=experiment_id, artifact=artifact)
    uri = tracking_uri(project)
    if is_server(uri):
        return _address(uri, page)
    found = server.read_record(mlflow_record_path(project))
    port = found.port if found else _named_port() or MLFLOW_PORT
    return _address(f"http://127.0.0.1:{port}", page)


def _address(server_address: str, page: str) -> str:
    """Return the address of a page of an MLflow server, without the password that the server's address may have."""
    return f"{redact_url(server_address).rstrip('/')}/{page}"


def is_mlflow_served(project: Path) -> bool:
    """Return whether the server of `mlflow_page` is running; a server that MLFLOW_TRACKING_URI names is not asked."""
    return is_server(tracking_uri(project)) or server.read_record(mlflow_record_path(project)) is not None


def mlflow_record_path(project: Path) -> Path:
    """Return the path of the record of the MLflow server that `make ui` or the service has started."""
    return project / ".prefect" / "mlflow.json"


def _named_port() -> int | None:
    """Return the port that MLFLOW_PORT names, or None."""
    return ports.port_variable("MLFLOW_PORT", MLFLOW_PORT) if os.environ.get("MLFLOW_PORT") else None


@contextmanager
def mlflow_server(project: Path, *, port: int | None = None) -> Iterator[str]:
    """Start a server for the project's MLflow store, yield its address, and stop it at the end.

    It listens on `port`, by default on MLFLOW_PORT, else on 5000 or the next free port. Raises UserError where the port
    is in use, TemporaryError where the server does not start.
    """
    uri = tracking_uri(project)
    if is_server(uri):
        yield redact_url(uri)
        return
    _check_host()
    _ensure_store(uri, project=project)
    if line := relocate(uri, project):
        print(line, flush=True)
    packages = Path(sysconfig.get_path("purelib"))
    with without_percent(packages) as plain:
        # a path without `%`, from which MLflow can load its migrations
        variables = {} if plain == packages else {"PYTHONPATH": str(plain)}
        start = partial(_start_mlflow, project, uri, variables)
        process, port = ports.start_on_port(
            start, named=port or _named_port(), default=MLFLOW_PORT, variable="MLFLOW_PORT"
        )
        try:
            path = mlflow_record_path(project)
            record = server.Server(process.pid, start_of(process.pid), port, str(path.parent.resolve()))
            write_json(path, asdict(record))
            yield record.address
        finally:
            server.end_group(process.pid)


def _check_host() -> None:
    """Raise UserError where MLFLOW_HOST is not loopback."""
    host = os.environ.get("MLFLOW_HOST") or LOOPBACK[0]
    if host not in LOOPBACK:
        raise UserError(
            f"MLFLOW_HOST: found {host!r}; allowed: {LOOPBACK[0]}, since the project's own server listens on loopback "
            "only; unset it, or start a server yourself and set MLFLOW_TRACKING_URI"
        )


def _start_mlflow(
    project: Path, uri: str, variables: Mapping[str, str], port: int
) -> tuple[subprocess.Popen[bytes], int]:
    """Start the server and return its process and port once it answers; raises PortTakenError if the port was taken."""
    command = ["mlflow", "server", "--artifacts-destination", artifact_folder(project).as_uri()]
    log = project / ".prefect" / "mlflow.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in MLFLOW_VARIABLES_NOT_PASSED_ON and not name.startswith(("_MLFLOW_", "MLFLOW_RUN_"))
    }
    # no job queue, which would be eight processes; the store's address, which may hold a password, is not passed as an
    # argument, which all users of the machine could read
    environment |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_BACKEND_STORE_URI": uri, **variables}
    process = server.launch(
        [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"], log=log, environment=environment
    )
    health = f"http://127.0.0.1:{port}/health"
    server.wait_for(health, process, name="the MLflow server", log=log, variable="MLFLOW_PORT")
    return process, port


def _ensure_store(uri: str, *, project: Path) -> None:
    """Create or migrate a sqlite store; the server would create it in place, and would refuse an older schema."""
    path = sqlite_path(uri)
    if path and not is_current(path, tool=MLFLOW):
        from pipeline.tracking.store import connect  # noqa: PLC0415  # MLflow takes 2 s to import

        with chdir(project):
            connect()


@contextmanager
def prefect_server(project: Path) -> Iterator[str]:
    """Yield the address of the project's Prefect server; if this starts the server, it is stopped at the end."""
    if configured := configured_server():
        yield f"{configured.page} (yours, from {configured.source})"
        return
    found, new = server.start(project)
    try:
        yield found.address if new else f"{found.address} (was running already, keeps running; `make stop` stops it)"
    finally:
        if new:
            server.stop(project)


def _tables_of_runs(address: str) -> list[tuple[str, str]]:
    """Return name and page of the newest experiments that have a table of runs with metrics; none if MLflow fails."""
    try:
        found = requests.get(
            f"{address}/api/2.0/mlflow/experiments/search",
            params={"max_results": str(MAX_EXPERIMENTS), "order_by": "last_update_time DESC"},
            timeout=10,
        ).json()["experiments"]
        with_view = [each for each in found if VIEW_TAG in {tag["key"] for tag in each.get("tags", [])}]
        return [(each["name"], _address(address, runs_page(each["experiment_id"]))) for each in with_view]
    except (requests.RequestException, ValueError, KeyError):  # such as a server with logins
        return []


def main() -> None:
    """Start both servers, print their addresses, and wait for a signal."""
    for number in SIGNALS:
        signal.signal(number, _leave)
    with report_errors(), mlflow_server(PROJECT) as mlflow, prefect_server(PROJECT) as prefect:
        page = _address(mlflow, EXPERIMENTS_PAGE)
        owner = " (yours, from MLFLOW_TRACKING_URI)" if is_server(tracking_uri(PROJECT)) else ""
        print(f"MLflow:  {page}{owner}")
        for name, runs in _tables_of_runs(mlflow):
            print(f"         {escape_control_chars(name)}: {runs}")
        # within its pages, MLflow falls back to the mode GenAI until the switch in the side menu has been used
        print('         If MLflow shows GenAI, press "Model training" in the side menu once; the browser remembers it.')
        print(f"Prefect: {prefect}\nCtrl-C stops the servers that this command has started.", flush=True)
        signal.pause()


def _leave(_number: int, _frame: object) -> None:
    """Exit through the open `with` blocks, which stop the servers; a second signal must not interrupt them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise SystemExit(0)


if __name__ == "__main__":
    main()
