"""A server counts as ours only if the process that we started listens on its port."""

import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from flows import ports, server
from flows.ports import free_port
from pipeline.artifacts import write_json
from pipeline.core.errors import TemporaryError, UserError
from pipeline.core.processes import start_of


class AnyServer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def foreign_server(kind: type[AnyServer] = AnyServer) -> Iterator[int]:
    """Start a server in this process that answers every request with 200, and yield its port."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found.server_address[1]
        found.shutdown()


class ServerWithToken(AnyServer):
    def do_GET(self) -> None:
        super().do_GET()
        if self.path == "/api/admin/settings":
            self.wfile.write(b'{"deployments": {"default_docker_build_namespace": "own"}}')


@contextmanager
def sleeper(code: str = "pass") -> Iterator[subprocess.Popen[bytes]]:
    """Start a process that runs `code` and then waits, and yield it."""
    command = [sys.executable, "-c", f"import sys; {code}; print(flush=True); sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout
        process.stdout.readline()
        yield process
        process.kill()


LISTEN = "import socket; s = socket.create_server(('127.0.0.1', {port}))"
IN_CHILD_PROCESS = (
    "import subprocess; p = subprocess.Popen([sys.executable, '-c', {code!r}], stdout=-1); p.stdout.readline()"
)


def test_the_process_that_listens_on_a_port_is_recognized() -> None:
    port = free_port()
    with sleeper(LISTEN.format(port=port)) as owner, sleeper() as other:
        assert ports.listens(owner.pid, port) is True
        assert ports.listens(other.pid, port) is False
        assert ports.listens(owner.pid, free_port()) is False
    assert ports.listens(owner.pid, port) is False


def test_a_port_of_a_child_process_belongs_to_the_parent() -> None:
    port = free_port()
    child = f"{LISTEN.format(port=port)}; print(flush=True); import sys; sys.stdin.read()"
    with sleeper(IN_CHILD_PROCESS.format(code=child)) as owner:
        assert ports.listens(owner.pid, port) is True


def test_the_owner_of_a_port_is_unknown_where_the_system_hides_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with foreign_server() as port:
        assert ports.listens(os.getpid(), port) is True
        monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
        assert ports.listens(os.getpid(), port) is None


def test_another_server_on_the_port_does_not_count_as_ours(tmp_path: Path) -> None:
    with foreign_server() as port, sleeper() as process:
        with pytest.raises(ports.PortTakenError, match=f"port {port} is in use; .* PREFECT_PORT="):
            wait(port, process, folder=tmp_path)
        assert not psutil.pid_exists(process.pid)


def test_an_answer_of_an_unknown_process_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with foreign_server() as port, sleeper() as process:
        monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
        with pytest.raises(TemporaryError, match="does not report which process listens there"):
            wait(port, process, folder=tmp_path)


@pytest.mark.parametrize(
    ("kind", "token"), [(ServerWithToken, "own"), (ServerWithToken, "other"), (ServerWithToken, ""), (AnyServer, "own")]
)
def test_a_prefect_server_is_recognized_by_its_token_where_the_system_hides_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[AnyServer], token: str
) -> None:
    record = {"pid": os.getpid(), "started": start_of(os.getpid()), "token": token}
    monkeypatch.setattr(ports, "listens", lambda _pid, _port: None)
    (tmp_path / ".prefect").mkdir()
    with foreign_server(kind) as port:
        write_json(tmp_path / ".prefect" / "server.json", record | {"port": port})
        if (kind, token) == (ServerWithToken, "own"):
            assert server.running(tmp_path)
            return
        with pytest.raises(TemporaryError, match="does not report which process listens there"):
            server.running(tmp_path)


@pytest.mark.slow
def test_a_prefect_server_starts_where_the_system_hides_processes(
    tmp_path: Path, stores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "listens", lambda _pid, _port: None)
    (tmp_path / ".prefect").mkdir()
    shutil.copy(stores / "prefect.db", tmp_path / ".prefect")
    try:
        found, _ = server.start(tmp_path, port=free_port())
        assert server.running(tmp_path) == found
    finally:
        server.stop(tmp_path)


def wait(port: int, process: subprocess.Popen[bytes], *, folder: Path) -> None:
    server.wait_for(f"http://127.0.0.1:{port}/", process, name="the server", log=folder / "log")


def test_another_server_on_the_recorded_port_does_not_count_as_running(tmp_path: Path) -> None:
    with foreign_server() as port, sleeper() as process:
        record = {"pid": process.pid, "started": start_of(process.pid), "port": port}
        (tmp_path / ".prefect").mkdir()
        write_json(tmp_path / ".prefect" / "server.json", record)
        assert server.running(tmp_path) is None
        write_json(
            tmp_path / ".prefect" / "server.json", {**record, "pid": os.getpid(), "started": start_of(os.getpid())}
        )
        assert server.running(tmp_path)


def test_a_copy_of_a_project_does_not_use_the_server_of_the_original(tmp_path: Path) -> None:
    original = tmp_path / "original" / ".prefect"
    original.mkdir(parents=True)
    with sleeper() as process:
        record = {"pid": process.pid, "started": start_of(process.pid), "port": free_port(), "folder": str(original)}
        write_json(original / "server.json", record)
        shutil.copytree(tmp_path / "original", tmp_path / "copy")
        assert server.running(tmp_path / "copy") is None
        assert server.stop(tmp_path / "copy") is None
        assert process.poll() is None
        (tmp_path / "original").rename(tmp_path / "moved")
        assert server.running(tmp_path / "moved") is None
        assert server.stop(tmp_path / "moved") == server.Server(**record)  # type: ignore[arg-type]
        assert process.poll() is not None


BUSY = """
import socket
print(flush=True)
listener = socket.create_server(("127.0.0.1", {port}))
for number in range(3):
    connection, _ = listener.accept()
    connection.recv(1000)
    if number == 2:
        connection.sendall(b"HTTP/1.0 200 OK\\r\\n\\r\\n")
    connection.close()
