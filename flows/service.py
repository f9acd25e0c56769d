"""Serve Prefect or MLflow in the foreground, for systemd: `python -m flows.service prefect` or `… mlflow`.

The units in docs/systemd/ run it. It reports to systemd once the server answers (`Type=notify`), ends the server at
SIGTERM, and ends with status 75 where the server has ended by itself, so that systemd starts it again.
"""

import argparse
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import psutil

from flows import PROJECT, server
from flows.ui import mlflow_record_path, mlflow_server
from pipeline.core.errors import TemporaryError, UserError, redact_url, report_errors
from pipeline.core.network import is_server
from pipeline.tracking.store_uri import tracking_uri


@contextmanager
def _prefect(project: Path) -> Iterator[server.Server]:
    """Start the Prefect server, or use the one that a flow run left running; stop it at the end of the block."""
    found, _ = server.start(project)
    try:
        yield found
    finally:
        server.stop(project)


@contextmanager
def _mlflow(project: Path) -> Iterator[server.Server]:
    """Start the MLflow server and stop it at the end of the block.

    Raises UserError where MLFLOW_TRACKING_URI names another server.
    """
    uri = tracking_uri(project)
    if is_server(uri):
        raise UserError(
            f"MLFLOW_TRACKING_URI: found {redact_url(uri)}, which is a server already; allowed here: a database; "
            "disable this service, or unset the variable"
        )
    with mlflow_server(project):
        found = server.read_record(mlflow_record_path(project))
        if found is None:
            raise TemporaryError("the MLflow server ended as soon as it had started; see .prefect/mlflow.log")
        yield found


SERVERS: dict[str, Callable[[Path], AbstractContextManager[server.Server]]] = {"prefect": _prefect, "mlflow": _mlflow}


def _notify_ready(address: str | None) -> None:
    """Report to the service manager, if there is one, that the server answers; `address` is its NOTIFY_SOCKET."""
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.connect(f"\0{address[1:]}" if address.startswith("@") else address)
            manager.send(b"READY=1")


def _leave(_number: int, _frame: object) -> NoReturn:
    """Exit through the open `with` blocks; a second signal must not interrupt them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise SystemExit(0)


def main() -> None:
    """Serve until SIGTERM, or until the server ends."""
    parser = argparse.ArgumentParser(prog="python -m flows.service", description=__doc__)
    parser.add_argument("server", choices=SERVERS)
    name = parser.parse_args().server
    manager = os.environ.pop("NOTIFY_SOCKET", None)  # the server itself must not write to it
    with report_errors():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _leave)
        with SERVERS[name](PROJECT) as found:
            print(f"{name}: {found.address}", flush=True)
            _notify_ready(manager)
            with suppress(psutil.NoSuchProcess):
                psutil.Process(found.pid).wait()
            raise TemporaryError(f"the {name} server, process {found.pid}, ended by itself; see its log in .prefect/")


if __name__ == "__main__":
    main()
