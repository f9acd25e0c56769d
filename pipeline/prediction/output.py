"""Write one row for each input into a CSV, JSON lines or Parquet file, in parts, so that a killed start is resumed.

While `FILE` is being made, the folder `FILE.partial` has `request.json` (on what the rows depend besides the inputs)
and the parts `000000.parquet`, … of PART_ROWS rows each. A part is kept on the next start where its inputs are the same:
their paths, sizes and modification times. At the end the parts are written into one file in this folder, then
`complete.json`; the file is renamed to `FILE`, and the folder is removed.
"""

import csv
import fcntl
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.artifacts import atomic, read_json, write_json
from pipeline.core.errors import TemporaryError, UserError
from pipeline.params import Views
from pipeline.parquet import parquet_writer
from pipeline.prediction.inputs import Input
from pipeline.prediction.rows import Row, csv_header, csv_values, read_part, row_schema, write_part

SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet")
PART_ROWS = 512
MAX_GROUP_VALUES = 2**17  # entries of `top` in a row group of the Parquet file, of which one is in memory at a time
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


@dataclass(frozen=True)
class _Part:
    """A part that is to be made: its file, the digest of its inputs, and their number."""

    path: Path
    inputs_digest: str
    rows: int


def check_output_path(path: Path) -> None:
    """Raise UserError where `--output` has an unknown suffix or is a folder."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"--output {path}: found the suffix {path.suffix!r}; allowed: {', '.join(SUFFIXES)}")
    if path.is_dir():
        raise UserError(f"--output {path}: found a folder; allowed: the path of a file, which may not exist yet")


def finish_earlier_start(path: Path, request: Request) -> Counts | None:
    """Return the counts of a file that is complete, whose start was killed before it removed its folder; else None.

    The folder is removed. The counts are also None where the file is the answer to another request.
    """
    folder, gone = _folders(path)
    shutil.rmtree(gone, ignore_errors=True)
    if not (path.exists() and (folder / COMPLETE).exists()):
        return None
    with _locked(folder, path):
        if (folder / f"result{path.suffix}").exists():  # killed before the file was renamed
            return None
        complete = read_json(folder / COMPLETE)
        _remove(folder, gone)
    return Counts(**complete["counts"]) if complete["request"] == asdict(request) else None


@contextmanager
def open_output(path: Path, request: Request, *, overwrite: bool) -> Iterator["Output"]:
    """Lock the folder of a file that is to be made or resumed, and yield the output; the folder stays where it fails.

    Raises UserError where the path is not allowed, the file exists and may not be overwritten, another process writes
    it, or the rows of an earlier start depend on something else.
    """
    check_output_path(path)
    if path.exists() and not overwrite:
        raise UserError(
            f"--output {path}: the file exists; allowed: a file that does not; name another one, or add --overwrite"
        )
    folder, _ = _folders(path)
    _check_folder(folder)
    with _locked(folder, path):
        _check_request(folder, request)
        write_json(folder / REQUEST, asdict(request))
        yield Output(path, request)


class Output:
    """A file that is being made from parts, whose folder this process has locked."""

    def __init__(self, path: Path, request: Request) -> None:
        self.path, self.request = path, request
        self.folder, self._gone = _folders(path)
        self.kept = Counts()  # the rows that an earlier start has made
        self.counts = Counts()  # all rows so far
        self._schema = row_schema(with_unknown=request.coverage is not None)
        self._own_paths = [Path(os.path.realpath(own)) for own in (path, self.folder)]

    def write(
        self,
        inputs: Iterator[Input],
        *,
        answer: Callable[[Iterator[Input]], Iterator[list[Row]]],
        report_error: Callable[[str, str], object],
        advance: Callable[[int], object],
    ) -> Counts:
        """Write a row for each input, in their order, and return the counts; nothing holds all inputs or rows.

        `answer` yields the rows of the inputs that no kept part has, in lists of any length. `report_error` receives
        the path and the reason of each file that cannot be read, and `advance` the number of finished rows. The file
        itself and its folder are left out where they are among the inputs.
        """
        try:
            num_parts = self._make_parts(inputs, answer=answer, report_error=report_error, advance=advance)
            self._finish(num_parts)
        except KeyboardInterrupt as error:
            raise type(error)(
                f"{self.folder} has the rows of {self.counts.rows:,} images; the same command resumes"
            ) from None
        return self.counts

    def _make_parts(
        self,
        inputs: Iterator[Input],
        *,
        answer: Callable[[Iterator[Input]], Iterator[list[Row]]],
        report_error: Callable[[str, str], object],
        advance: Callable[[int], object],
    ) -> int:
        """Make the parts that an earlier start has not made, and return the number of all parts."""
        pending: deque[_Part] = deque()
        num_parts = 0

        def count(errors: Sequence[tuple[str, str]], rows: int) -> Counts:
            for path, reason in errors:
                report_error(path, reason)
            advance(rows)
            return Counts(rows, len(errors))

        def unanswered() -> Iterator[Input]:
            nonlocal num_parts
            while block := list(islice(others, PART_ROWS)):
                part = _Part(self._part_path(num_parts), _digest(block), len(block))
                num_parts += 1
                errors = _errors_of_kept(part)
                if errors is None:
                    pending.append(part)
                    yield from block
                else:
                    kept = count(errors, part.rows)
                    self.kept, self.counts = self.kept + kept, self.counts + kept

        others = (each for each in inputs if not self._is_own(each.path))
        rows: list[Row] = []
        for block in answer(unanswered()):
            rows += block
            while pending and len(rows) >= pending[0].rows:
                part = pending.popleft()
                self._write_part(part, made := rows[: part.rows])
                del rows[: part.rows]
                self.counts += count([(row.path, row.error) for row in made if row.error is not None], part.rows)
        assert not rows
        assert not pending
        return num_parts

    def _write_part(self, part: _Part, rows: Sequence[Row]) -> None:
        write_part(part.path, rows, schema=self._schema, inputs_digest=part.inputs_digest)

    def _part_path(self, number: int) -> Path:
        return self.folder / f"{number:06}.parquet"

    def _is_own(self, path: str) -> bool:
        """Return whether a path is that of the file or of its folder, or is in the folder."""
        if self.path.name not in path:  # in most cases the file system need not be asked
            return False
        real = Path(os.path.realpath(path))
        return any(real.is_relative_to(own) for own in self._own_paths)

    def _finish(self, num_parts: int) -> None:
        """Write the parts into one file, rename it to its path, and remove the folder."""
        result = self.folder / f"result{self.path.suffix}"
        write = {".csv": _write_csv, ".parquet": _write_parquet}.get(self.path.suffix.lower(), _write_json_lines)
        write(result, self._tables(num_parts), schema=self._schema, request=self.request)
        write_json(self.folder / COMPLETE, {"request": asdict(self.request), "counts": asdict(self.counts)})
        result.replace(self.path)
        _remove(self.folder, self._gone)

    def _tables(self, num_parts: int) -> Iterator[pa.Table]:
        """Yield the rows of each part."""
        for number in range(num_parts):
            found = read_part(self._part_path(number))
            if found is None:
                raise UserError(
                    f"{self._part_path(number)}: missing or damaged since it was written; the same command makes it "
                    "again; if it fails again, check the disk"
                )
            yield found[0]


def _digest(inputs: Sequence[Input]) -> str:
    """Return a hash of the paths of inputs, and of the size and the modification time of each file."""
    digest = hashlib.blake2b(digest_size=16)
    for each in inputs:
        try:
            status = os.stat(each.path)
            state = f"{status.st_size} {status.st_mtime_ns}"
        except (OSError, ValueError) as error:
            state = type(error).__name__
        digest.update(json.dumps([each.path, each.error, state]).encode())
    return digest.hexdigest()


def _errors_of_kept(part: _Part) -> list[tuple[str, str]] | None:
    """Return the path and the reason of each unreadable file of a part of an earlier start; None if it has no such part.

    A part is the same where its inputs are.
    """
    found = read_part(part.path)
    if found is None or found[1] != part.inputs_digest or len(found[0]) != part.rows:
        return None
    pairs = zip(found[0]["path"].to_pylist(), found[0]["error"].to_pylist(), strict=True)
    return [(path, reason) for path, reason in pairs if reason is not None]


def _folders(path: Path) -> tuple[Path, Path]:
    """Return the folder of the parts of a file, and the name that the folder has while it is being removed."""
    return path.with_name(f"{path.name}.partial"), path.with_name(f".{path.name}.gone")


def _check_folder(folder: Path) -> None:
    """Raise UserError where the path of the folder is in use by something else."""
    if not os.path.lexists(folder):
        return
    names = {each.name for each in folder.iterdir()} if folder.is_dir() else {"a file"}
    if REQUEST not in names and any(name != LOCK and not name.startswith(".") for name in names):
        raise UserError(f"{folder}: was not made by this command, which needs this path; move it, or change --output")


def _check_request(folder: Path, request: Request) -> None:
    """Raise UserError where the parts in the folder depend on something else than this request."""
    if not (folder / REQUEST).exists():
        return
    before, now = read_json(folder / REQUEST), asdict(request)
    different = [f"{name} was {before.get(name)} and is {now[name]}" for name in now if before.get(name) != now[name]]
    if different:
        raise UserError(
            f"{folder}: an earlier start made rows in another way ({', '.join(different)}); allowed: the same way; "
            f"repeat the command of that start to resume it, or remove the folder {folder} to begin again"
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
                f"--output {path}: another process is writing it; wait until it ends, or change --output"
            ) from None
        if not (folder / LOCK).exists() or not os.path.samestat(os.stat(lock.fileno()), (folder / LOCK).stat()):
            raise TemporaryError(f"--output {path}: another process has just finished it; run the same command again")
        yield


def _remove(folder: Path, gone: Path) -> None:
    """Remove a folder at once: a process that is killed here leaves it whole, or under the name `gone`."""
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
