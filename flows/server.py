"""The project's own Prefect server: on loopback, started once in the background, used by every later flow run.

`python -m flows.server start|stop|status`. Prefect takes 17-23 s to start one for
each flow run; this takes about 10 s once.
"""

import argparse
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from flows import PROJECT
from pipeline.artifacts import write_json
from pipeline.errors import TemporaryError, UserError, report_errors
from pipeline.processes import lives, start_of
from pipeline.sqlite import sqlite_uri

DEFAULT_PORT = 4200
START_SECONDS = 90
"""A slow machine's first start, which makes the database, stays below this."""
USERS = {"flows.worker": "make worker", "flows.ui": "make ui"}
USERS_SECONDS = 50
"""A worker that ends lets its flow runs end."""
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Server:
    """A server process of ours; `started` (`pipeline.processes.start_of`) tells it from a later owner of its pid."""

    pid: int
    started: str
    port: int

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def api_url(self) -> str:
        return f"{self.address}/api"


def running(project: Path = PROJECT) -> Server | None:
    """The project's server if its process lives and answers."""
    server = _recorded(project)
    return server if server and answers(f"{server.api_url}/health") else None


def start(project: Path = PROJECT, *, port: int | None = None) -> tuple[Server, bool]:
    """The running server, or a new one, and whether it is new.

    A new one takes `port` and no other; by default PREFECT_PORT, else 4200 or the next that is free.
    Raises UserError where the port is in use, TemporaryError where the server does not come up.
    """
    folder = project / ".prefect"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "server.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two flow runs started together, one starts the server
        if server := running(project):
            return server, False
        stop(project)
        return _launch(project, port or _wanted_port()), True


def stop(project: Path = PROJECT) -> Server | None:
    """End the project's server; returns it where there was one."""
    server = _recorded(project)
    if server:
        end_group(server.pid)
    (project / ".prefect" / "server.json").unlink(missing_ok=True)
    return server


def forget_dead(project: Path = PROJECT, *, remove: bool = True) -> bool:
    """Whether the server on record is dead; removes such a record."""
    folder = project / ".prefect"
    if not (folder / "server.json").exists():
        return False
    with (folder / "server.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # while one is being started, its record is not whole
        dead = (folder / "server.json").exists() and _recorded(project) is None
        if dead and remove:
            (folder / "server.json").unlink()
        return dead


def _recorded(project: Path) -> Server | None:
    """The server on record if that very process lives."""
    try:
        server = Server(**json.loads((project / ".prefect" / "server.json").read_text(encoding="utf-8")))
        return server if lives(server.pid, started=str(server.started)) else None  # once it was a number
    except (OSError, ValueError, TypeError):
        return None


def _wanted_port() -> int:
    if "PREFECT_PORT" in os.environ:
        return port_variable("PREFECT_PORT", DEFAULT_PORT)
    return next(port for port in range(DEFAULT_PORT, DEFAULT_PORT + 100) if is_free(port))


def _launch(project: Path, port: int) -> Server:
    require_free(port, variable="PREFECT_PORT")
    log = project / ".prefect" / "server.log"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PREFECT_API_URL", "PREFECT_API_KEY")
    }
    environment |= {"PREFECT_HOME": str(project / ".prefect"), "PREFECT_SERVER_API_PORT": str(port)}
    database = project / ".prefect" / "prefect.db"
    if (uri := sqlite_uri(database, driver="aiosqlite")) != f"sqlite+aiosqlite:///{database}":
        environment.setdefault("PREFECT_API_DATABASE_CONNECTION_URL", uri)  # Prefect's own default is not encoded
    process = launch(["prefect", "server", "start", "--host", "127.0.0.1"], log=log, environment=environment)
    server = Server(process.pid, start_of(process.pid), port)
    write_json(project / ".prefect" / "server.json", asdict(server))
    wait_for(f"{server.api_url}/health", process, name="the Prefect server", log=log)
    return server


def launch(module: list[str], *, log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start `python -m module` in a session of its own: closing the terminal does not end it."""
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *module],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for(url: str, process: subprocess.Popen[bytes], *, name: str, log: Path) -> None:
    """Return once `url` answers; raises TemporaryError where it does not. On any exception the process is ended."""
    deadline = time.monotonic() + START_SECONDS
    try:
        while not answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise TemporaryError(f"{name} did not start: {_last_line(log)}; see {log}")
            time.sleep(0.1)
    except BaseException:
        end_group(process.pid)
        raise


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def end_group(pid: int, *, grace_seconds: float = 10) -> None:
    """End a process that leads a group, and the group: SIGTERM, time, SIGKILL."""
    with suppress(psutil.NoSuchProcess, ProcessLookupError, psutil.TimeoutExpired):
        process = psutil.Process(pid)
        os.killpg(pid, signal.SIGTERM)
        process.wait(grace_seconds)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def answers(url: str) -> bool:
    """Whether an HTTP GET of `url` succeeds within 2 s."""
    try:
        with _opener.open(url, timeout=2) as response:
            return bool(response.status == 200)
    except (OSError, ValueError):
        return False


def is_free(port: int) -> bool:
    """Whether a server could listen on the loopback port."""
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def require_free(port: int, *, variable: str) -> None:
    """Raises UserError where something listens on the port."""
    if not is_free(port):
        raise UserError(f"port {port} is in use; stop what uses it, or choose another one with {variable}=…")


def port_variable(name: str, default: int) -> int:
    """A port number from the environment."""
    text = os.environ.get(name, "") or str(default)
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise UserError(f"{name}: found {text!r}; allowed: a port number, 1 to 65535")
    return int(text)


def _start() -> str:
    found, new = start()
    return f"Prefect server {'started' if new else 'already running'}: {found.address}; `make stop` ends it"


def _stop() -> str:
    lines = [f"{name} ended: process {pid}" for pid, name in _end_users()]
    found = stop()
    return "\n".join([*lines, f"Prefect server stopped: {found.address}" if found else NONE_RUNNING])


def _end_users(project: Path = PROJECT) -> Iterator[tuple[int, str]]:
    """End the project's worker and pages, which need the server; gives process and name of each."""
    for process in psutil.process_iter(["cwd", "cmdline"]):
        name = next((USERS[word] for word in process.info["cmdline"] or [] if word in USERS), None)
        if name and process.info["cwd"] == str(project):
            with suppress(psutil.NoSuchProcess):
                process.terminate()
                psutil.wait_procs([process], timeout=USERS_SECONDS)
            yield process.pid, name


def _status() -> str:
    found = running()
    return f"Prefect server running: {found.address}, process {found.pid}" if found else NONE_RUNNING


NONE_RUNNING = "no Prefect server of this project is running"
ACTIONS = {"start": _start, "stop": _stop, "status": _status}


def main() -> None:
    """Start, stop or show the project's server."""
    parser = argparse.ArgumentParser(prog="python -m flows.server", description="The project's Prefect server.")
    parser.add_argument("action", choices=ACTIONS)
    action = parser.parse_args().action
    with report_errors():
        print(ACTIONS[action]())


if __name__ == "__main__":
    main()
