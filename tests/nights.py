"""A project whose nights fail, and a webhook receiver for what is then sent.

`python -m tests.nights` shows the messages of each kind of failure and after how many seconds they came, with the times
that users have; it takes about 7 minutes.
"""

import http.server
import json
import os
import queue
import shutil
import signal
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
from prefect import get_client
from prefect.client.schemas.objects import State
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from prefect.states import Scheduled

from flows import server
from flows.deployments import NIGHTLY
from flows.ports import free_port
from tests.conftest import PROJECT, make_prefect_store
from tests.test_flows import make_project, wait_until

TOKEN = "a-secret-token"  # part of the address of the webhook


class Receiver:
    """A webhook receiver on loopback; `messages` has the text of each message that came and its time."""

    def __init__(self) -> None:
        self.messages: queue.Queue[tuple[str, float]] = queue.Queue()
        handler = type("Handler", (_Handler,), {"messages": self.messages})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/{TOKEN}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def next(self, seconds: float = 600) -> str:
        """Return the text of the next message; raises queue.Empty where none comes within as many seconds."""
        return self.messages.get(timeout=seconds)[0]


class _Handler(http.server.BaseHTTPRequestHandler):
    messages: queue.Queue[tuple[str, float]]

    def do_POST(self) -> None:
        text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"]
        self.send_response(200)
        self.end_headers()
        self.messages.put((text, time.monotonic()))

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


class MailReceiver:
    """A mail server on loopback that takes every mail; `messages` has the text of each mail, headers included."""

    def __init__(self) -> None:
        self.messages: queue.Queue[str] = queue.Queue()
        handler = type("Handler", (_MailHandler,), {"messages": self.messages})
        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler)
        self.url = f"mailto://127.0.0.1:{self._server.server_address[1]}?from=night@example.org&to=me@example.org"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()


class _MailHandler(socketserver.StreamRequestHandler):
    messages: queue.Queue[str]

    def handle(self) -> None:
        self.wfile.write(b"220 ready\r\n")
        for line in self.rfile:
            if line.upper().startswith(b"DATA"):
                self.wfile.write(b"354 go\r\n")
                lines = [text.decode().rstrip("\r\n") for text in iter(self.rfile.readline, b".\r\n")]
                self.messages.put("\n".join(lines))
            self.wfile.write(b"250 ok\r\n")


class Site:
    """A project with toy stages, its Prefect server and its worker, which `python -m flows.worker` runs."""

    def __init__(self, folder: Path, environment: Mapping[str, str], *, stores: Path) -> None:
        self.folder, self.project = folder, make_project(folder)
        shutil.copy(PROJECT / "prefect.yaml", self.project)
        (self.project / ".prefect").mkdir()
        shutil.copy(stores / "prefect.db", self.project / ".prefect")
        self.environment = {**os.environ, "TOY": str(folder), "PREFECT_HOME": str(self.project / ".prefect")}
        self.environment |= {"PREFECT_PORT": str(free_port()), "PREFECT_API_URL": "", **environment}
        self.environment.pop("MLFLOW_TRACKING_URI", None)

    def start_worker(self) -> None:
        """Start the worker, and wait until it takes runs."""
        log = self.folder / "worker.log"
        with log.open("w") as file:
            self.worker = subprocess.Popen(
                [sys.executable, "-m", "flows.worker"], cwd=self.project, env=self.environment, stdout=file, stderr=file
            )
        wait_until(lambda: "started!" in log.read_text() or self.worker.poll() is not None)
        assert self.worker.poll() is None, log.read_text()

    def processes(self) -> list[psutil.Process]:
        """Return the processes of Prefect's worker and of its flow runs, the worker first."""
        children = psutil.Process(self.worker.pid).children()
        [worker] = [one for one in children if {"worker", "start"} <= set(one.cmdline())]
        return [worker, *worker.children(recursive=True)]

    def stop_worker(self) -> None:
        self.worker.send_signal(signal.SIGINT)
        self.worker.wait()

    def hold(self, stage: str, *, waits: bool = False, status: int | None = None) -> None:
        """Let a stage wait, or end with an exit status."""
        for name, value in {"wait": "" if waits else None, "exit": str(status) if status else None}.items():
            path = self.folder / f"{stage}.{name}"
            path.unlink(missing_ok=True)
            if value is not None:
                path.write_text(value)
        (self.folder / "ran").unlink(missing_ok=True)

    def begins(self, stage: str) -> None:
        """Wait until a stage runs."""
        ran = self.folder / "ran"
        wait_until(lambda: ran.exists() and stage in ran.read_text().split())

    def start_run(self, name: str | None = None, *, deployment: str = NIGHTLY, state: State[Any] | None = None) -> UUID:
        """Schedule a run for now, or create it in another state, and return its id; its `train` is not cached.

        A run that starts gets another name: see `flows.flow_run.name_flow_run`.
        """
        overrides = {"train.epochs": int(time.time()) % 10_000}
        with get_client(sync_client=True) as client:
            found = client.read_deployment_by_name(deployment)
            return client.create_flow_run_from_deployment(
                found.id, state=state or Scheduled(), name=name, parameters={"overrides": overrides}
            ).id


@contextmanager
def open_site(folder: Path, environment: Mapping[str, str], *, stores: Path) -> Iterator[Site]:
    """Yield a project whose worker runs; stop worker and server at the end."""
    site = Site(folder, environment, stores=stores)
    try:
        site.start_worker()
        found = server.running(site.project)
        assert found
        with temporary_settings({PREFECT_API_URL: found.api_url, PREFECT_HOME: site.project / ".prefect"}):
            yield site
    finally:
        site.stop_worker()
        server.stop(site.project)


def kill_worker(site: Site) -> None:
    """Kill Prefect's worker, which `flows.worker` has started."""
    site.processes()[0].kill()
    site.worker.wait()


def kill_all(site: Site) -> None:
    """Kill the worker and its flow runs at once, as when the machine loses its power."""
    for process in [*site.processes(), psutil.Process(site.worker.pid)]:
        process.kill()
    site.worker.wait()


def show(what: str, receiver: Receiver, start: float) -> None:
    """Wait for the next message, and print it with the seconds since `start`."""
    text, moment = receiver.messages.get(timeout=600)
    print(f"--- {what}: after {moment - start:.0f} s\n{text}\n", flush=True)


def show_all(site: Site, receiver: Receiver) -> None:
    """Cause one failure after the other, and print what is sent."""
    site.hold("train", status=2)
    site.start_run()
    site.begins("train")
    show("a training fails", receiver, time.monotonic())
    for what, kill in {"the worker is killed": kill_worker, "worker and run are killed": kill_all}.items():
        if site.worker.poll() is not None:
            site.start_worker()
        site.hold("train", waits=True)
        site.start_run()
        site.begins("train")
        kill(site)
        show(what, receiver, time.monotonic())
    site.start_run("missed")
    show("no worker runs at the scheduled time", receiver, time.monotonic())


def main() -> None:
    """Print the message of each kind of failure, and the seconds until it came."""
    receiver = Receiver()
    with tempfile.TemporaryDirectory() as parent:
        stores, folder = Path(parent) / "stores", Path(parent) / "site"
        for new in (stores, folder):
            new.mkdir()
        make_prefect_store(stores)
        with open_site(folder, {"PIPELINE_NOTIFY_WEBHOOK": receiver.url}, stores=stores) as site:
            show_all(site, receiver)


if __name__ == "__main__":
    main()
