"""The project's own Prefect server: it runs on loopback in the background, and all flow runs use it.

`python -m flows.server start|stop|status`. Its start takes about 10 s once. Without it, Prefect would start a temporary
server for each flow run, which takes 17 to 23 s.
"""

import argparse
import fcntl
import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from flows import PROJECT, ports
from flows.prefect_database import ensure_database
from pipeline.artifacts import write_json
from pipeline.core.errors import TemporaryError, report_errors
from pipeline.core.processes import is_alive, start_of

DEFAULT_PORT = 4200
START_SECONDS = 90  # enough for a slow machine's first start, which creates the database
ANSWER_SECONDS = 20  # enough for a server on an overloaded machine
# a setting that the server does not use, but shows in its API: it carries the token by which we recognize our server
RECOGNITION_VARIABLE = "PREFECT_DEPLOYMENTS_DEFAULT_DOCKER_BUILD_NAMESPACE"
# ended in this order
DEPENDENT_PROCESSES = {"flows.worker": "make worker", "flows.ui": "make ui", "flows.service": "flows.service"}
DEPENDENT_END_SECONDS = 50  # a worker waits until its flow runs have ended
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Server:
    """The record of a server process that we started.

    `started` is from `core.processes.start_of`: a later process with the same id has another. `folder` is where its
    database and its record were at its start. Its API shows the random `token` among its settings; MLflow's server has
    no token.
    """

    pid: int
    started: str
    port: int
    folder: str = ""
    token: str = ""

    def is_at(self, record: Path) -> bool:
        """Return whether its record is still where the server wrote it: neither moved nor copied."""
        return self.folder in ("", str(record.parent.resolve()))

    @property
    def address(self) -> str:
        """Return the address of its pages."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def api_url(self) -> str:
        """Return the address of Prefect's API."""
        return f"{self.address}/api"


def running(project: Path = PROJECT) -> Server | None:
    """Return the project's server if its process lives, listens on its port and answers within ANSWER_SECONDS.

    Raises TemporaryError where a server answers there that cannot be proven to be ours, by its process or its token.
    """
    server = _recorded_server(project)
    if server and not server.is_at(_record_path(project)):
        return None  # the project was moved since its start: it no longer has its database
    deadline = time.monotonic() + ANSWER_SECONDS
    while server and (ours := ports.listens(server.pid, server.port)) is not False:
        if not answers(f"{server.api_url}/health"):
            if ours is None or time.monotonic() > deadline:
                return None
            time.sleep(0.1)
        elif ours is None and not _shows_token(server.api_url, server.token):
            remedy = f"if it is yours: PREFECT_API_URL={server.api_url}"
            raise _unproven("a Prefect server", server.address, remedy=remedy)
        else:
            return server
    return None


def _unproven(name: str, address: str, *, remedy: str) -> TemporaryError:
    """Return the error for a server that answers but cannot be proven to be ours."""
    return TemporaryError(
        f"{name} answers at {address}, but this system does not report which process listens there, so it may be "
        f"somebody else's; {remedy}"
    )


def start(project: Path = PROJECT, *, port: int | None = None) -> tuple[Server, bool]:
    """Return the project's server, started if it is not running, and whether it was started.

    It is started on `port`, by default on PREFECT_PORT, else on 4200 or the next free port. Raises UserError where the
    port is in use, TemporaryError where the server does not start.
    """
    folder = project / ".prefect"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "server.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # if two flow runs start at once, only one starts the server
        if server := running(project):
            return server, False
        # importing Prefect takes a second, which neither `stop` nor the look at a running server needs
        from flows import settings  # noqa: PLC0415  # see above

        settings.check_own_server()
        named, variable = (port, "PREFECT_PORT") if port else settings.named_port()
        stop(project)
        launch = partial(_launch, project, variable=variable)
        return ports.start_on_port(launch, named=named, default=DEFAULT_PORT, variable=variable), True


def stop(project: Path = PROJECT) -> Server | None:
    """Stop the project's server, and return it, or None where none was running."""
    server = _recorded_server(project)
    if server:
        end_group(server.pid)
    _record_path(project).unlink(missing_ok=True)
    return server


