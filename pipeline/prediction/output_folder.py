"""Lock, check and remove the folder in which a file of predictions is being made, and record that it is complete."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.artifacts import read_json, write_json
from pipeline.core.errors import TemporaryError, UserError
from pipeline.params import Views

FORMAT_VERSION = 1  # of the parts
LOCK, REQUEST = "lock", "request.json"


@dataclass(frozen=True)
class Request:
    """What the rows of a file depend on besides the inputs.

    The MD5s are those of the weights file and of `model.json`, `top` is the number of classes for each image, and
    `device` the type of the device that computes.
    """

    weights_md5: str
    config_md5: str
    top: int
    coverage: float | None
    views: Views
    device: str
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Counts:
    """The number of rows, and of those whose file cannot be read."""

    rows: int = 0
    unreadable: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.rows + other.rows, self.unreadable + other.unreadable)


def folder_of(path: Path) -> Path:
    """Return the folder in which the file at `path` is made."""
    return path.with_name(f"{path.name}.partial")


def result_of(path: Path) -> Path:
    """Return where the file is written before it is renamed to `path`."""
    return folder_of(path) / f"result{path.suffix}"


def record_of(path: Path) -> Path:
    """Return the path of the record on a complete file, which stays beside it."""
    return path.with_name(f".{path.name}.complete.json")


def _removed_path(path: Path) -> Path:
    """Return the name that the folder has while it is being removed."""
    return path.with_name(f".{path.name}.gone")


def state_of(status: os.stat_result) -> str:
    """Return a text that differs where the content of a file was changed; it is kept when the file is renamed."""
    return f"{status.st_size} {status.st_mtime_ns}"


def check_absent(path: Path) -> None:
    """Raise UserError where the file exists."""
    if path.exists():
        raise file_exists(path)


def file_exists(path: Path) -> UserError:
    """Return the error for a file that exists and may not be overwritten."""
    return UserError(
        f"--output {path}: the file exists; allowed: a file that does not; name another one, or add --overwrite"
    )


@contextmanager
def open_folder(path: Path, request: Request) -> Iterator[Path]:
    """Make or open the folder of a file, and yield it while this process holds its lock; it stays after that.

    Raises UserError where another process holds the lock, the folder is not one of this command, or the parts in it
    depend on something else than this request.
    """
    folder = folder_of(path)
    _check_folder(folder)
    with _locked(folder, path):
        _check_request(folder, request)
        write_json(folder / REQUEST, asdict(request))
        yield folder


def publish(path: Path, *, request: Request, inputs_digest: str, counts: Counts, overwrite: bool) -> None:
    """Record that the written file is complete, rename it to its path, and remove the folder.

    The record outlives this process, which may be killed at any moment until its status is known: the next start then
    recognizes its own answer by `find_record`. Raises UserError where the file exists and may not be overwritten.
    """
    if not overwrite:
        check_absent(path)
    result = result_of(path)
    record = {"request": asdict(request), "inputs": inputs_digest, "counts": asdict(counts)}
    write_json(record_of(path), {"file": state_of(result.stat())} | record)
    result.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename must survive a power failure if the removal of the parts does
    finally:
        os.close(descriptor)
    _remove(path)


def find_record(path: Path, request: Request) -> tuple[str, Counts] | None:
    """Return the digest of the inputs and the counts of the file at `path` as an earlier start has completed it.

    It is None where the file is missing or was changed since, and where it is the answer to another request.
    """
    try:
        record, state = read_json(record_of(path)), state_of(path.stat())
    except (OSError, UserError):  # missing or damaged
        return None
    if record["file"] != state or record["request"] != asdict(request):
        return None
    return record["inputs"], Counts(**record["counts"])


def remove_rest(path: Path, request: Request) -> None:
    """Remove the folder that a start left which was killed after it had completed the file for this request."""
    shutil.rmtree(_removed_path(path), ignore_errors=True)
    if not folder_of(path).exists():
        return
    with _locked(folder_of(path), path):
        found = folder_of(path) / REQUEST
        if not found.exists() or read_json(found) == asdict(request):
            _remove(path)


def _remove(path: Path) -> None:
    """Remove the folder at once: a process that is killed here leaves all of it, or nothing under its name."""
    shutil.rmtree(_removed_path(path), ignore_errors=True)
    folder_of(path).rename(_removed_path(path))
    shutil.rmtree(_removed_path(path), ignore_errors=True)


def _check_folder(folder: Path) -> None:
    """Raise UserError where something else has the path of the folder."""
    if not os.path.lexists(folder):
        return
    names = {each.name for each in folder.iterdir()} if folder.is_dir() else {"a file"}
    if REQUEST not in names and any(name != LOCK and not name.startswith(".") for name in names):
        raise UserError(
            f"{folder}: found something that this command did not make; allowed: nothing at this path, which the "
            "command needs; move it, or change --output"
        )


def _check_request(folder: Path, request: Request) -> None:
    """Raise UserError where the parts in the folder depend on something else than this request."""
    if not (folder / REQUEST).exists() or not any(folder.glob("[0-9]*.parquet")):
        return
    before, now = read_json(folder / REQUEST), asdict(request)
    different = [f"{name} was {before.get(name)} and is {now[name]}" for name in now if before.get(name) != now[name]]
    if different:
        raise UserError(
            f"{folder}: an earlier start made its rows in another way ({', '.join(different)}); allowed: the same way; "
            "repeat the command of that start to resume it, or remove the folder to begin again"
        )


@contextmanager
def _locked(folder: Path, path: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made where it is missing; raises UserError where another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--output {path}: another process is writing it; allowed: one at a time; wait until it ends, or "
                "change --output"
            ) from None
        if not _is_at(folder / LOCK, lock.fileno()):
            raise TemporaryError(f"--output {path}: another process has just finished it; run the same command again")
        yield


def _is_at(path: Path, descriptor: int) -> bool:
    """Return whether an open file is the one at `path`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
