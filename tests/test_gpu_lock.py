"""A GPU is used by one training at a time: real processes take real locks of GPUs that do not exist."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline import train
from pipeline.tracking.logger import RunLogger
from pipeline.tracking.runs import training_run
from pipeline.training import gpu_lock
from pipeline.training.device import gpu_uuids
from pipeline.training.gpu_lock import describe_holder, exclusive_gpus, lock_file
from tests.conftest import PROJECT, enable_interrupts, write_normalized
from tests.test_train import configure

# A training that lasts until its stdin is closed.
TRAINING = """
import sys
from pathlib import Path
from pipeline.core.errors import report_errors
from pipeline.training import gpu_lock
name, folder, *gpus = sys.argv[1:]
gpu_lock.LOCK_FOLDER = Path(folder)
with report_errors(), gpu_lock.exclusive_gpus(gpus):
    print(name, "starts", flush=True)
    sys.stdin.read()
    print(name, "ends", flush=True)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty folder for the lock files, and return it."""
    (tmp_path / "locks").mkdir()
    monkeypatch.setattr(gpu_lock, "LOCK_FOLDER", tmp_path / "locks")
    return tmp_path / "locks"


@pytest.fixture
def log() -> Iterator[tuple[int, Any]]:
    """Yield both ends, to write and to read, of a pipe that keeps the lines of several trainings in order."""
    reader, writer = os.pipe()
    with os.fdopen(reader) as lines:
        yield writer, lines
        with suppress(OSError):
            os.close(writer)


@pytest.fixture
def start(folder: Path, log: tuple[int, Any]) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Yield a function that starts a training with a name on some GPUs; its output goes to `log`."""
    started = []

    def start(name: str, *gpus: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", TRAINING, name, str(folder), *gpus]
        whole_lines = {**os.environ, "PYTHONUNBUFFERED": ""}
        process = subprocess.Popen(
            command,
            cwd=PROJECT,
            env=whole_lines,
            stdin=subprocess.PIPE,
            stdout=log[0],
            stderr=log[0],
            preexec_fn=enable_interrupts,  # noqa: PLW1509
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin
    process.stdin.close()


def is_locked(uuid: str) -> bool:
    with lock_file(uuid).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def wait_until_blocked(pid: int) -> None:
    """Return once the process waits for a lock inside the kernel."""
    while sys.platform == "linux" and not re.search(rf"-> FLOCK .* {pid} ", Path("/proc/locks").read_text()):
        time.sleep(0.01)


def test_a_second_training_waits_for_the_first_and_logs_which_one(start: Any, log: tuple[int, Any]) -> None:
    first = start("first", "5f3a")
    assert log[1].readline() == "first starts\n"
    describe_holder(["5f3a"], "MLflow run 0b1e")
    second = start("second", "5f3a")
    waits = f"waiting for GPU 5f3a, held by process {first.pid} in {PROJECT.resolve()}, MLflow run 0b1e\n"
    assert log[1].readline() == waits
    end(first)
    assert [log[1].readline() for _ in range(2)] == ["first ends\n", "second starts\n"]
    assert lock_file("5f3a").read_text() == f"process {second.pid} in {PROJECT.resolve()}"
    end(second)
    assert second.wait() == 0
    assert lock_file("5f3a").read_text() == ""


def test_a_killed_training_releases_its_gpus(start: Any, log: tuple[int, Any]) -> None:
    first = start("first", "5f3a", "77b0")
    assert log[1].readline() == "first starts\n"
    start("second", "77b0")
    assert log[1].readline().startswith("waiting for GPU 77b0, held by process ")
    first.kill()
    assert log[1].readline() == "second starts\n"
    assert not is_locked("5f3a")


@pytest.mark.parametrize(
    ("sent", "status", "line"),
    [(signal.SIGTERM, 143, "terminated by SIGTERM"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_signal_ends_the_waiting(
    start: Any, log: tuple[int, Any], sent: signal.Signals, status: int, line: str
) -> None:
    with exclusive_gpus(["5f3a"]):
        waiting = start("second", "5f3a")
        assert log[1].readline().startswith("waiting for GPU 5f3a")
        wait_until_blocked(waiting.pid)
        waiting.send_signal(sent)
        assert waiting.wait() == status
        assert log[1].readline() == f"error: {line}; the same command starts again\n"
        assert is_locked("5f3a")


def test_two_trainings_that_list_the_same_gpus_in_another_order_cause_no_deadlock(
    start: Any, log: tuple[int, Any]
) -> None:
    lock_file("77b0").touch()
    with exclusive_gpus(["5f3a"]):
        both = start("a", "5f3a", "77b0"), start("b", "77b0", "5f3a", "5f3a")
        assert all(log[1].readline().startswith("waiting for GPU 5f3a") for _ in both)
        for process in both:
            wait_until_blocked(process.pid)
        assert not is_locked("77b0")  # neither holds the other GPU while it waits
    for process in both:
        end(process)
    assert [process.wait() for process in both] == [0, 0]


def test_a_lock_file_deleted_during_the_wait_is_replaced(start: Any, log: tuple[int, Any]) -> None:
    first = start("first", "5f3a")
    assert log[1].readline() == "first starts\n"
    second = start("second", "5f3a")
    assert log[1].readline().startswith("waiting")
    wait_until_blocked(second.pid)
    lock_file("5f3a").unlink()
    third = start("third", "5f3a")
    assert log[1].readline() == "third starts\n"
    end(first)
    assert log[1].readline() == "first ends\n"
    assert log[1].readline().startswith(f"waiting for GPU 5f3a, held by process {third.pid}")
    end(third)
    assert [log[1].readline() for _ in range(2)] == ["third ends\n", "second starts\n"]


@pytest.mark.parametrize(
    ("content", "reported"),
    [
        (b"", "another process"),
        (b"\n \n", "another process"),
        (b"process 1 in /ho", "process 1 in /ho"),
        (b"\x1b[2J\xff\xfe\x07ok\nsecond line", "\\x1b[2J\ufffd\ufffd\\x07ok"),
        (b"x" * 10_000_000, "x" * 1000),
    ],
)
def test_any_text_in_a_lock_file_is_logged_as_one_printable_line(
    start: Any, log: tuple[int, Any], content: bytes, reported: str
) -> None:
    with exclusive_gpus(["5f3a"]):
        lock_file("5f3a").write_bytes(content)
        start("second", "5f3a")
        assert log[1].readline() == f"waiting for GPU 5f3a, held by {reported}\n"


def plant_symlink(path: Path, target: Path) -> None:
    path.symlink_to(target)


def plant_dangling_symlink(path: Path, target: Path) -> None:
    path.symlink_to(target.with_name("missing"))


def plant_hard_link(path: Path, target: Path) -> None:
    path.hardlink_to(target)


def plant_pipe(path: Path, target: Path) -> None:
    os.mkfifo(path)


def plant_folder(path: Path, target: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("plant", [plant_symlink, plant_dangling_symlink, plant_hard_link, plant_pipe, plant_folder])
def test_a_lock_path_planted_by_another_user_is_not_written_to_and_stops_no_training(
    plant: Callable[[Path, Path], None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "target"
    target.write_text("precious")
    plant(lock_file("5f3a"), target)
    with exclusive_gpus(["5f3a", "77b0"]):
        describe_holder(["5f3a", "77b0"], "MLflow run 0b1e")
        assert is_locked("77b0")
    line = capfd.readouterr().out
    assert line.startswith(f"warning: the lock file {lock_file('5f3a')} of a GPU cannot be used (")
    assert len(line.splitlines()) == 1
    assert target.read_text() == "precious"
    assert not (tmp_path / "missing").exists()


def test_a_missing_folder_stops_no_training(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder.rmdir()
    with exclusive_gpus(["5f3a"]):
        assert "cannot be used (No such file or directory)" in capfd.readouterr().out


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def test_a_lock_file_is_open_to_all_users_whatever_the_umask() -> None:
    with umask(0o077), exclusive_gpus(["5f3a"]):
        assert lock_file("5f3a").stat().st_mode & 0o7777 == gpu_lock.LOCK_FILE_MODE
        assert os.umask(0o077) == 0o077


def test_the_lock_file_of_another_user_is_opened_as_linux_allows_it_in_a_sticky_folder(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lock_file("5f3a").touch()
    os_open = os.open

    def protected(path: Any, flags: int, mode: int = 0o777) -> int:
        """Fail as Linux does with fs.protected_regular=2 for the file of another user."""
        if flags & os.O_CREAT and Path(path) == lock_file("5f3a"):
            raise PermissionError(13, "Permission denied", str(path))
        return os_open(path, flags, mode)

    monkeypatch.setattr(os, "open", protected)
    with exclusive_gpus(["5f3a"]):
        assert is_locked("5f3a")
    assert capfd.readouterr().out == ""


@contextmanager
def user(uid: int) -> Iterator[None]:
    """Act as this user on files; only root can."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as other users")
def test_two_users_exclude_each_other(monkeypatch: pytest.MonkeyPatch, start: Any, log: tuple[int, Any]) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as shared:
        Path(shared).chmod(0o1777)
        monkeypatch.setattr(gpu_lock, "LOCK_FOLDER", Path(shared))
        with user(12345), umask(0o077), exclusive_gpus(["5f3a"]):
            pass
        assert lock_file("5f3a").stat().st_uid == 12345
        with user(23456), exclusive_gpus(["5f3a"]):
            assert is_locked("5f3a")
            describe_holder(["5f3a"], "MLflow run 0b1e")
            assert "MLflow run 0b1e" in lock_file("5f3a").read_text()


def test_gpus_are_identified_by_their_uuids_and_not_by_their_numbers(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    visible = ["ffc79498-8ff3-c2dc-3b0d-fafd804516ae", "00000000-0000-0000-0000-000000000000", "77b0"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(visible))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=visible[number]))
    assert gpu_uuids(torch.device("cuda"), processes=1) == visible[:1]
    assert capfd.readouterr().out == ""
    assert gpu_uuids(torch.device("cuda"), processes=8) == [visible[0], "1", "77b0"]
    assert capfd.readouterr().out.startswith("warning: the driver reports no UUID for GPU 1: ")


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_without_cuda_no_lock_is_taken(device: str, folder: Path) -> None:
    with exclusive_gpus(gpu_uuids(torch.device(device), processes=2)):
        assert not list(folder.iterdir())


def test_a_training_locks_its_gpu_before_it_creates_its_run_and_then_records_the_run(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_normalized(workspace)
    configure(workspace, epochs=1)
    monkeypatch.setattr(train, "gpu_uuids", lambda device, *, processes: ["5f3a"])
    report_epoch, found = train.report_epoch, []

    def create_run(**arguments: Any) -> Any:
        assert is_locked("5f3a")
        return training_run(**arguments)

    def report(*arguments: Any, run: RunLogger, **others: Any) -> None:
        found.append((lock_file("5f3a").read_text(), run.run_id))
        report_epoch(*arguments, run=run, **others)

    monkeypatch.setattr(train, "training_run", create_run)
    monkeypatch.setattr(train, "report_epoch", report)
    train.main()
    [(text, run_id)] = found
    assert text == f"process {os.getpid()} in {workspace.resolve()}, MLflow run {run_id}"
    assert not is_locked("5f3a")