def has_dead_record(project: Path = PROJECT) -> bool:
    """Return whether there is a record of a server that is dead; `start` replaces and `stop` removes such a record."""
    folder = project / ".prefect"
    if not (folder / "server.json").exists():
        return False
    with (folder / "server.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # while a server is being started, its record may be incomplete
        return _record_path(project).exists() and _recorded_server(project) is None


def _record_path(project: Path) -> Path:
    """Return the path of the Prefect server's record."""
    return project / ".prefect" / "server.json"


def _recorded_server(project: Path) -> Server | None:
    """Return the Prefect server in the project's record if its process lives."""
    return read_record(_record_path(project))


def read_record(path: Path) -> Server | None:
    """Return the server that the record file at `path` describes, or None if its process has ended.

    Returns None also if the file cannot be read, and if this project is a copy of the project that started the
    server. A project that was moved keeps its server.
    """
    try:
        server = Server(**json.loads(path.read_text(encoding="utf-8")))
        if not server.is_at(path) and Path(server.folder, path.name).exists():
            return None
        # older versions of the project wrote `started` as a number
        return server if is_alive(server.pid, started=str(server.started)) else None
    except (OSError, ValueError, TypeError):
        return None


def _launch(project: Path, port: int, *, variable: str) -> Server:
    """Start the Prefect server on the port, write its record, and return it once it answers."""
    from flows.settings import own_server_environment  # noqa: PLC0415  # see start

    log = project / ".prefect" / "server.log"
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_KEY"}
    token = secrets.token_hex()
    environment |= {**own_server_environment(port, home=project / ".prefect"), RECOGNITION_VARIABLE: token}
    ensure_database(environment)
    process = launch(["prefect", "server", "start", "--host", "127.0.0.1"], log=log, environment=environment)
    server = Server(process.pid, start_of(process.pid), port, str((project / ".prefect").resolve()), token)
    write_json(_record_path(project), asdict(server))
    shows_token = partial(_shows_token, server.api_url, token)
    wait_for(
        f"{server.api_url}/health", process, name="the Prefect server", log=log, variable=variable, proof=shows_token
    )
    return server


def launch(module: list[str], *, log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start `python -m <module>` in a session of its own, so that closing the terminal does not end it."""
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *module],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for(
    url: str,
    process: subprocess.Popen[bytes],
    *,
    name: str,
    log: Path,
    variable: str = "PREFECT_PORT",
    proof: Callable[[], bool] = lambda: False,
) -> None:
    """Wait until `process` answers at `url`; any exception ends the process.

    Raises PortTakenError where another process has bound the port, TemporaryError where the server does not start, or
    its answer cannot be proven to be its own. Where the system does not report which process listens, `proof` decides.
    `variable` is the environment variable that chooses the port, for the messages.
    """
    deadline = time.monotonic() + START_SECONDS
    port = int(urlsplit(url).port or 80)
    try:
        while not _answers_itself(url, process, port=port, name=name, variable=variable, proof=proof):
            if process.poll() is not None and not ports.is_free(port):
                raise ports.taken(port, variable=variable)
            if process.poll() is not None or time.monotonic() > deadline:
                raise TemporaryError(f"{name} did not start: {_last_line(log)}; see {log}")
            time.sleep(0.1)
    except BaseException:
        end_group(process.pid)
        raise


def _answers_itself(
    url: str, process: subprocess.Popen[bytes], *, port: int, name: str, variable: str, proof: Callable[[], bool]
) -> bool:
    """Return whether the server answers; raises an error where the answer comes from another process or may do so."""
    if not answers(url):
        return False
    ours = ports.listens(process.pid, port)
    if ours is None and not proof():
        raise _unproven(name, url, remedy="use a server of your own: PREFECT_API_URL=…, MLFLOW_TRACKING_URI=…")
    if ours is False:
        raise ports.taken(port, variable=variable)
    return True


def _shows_token(api_url: str, token: str) -> bool:
    """Return whether the Prefect API shows the token among its settings; False too where it asks for a login."""
    try:
        with _opener.open(f"{api_url}/admin/settings", timeout=ANSWER_SECONDS) as response:
            return bool(token) and json.load(response)["deployments"]["default_docker_build_namespace"] == token
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _last_line(log: Path) -> str:
    """Return the last line of a log that is not empty."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it logged nothing")


def end_group(pid: int, *, grace_seconds: float = 10) -> None:
    """End the process group that process `pid` leads, by SIGTERM and, after `grace_seconds`, SIGKILL."""
    with suppress(psutil.NoSuchProcess, ProcessLookupError, psutil.TimeoutExpired):
        process = psutil.Process(pid)
        os.killpg(pid, signal.SIGTERM)
        process.wait(grace_seconds)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def answers(url: str) -> bool:
    """Return whether an HTTP GET of `url` succeeds within 2 s."""
    try:
        with _opener.open(url, timeout=2) as response:
            return bool(response.status == 200)
    except (OSError, ValueError):
        return False


def _start() -> str:
    """Start the server; returns the line to print."""
    found, new = start()
    from flows.settings import configured_server  # noqa: PLC0415  # see start

    line = f"Prefect server {'started' if new else 'already running'}: {found.address}; `make stop` stops it"
    if other := configured_server():
        line += f"\nwarning: flow runs use {other.page} instead, which {other.source} names"
    return line


def _stop() -> str:
    """Stop the server and the processes that need it; returns the lines to print."""
    lines = [f"{name} ended: process {pid}" for pid, name in _end_dependents()]
    found = stop()
    return "\n".join([*lines, f"Prefect server stopped: {found.address}" if found else NONE_RUNNING])


def _end_dependents(project: Path = PROJECT) -> Iterator[tuple[int, str]]:
    """End the project's worker, pages and services, which need the server; yields process id and name of each."""
    processes = [one for one in psutil.process_iter(["cwd", "cmdline"]) if one.info["cwd"] == str(project)]
    for word, name in DEPENDENT_PROCESSES.items():
        for process in [one for one in processes if word in (one.info["cmdline"] or [])]:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
                psutil.wait_procs([process], timeout=DEPENDENT_END_SECONDS)
            yield process.pid, name


def _status() -> str:
    """Return a line that states whether the server is running."""
    found = running()
    return f"Prefect server running: {found.address}, process {found.pid}" if found else NONE_RUNNING


NONE_RUNNING = "no Prefect server of this project is running"
ACTIONS = {"start": _start, "stop": _stop, "status": _status}


def main() -> None:
    """Start or stop the project's server, or print its status."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.server", description="Start or stop the project's Prefect server, or print its status."
    )
    parser.add_argument("action", choices=ACTIONS)
    action = parser.parse_args().action
    with report_errors():
        print(ACTIONS[action]())


if __name__ == "__main__":
    main()
