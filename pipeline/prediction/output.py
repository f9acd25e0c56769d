"""Write one row for each input into a CSV, JSON lines or Parquet file, in parts, so that a killed start is resumed.

While `FILE` is being made, the folder `FILE.partial` has `request.json` (on what the rows depend besides the inputs)
and the parts `000000.parquet`, … of PART_ROWS rows each. The next start keeps a part if its inputs are the same: their
paths, sizes and times of modification and of change. At the end the parts are written into one file in this folder,
`.FILE.complete.json` records of which inputs; the file is renamed to `FILE`, and the folder is removed.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa

from pipeline.core.errors import UserError
from pipeline.prediction.formats import (
    SUFFIXES,
    read_part,
    row_schema,
    write_csv,
    write_json_lines,
    write_parquet,
    write_part,
)
from pipeline.prediction.image_files import is_readable
from pipeline.prediction.inputs import Input
from pipeline.prediction.output_folder import (
    Counts,
    Request,
    check_absent,
    file_exists,
    find_record,
    folder_of,
    open_folder,
    publish,
    record_of,
    remove_rest,
    result_of,
    state_of,
)
from pipeline.prediction.rows import Row

PART_ROWS = 512
GROUP_ENTRIES = 2**17  # of `top` in a row group of a Parquet file, about
Errors = Sequence[tuple[str, str]]  # the path of each file that cannot be read, and the reason
Answer = Callable[[Iterator[Input]], Generator[list[Row], None, None]]


@dataclass(frozen=True)
class _Part:
    """A part of the file: its path, the digest of its inputs, and their number."""

    path: Path
    inputs_digest: str
    rows: int


def finish_earlier_start(path: Path, request: Request, inputs: Iterator[Input]) -> Counts | None:
    """Return the counts of the file at `path` where an earlier start has completed it for this request and the inputs.

    What that start has left is removed. None where there is no file, and then no input was taken. Raises UserError
    where the file is another one.
    """
    found = find_record(path, request)
    if found is None:
        check_absent(path)
        return None
    inputs_digest, counts = found
    digest = hashlib.blake2b(digest_size=16)
    for _, block_digest in _blocks(inputs, path=path):
        digest.update(block_digest.encode())
    if digest.hexdigest() != inputs_digest:
        raise file_exists(path)
    remove_rest(path, request)
    return counts


def check_output_path(path: Path) -> None:
    """Raise UserError where `--output` has an unknown suffix or is a folder."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"--output {path}: found the suffix {path.suffix!r}; allowed: {', '.join(SUFFIXES)}; add one of them"
        )
    if path.is_dir():
        raise UserError(f"--output {path}: found a folder; allowed: a file; name one in it, such as {path}/answers.csv")


@contextmanager
def open_output(path: Path, request: Request, *, overwrite: bool) -> Iterator["Output"]:
    """Begin or resume a file, and yield it while this process holds its lock.

    Raises UserError where the path is not allowed, the file exists and may not be overwritten, another process writes
    it, or the rows of an earlier start depend on something else.
    """
    check_output_path(path)
    if not overwrite:
        check_absent(path)
    with open_folder(path, request) as folder:
        yield Output(path, folder, request, overwrite=overwrite)


