"""Lock, check and remove the folder in which a file of predictions is being made."""

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
LOCK, REQUEST, COMPLETE = "lock", "request.json", "complete.json"


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


def _gone(path: Path) -> Path:
    """Return the name that the folder has while it is being removed."""
    return path.with_name(f".{path.name}.gone")


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


def publish(path: Path, *, request: Request, counts: Counts) -> None:
    """Rename the written file to its path, and remove the folder.

    `finish_earlier_start` finishes this where the process is killed meanwhile.
    """
    write_json(folder_of(path) / COMPLETE, {"request": asdict(request), "counts": asdict(counts)})
    result_of(path).replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename must survive a power failure if the removal of the parts does
    finally:
        os.close(descriptor)
    _remove(path)


def finish_earlier_start(path: Path, request: Request) -> Counts | None:
    """Return the counts of a file that is complete, whose start was killed before it removed the folder; else None.

    The folder is removed. The counts are also None where the file is the answer to another request.
    """
    complete = folder_of(path) / COMPLETE
    shutil.rmtree(_gone(path), ignore_errors=True)
    if not path.exists() or not complete.exists():
        return None
    with _locked(folder_of(path), path):
        if result_of(path).exists():  # it was killed before it renamed the file
            return None
        content = read_json(complete)
        _remove(path)
    return Counts(**content["counts"]) if content["request"] == asdict(request) else None


def _remove(path: Path) -> None:
    """Remove the folder at once: a process that is killed here leaves all of it, or nothing under its name."""
    shutil.rmtree(_gone(path), ignore_errors=True)
    folder_of(path).rename(_gone(path))
    shutil.rmtree(_gone(path), ignore_errors=True)


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
