"""MLflow's and Prefect's pages on loopback, until Ctrl-C: `make ui`, or `python -m flows.ui`."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows import PROJECT, server
from pipeline.errors import report_errors, shown
from pipeline.project import tracking_uri
from pipeline.relocation import relocate

MLFLOW_PORT = 5000
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def mlflow_page(run_id: str, *, project: Path = PROJECT) -> str:
    """Address of a run's page: on the server that MLFLOW_TRACKING_URI names, else on that of `make ui`."""
    uri = tracking_uri(project)
    served = uri.startswith(("http://", "https://"))
    address = (
        shown(uri).rstrip("/") if served else f"http://127.0.0.1:{server.port_variable('MLFLOW_PORT', MLFLOW_PORT)}"
    )
    return f"{address}/#/runs/{run_id}"


@contextmanager
def mlflow_server(project: Path, *, port: int) -> Iterator[str]:
    """Serve the project's MLflow store; gives its address, and ends it on leaving.

    Raises UserError where the port is in use, TemporaryError where the server does not come up.
    """
    uri = tracking_uri(project)
    if uri.startswith(("http://", "https://")):
        yield f"{shown(uri)} (yours, from MLFLOW_TRACKING_URI)"
        return
    if line := relocate(uri, project):
        print(line, flush=True)
    server.require_free(port, variable="MLFLOW_PORT")
    command = ["mlflow", "server", "--artifacts-destination", str(project / "mlartifacts")]
    log = project / ".prefect" / "mlflow.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    # without MLFLOW_TRACKING_URI, or the server would ask another one; without its job queue, which is eight processes
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    # the store's address not as an argument, which all users of the machine could read, password included
    environment |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_BACKEND_STORE_URI": uri}
    process = server.launch(
        [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"], log=log, environment=environment
    )
    try:
        address = f"http://127.0.0.1:{port}"
        server.wait_for(f"{address}/health", process, name="the MLflow server", log=log)
        yield address
    finally:
        server.end_group(process.pid)


@contextmanager
def prefect_server(project: Path) -> Iterator[str]:
    """The project's Prefect server; ended on leaving if it was not there before."""
    if url := os.environ.get("PREFECT_API_URL"):
        yield f"{shown(url).removesuffix('/api')} (yours, from PREFECT_API_URL)"
        return
    found, new = server.start(project, port=server.port_variable("PREFECT_PORT", server.DEFAULT_PORT))
    try:
        yield found.address if new else f"{found.address} (was running, stays; `make stop` ends it)"
    finally:
        if new:
            server.stop(project)


def main() -> None:
    """Start both, print their addresses, wait."""
    for number in SIGNALS:
        signal.signal(number, _leave)
    with report_errors():
        port = server.port_variable("MLFLOW_PORT", MLFLOW_PORT)
        with mlflow_server(PROJECT, port=port) as mlflow, prefect_server(PROJECT) as prefect:
            print(f"MLflow:  {mlflow}\nPrefect: {prefect}\nCtrl-C stops them.", flush=True)
            signal.pause()


def _leave(_number: int, _frame: object) -> None:
    """Leave by the open `with` blocks; a second signal must not interrupt them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise SystemExit(0)


if __name__ == "__main__":
    main()