class Output:
    """A file that is being made in its folder.

    `counts` are those of all rows so far, and `kept` those of the rows that an earlier start has made.
    """

    def __init__(self, path: Path, folder: Path, request: Request, *, overwrite: bool) -> None:
        self.path, self.folder, self.request, self.overwrite = path, folder, request, overwrite
        self.counts = self.kept = Counts()
        self._num_parts = 0
        self._schema = row_schema(with_unknown=request.coverage is not None)
        self._inputs = hashlib.blake2b(digest_size=16)  # of the digests of all parts

    def write(self, inputs: Iterator[Input], *, answer: Answer, report: Callable[[Errors, int], object]) -> None:
        """Write a row for each input, in their order; one part is in memory at a time.

        `answer` yields the rows of the inputs that no kept part has, in lists of any length. `report` is called for
        each finished part with the files that cannot be read and the number of rows. The file itself and its folder are
        left out where they are among the inputs.
        """
        try:
            self._make_parts(inputs, answer=answer, report=report)
            write_result(self.path, self._tables(), schema=self._schema, top=self.request.top)
            publish(
                self.path,
                request=self.request,
                inputs_digest=self._inputs.hexdigest(),
                counts=self.counts,
                overwrite=self.overwrite,
            )
        except KeyboardInterrupt as error:
            done = f"{self.folder} has the rows of {self.counts.rows:,} inputs"
            raise type(error)(f"{done}; the same command resumes") from None

    def _make_parts(self, inputs: Iterator[Input], *, answer: Answer, report: Callable[[Errors, int], object]) -> None:
        """Make the parts that no earlier start has made."""
        pending, rows = deque[_Part](), list[Row]()
        with closing(answer(self._unanswered(inputs, pending, report=report))) as blocks:
            for block in blocks:
                rows += block
                while pending and len(rows) >= pending[0].rows:
                    part = pending.popleft()
                    self._make_part(part, rows[: part.rows], report=report)
                    del rows[: part.rows]
        assert not rows
        assert not pending

    def _unanswered(
        self, inputs: Iterator[Input], pending: deque[_Part], *, report: Callable[[Errors, int], object]
    ) -> Iterator[Input]:
        """Yield the inputs of the parts that are to be made, each of which is added to `pending` before its inputs."""
        for block, digest in _blocks(inputs, path=self.path):
            part = _Part(self._part_path(self._num_parts), digest, len(block))
            self._inputs.update(digest.encode())
            self._num_parts += 1
            errors = _errors_of_kept(part, block)
            if errors is None:
                pending.append(part)
                yield from block
            else:
                self.kept += Counts(part.rows, len(errors))
                self._count(part, errors, report=report)

    def _make_part(self, part: _Part, rows: Sequence[Row], *, report: Callable[[Errors, int], object]) -> None:
        write_part(part.path, rows, schema=self._schema, inputs_digest=part.inputs_digest)
        self._count(part, [(row.path, row.error) for row in rows if row.error is not None], report=report)

    def _count(self, part: _Part, errors: Errors, *, report: Callable[[Errors, int], object]) -> None:
        self.counts += Counts(part.rows, len(errors))
        report(errors, part.rows)

    def _part_path(self, number: int) -> Path:
        return self.folder / f"{number:06}.parquet"

    def _tables(self) -> Iterator[pa.Table]:
        """Yield the rows of each part."""
        for path in map(self._part_path, range(self._num_parts)):
            found = read_part(path)
            if found is None:
                raise UserError(
                    f"{path}: missing or damaged since it was written; the same command makes it again; if it fails "
                    "again, check the disk"
                )
            yield found[0]


def write_result(path: Path, tables: Iterator[pa.Table], *, schema: pa.Schema, top: int) -> None:
    """Write the rows of all parts into one file, whose format is that of the suffix of `path`."""
    result, suffix = result_of(path), path.suffix.lower()
    if suffix == ".csv":
        write_csv(result, tables, schema=schema, top=top)
    elif suffix == ".parquet":
        parts_per_group = max(1, GROUP_ENTRIES // (PART_ROWS * top))
        write_parquet(result, tables, schema=schema, parts_per_group=parts_per_group)
    else:
        write_json_lines(result, tables)


def _blocks(inputs: Iterator[Input], *, path: Path) -> Iterator[tuple[list[Input], str]]:
    """Yield the inputs of each part and their digest; what is made for the file at `path` is no input."""
    own = [Path(os.path.realpath(each)) for each in (path, folder_of(path), record_of(path))]

    def is_own(name: str) -> bool:
        if path.name not in name:  # in most cases the file system need not be asked
            return False
        real = Path(os.path.realpath(name))
        return any(real.is_relative_to(each) for each in own)

    others = (each for each in inputs if not is_own(each.path))
    while block := list(islice(others, PART_ROWS)):
        yield block, _digest(block)


def _digest(inputs: Sequence[Input]) -> str:
    """Return a hash of the paths of inputs, and of the size and the times of modification and of change of each file.

    The time of change also differs where a file was replaced by one with the same modification time, and where it was
    permitted to read it.
    """
    digest = hashlib.blake2b(digest_size=16)
    for each in inputs:
        try:
            status = os.stat(each.path)  # noqa: PTH116  # 100,000 `Path` objects take a second
            state = f"{state_of(status)} {status.st_ctime_ns}"
        except (OSError, ValueError) as error:
            state = type(error).__name__
        digest.update(json.dumps([each.path, each.error, state]).encode())
    return digest.hexdigest()


def _errors_of_kept(part: _Part, inputs: Sequence[Input]) -> Errors | None:
    """Return the unreadable files of a part that an earlier start has made.

    None where it has made no such part, or a file whose bytes it could not read can be read now.
    """
    found = read_part(part.path)
    if found is None or found[1] != part.inputs_digest or len(found[0]) != part.rows:
        return None
    columns = (found[0][name].to_pylist() for name in ("path", "error", "content_hash"))
    errors = list[tuple[str, str]]()
    for each, path, reason, content_hash in zip(inputs, *columns, strict=True):
        if reason is None:
            continue
        if content_hash is None and is_readable(each):
            return None
        errors.append((path, reason))
    return errors