"""


def test_our_server_counts_as_running_although_it_answers_slowly(tmp_path: Path) -> None:
    port = free_port()
    with sleeper(f"exec({BUSY.format(port=port)!r})") as process:
        while not ports.listens(process.pid, port):
            assert process.poll() is None
        record = {"pid": process.pid, "started": start_of(process.pid), "port": port}
        (tmp_path / ".prefect").mkdir()
        write_json(tmp_path / ".prefect" / "server.json", record)
        assert server.running(tmp_path) == server.Server(**record)  # type: ignore[arg-type]


def test_the_next_free_port_is_tried_if_the_first_is_taken() -> None:
    first = free_port()
    tried = []

    def start(port: int) -> int:
        tried.append(port)
        if len(tried) < 3:
            raise ports.taken(port, variable="X_PORT")
        return port

    with socket.create_server(("127.0.0.1", first)):
        assert ports.start_on_port(start, named=None, default=first, variable="X_PORT") == tried[-1]
    assert len(set(tried)) == 3
    assert first not in tried


def test_a_port_that_the_user_named_is_the_only_one_tried() -> None:
    named = free_port()

    def fail(port: int) -> int:
        raise ports.taken(port, variable="X_PORT")

    with pytest.raises(UserError, match=f"port {named} is in use; .* X_PORT="):
        ports.start_on_port(fail, named=named, default=free_port(), variable="X_PORT")


@pytest.mark.slow
def test_two_checkouts_that_start_at_the_same_time_get_a_server_each(
    tmp_path: Path, stores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "DEFAULT_PORT", free_port())
    monkeypatch.delenv("PREFECT_PORT", raising=False)
    projects = [tmp_path / name for name in ("a", "b")]
    for project in projects:
        (project / ".prefect").mkdir(parents=True)
        shutil.copy(stores / "prefect.db", project / ".prefect")
    try:
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(server.start, projects))
        assert len({one.port for one, _ in found}) == 2
        assert [server.running(project) for project in projects] == [one for one, _ in found]
    finally:
        for project in projects:
            server.stop(project)
