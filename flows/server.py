"""The project's own Prefect server: on loopback, started once in the background, used by every later flow run.

`python -m flows.server start|stop|status`. Prefect takes 17-23 s to start one for
each flow run; this takes about 10 s once.
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
START_SECONDS = 90
"""A slow machine's first start, which makes the database, stays below this."""
ANSWER_SECONDS = 20
"""A server that has more to do than the machine can bear answers within this."""
SHOWN_VARIABLE = "PREFECT_DEPLOYMENTS_DEFAULT_DOCKER_BUILD_NAMESPACE"
"""A setting that a server does not use, and shows as it is."""
USERS = {"flows.worker": "make worker", "flows.ui": "make ui", "flows.service": "flows.service"}  # ended in this order
USERS_SECONDS = 50
"""A worker that ends lets its flow runs end."""
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Server:
    """A server process of ours; a later owner of its process id has another `started` (`core.processes.start_of`)."""

    pid: int
    started: str
    port: int
    folder: str = ""
    """The folder of its database and of its record when it was started."""
    token: str = ""
    """Drawn when it was started; its API shows it among its settings. MLflow's server has none."""

    def is_of(self, record: Path) -> bool:
        """Whether its record has not been moved or copied since."""
        return self.folder in ("", str(record.parent.resolve()))

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def api_url(self) -> str:
        return f"{self.address}/api"


def running(project: Path = PROJECT) -> Server | None:
    """The project's server if its process lives, listens on its port and answers; a busy one is given time for that.

    Raises TemporaryError where something answers there, and neither the system says that it is that process nor does
    it know the server's token.
    """
    server = _recorded(project)
    if server and not server.is_of(_record(project)):
        return None  # it was started before the project was moved, and has lost its database
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
    return TemporaryError(
        f"{name} answers at {address}, but this system does not say which process listens there, so it may be "
        f"somebody else's; {remedy}"
    )


def start(project: Path = PROJECT, *, port: int | None = None) -> tuple[Server, bool]:
    """The running server, or a new one, and whether it is new.

    A new one takes `port` and no other; by default PREFECT_PORT, else 4200 or the next that it gets.
    Raises UserError where the port is in use, TemporaryError where the server does not come up.
    """
    folder = project / ".prefect"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "server.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two flow runs started together, one starts the server
        if server := running(project):
            return server, False
        # to import Prefect takes a second, which `stop` and a server that runs already need not spend
        from flows import settings  # noqa: PLC0415  # see above

        settings.check_own_server()
        named, variable = (port, "PREFECT_PORT") if port else settings.named_port()
        stop(project)
        launch = partial(_launch, project, variable=variable)
        return ports.start_on_port(launch, named=named, default=DEFAULT_PORT, variable=variable), True


def stop(project: Path = PROJECT) -> Server | None:
    """End the project's server; returns it where there was one."""
    server = _recorded(project)
    if server:
        end_group(server.pid)
    _record(project).unlink(missing_ok=True)
    return server


def has_dead_record(project: Path = PROJECT) -> bool:
    """Return whether the server on record is dead; `start` and `stop` replace or remove such a record."""
    folder = project / ".prefect"
    if not (folder / "server.json").exists():
        return False
    with (folder / "server.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # while one is being started, its record is not whole
        return _record(project).exists() and _recorded(project) is None


def _record(project: Path) -> Path:
    return project / ".prefect" / "server.json"


def _recorded(project: Path) -> Server | None:
    """The Prefect server on record if that very process lives."""
    return read_record(_record(project))


def read_record(path: Path) -> Server | None:
    """The server that the file names, if that very process lives and is not the one of a project that was copied."""
    try:
        server = Server(**json.loads(path.read_text(encoding="utf-8")))
        if not server.is_of(path) and Path(server.folder, path.name).exists():
            return None
        return server if is_alive(server.pid, started=str(server.started)) else None  # once it was a number
    except (OSError, ValueError, TypeError):
        return None


def _launch(project: Path, port: int, *, variable: str) -> Server:
    from flows.settings import own_server_environment  # noqa: PLC0415  # see start

    log = project / ".prefect" / "server.log"
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_KEY"}
    token = secrets.token_hex()
    environment |= {**own_server_environment(port, home=project / ".prefect"), SHOWN_VARIABLE: token}
    ensure_database(environment)
    process = launch(["prefect", "server", "start", "--host", "127.0.0.1"], log=log, environment=environment)
    server = Server(process.pid, start_of(process.pid), port, str((project / ".prefect").resolve()), token)
    write_json(_record(project), asdict(server))
    knows = partial(_shows_token, server.api_url, token)
    wait_for(f"{server.api_url}/health", process, name="the Prefect server", log=log, variable=variable, proof=knows)
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


def wait_for(
    url: str,
    process: subprocess.Popen[bytes],
    *,
    name: str,
    log: Path,
    variable: str = "PREFECT_PORT",
    proof: Callable[[], bool] = lambda: False,
) -> None:
    """Return once `process` answers at `url`; on any exception it is ended.

    Raises PortTakenError where another process got the port, TemporaryError where the server does not come up or it
    cannot be proven that the answer is its own: `proof` is asked where the system does not say who listens. `variable`
    chooses the port.
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
    """Whether there is an answer, and the process, not another one, gives it."""
    if not answers(url):
        return False
    ours = ports.listens(process.pid, port)
    if ours is None and not proof():
        raise _unproven(name, url, remedy="use a server of your own: PREFECT_API_URL=…, MLFLOW_TRACKING_URI=…")
    if ours is False:
        raise ports.taken(port, variable=variable)
    return True


def _shows_token(api_url: str, token: str) -> bool:
    """Whether the Prefect API there has the token among its settings; False too where it asks for a login."""
    try:
        with _opener.open(f"{api_url}/admin/settings", timeout=ANSWER_SECONDS) as response:
            return bool(token) and json.load(response)["deployments"]["default_docker_build_namespace"] == token
    except (OSError, ValueError, LookupError, TypeError):
        return False


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


def _start() -> str:
    found, new = start()
    from flows.settings import configured_server  # noqa: PLC0415  # see start

    line = f"Prefect server {'started' if new else 'already running'}: {found.address}; `make stop` ends it"
    if other := configured_server():
        line += f"\nwarning: flow runs do not use it, but {other.page}, from {other.source}"
    return line


def _stop() -> str:
    lines = [f"{name} ended: process {pid}" for pid, name in _end_users()]
    found = stop()
    return "\n".join([*lines, f"Prefect server stopped: {found.address}" if found else NONE_RUNNING])


def _end_users(project: Path = PROJECT) -> Iterator[tuple[int, str]]:
    """End the project's worker and pages, which need the server; gives process and name of each."""
    processes = [one for one in psutil.process_iter(["cwd", "cmdline"]) if one.info["cwd"] == str(project)]
    for word, name in USERS.items():
        for process in [one for one in processes if word in (one.info["cmdline"] or [])]:
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
