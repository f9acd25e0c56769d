"""Paths, atomic writing, reading and checksums of the files that one step writes and another reads.

The folder `artifacts/<step>/` holds the output of a step. Arrays are `.npy` files, which are memory-mapped; all other
files are JSON, CSV, safetensors, PNG or Parquet. `checksums.md5`, in each folder that another step reads, lists the MD5
of its files. `verify` compares them, and so does the command `md5sum -c`.
"""

import csv
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from pipeline.core.errors import UserError, first_line
from pipeline.core.project import copy_hint, pipeline_cache_folder, project_folder

ARTIFACTS = Path("artifacts")
DOWNLOAD = ARTIFACTS / "download"
NORMALIZE = ARTIFACTS / "normalize"
TRAIN = ARTIFACTS / "train"
EVALUATE = ARTIFACTS / "evaluate"
BEST_WEIGHTS = "best.safetensors"  # in `artifacts/train/`: the weights of the selected epoch
HISTORY = "history.csv"  # in `artifacts/train/`: a row for each epoch
SELECTED_COLUMN = "selected"  # of HISTORY: the reason of the selection in the row of the selected epoch, else empty
CHECKSUMS = "checksums.md5"  # a line `<MD5>  <name>` for each other file of the folder, sorted by name, as of `md5sum`
Images = npt.NDArray[np.uint8]  # (N, H, W, C)
Labels = npt.NDArray[np.int64]  # (N,), indices into the class names


def cache_folder(name: str) -> Path:
    """Return the folder of this name in the pipeline's cache, as a relative path if the project is the current folder.

    The cache is for files that must outlive a stage: DVC deletes a stage's outputs before it runs the stage.
    """
    project = project_folder()
    return pipeline_cache_folder(Path() if project == Path.cwd() else project) / name


def expand(path: str) -> Path:
    """Return the path that a user wrote, with `~` replaced by the home folder."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  # Path.expanduser raises where there is no such user


@contextmanager
def add_path_to_errors(path: Path) -> Iterator[None]:
    """Add `path` to an OSError of the block that names no file, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file for writing; at the end of the block it is flushed to the disk and renamed to `path`.

    If the block fails, the temporary file is removed, and a file at `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with add_path_to_errors(path), temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Flush the folder's entries to the disk: a rename must survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replace_folder(target: Path, *, known: Mapping[str, str] | None = None) -> Iterator[Path]:
    """Yield an empty folder that replaces `target` at the end of the block; if the block fails, `target` stays.

    Before that, the files in the folder are listed in `checksums.md5`. The block may add the MD5 of files, computed
    while they were written, to `known`: these files are not read again.
    """
    fresh, old = (target.with_name(f".{target.name}.{word}.tmp") for word in ("new", "old"))
    if old.exists() and not target.exists():  # a run was killed between the two renames below: `old` is complete
        old.rename(target)
    for leftover in (fresh, old):  # a run that was killed did not remove them
        shutil.rmtree(leftover, ignore_errors=True)
    with add_path_to_errors(target):
        fresh.mkdir(parents=True)
        try:
            yield fresh
            write_checksums(fresh, known=known)
            if target.exists():
                target.rename(old)
            fresh.rename(target)
        finally:
            for leftover in (fresh, old):
                shutil.rmtree(leftover, ignore_errors=True)


def write_bytes(path: Path, content: bytes) -> None:
    with atomic(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; raises UserError, with the step to run, where it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(missing_file_message(path)) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}); remove it and run `dvc repro` to make it again") from None


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table with a header; all rows must have the columns of the first one."""
    with atomic(path) as file:
        writer = csv.DictWriter(_Utf8Writer(file), fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table that `write_csv` wrote; all values are text."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class _Utf8Writer:
    """A text file for the module `csv` that writes UTF-8 to a binary file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, text: str) -> int:
        return self._file.write(text.encode("utf-8"))


def write_array(path: Path, blocks: Iterable[npt.NDArray[Any]], *, shape: tuple[int, ...], dtype: npt.DTypeLike) -> str:
    """Write one `.npy` file from blocks along the first axis, and return its MD5; one block is in memory at a time.

    The blocks together must have `shape`; each is cast to `dtype`.
    """
    with atomic(path) as file:
        writer = _HashingWriter(file)
        np.lib.format.write_array_header_2_0(
            writer, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        )
        rows = 0
        for block in blocks:
            writer.write(np.ascontiguousarray(block, dtype=dtype).tobytes())
            rows += len(block)
        assert rows == shape[0], f"{path}: {rows} rows were written, but the header states {shape[0]}"
    return writer.md5


def copy_file(source: Path, target: Path) -> str:
    """Copy a file, and return the MD5 of what was written."""
    with source.open("rb") as content, atomic(target) as file:
        writer = _HashingWriter(file)
        shutil.copyfileobj(content, writer, length=2**20)
    return writer.md5


class _HashingWriter:
    """A writer to a file that computes the MD5 of all that is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest = file, hashlib.md5(usedforsecurity=False)

    def write(self, content: bytes) -> int:
        self._digest.update(content)
        return self._file.write(content)

    @property
    def md5(self) -> str:
        return self._digest.hexdigest()


def read_array(path: Path, *, dtype: npt.DTypeLike, dimensions: int) -> npt.NDArray[Any]:
    """Memory-map an `.npy` file; changes of the array stay in memory, and nothing is unpickled.

    Raises UserError where the file is missing or truncated, or has another dtype or number of dimensions.
    """
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="c", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(missing_file_message(path)) from None
    except Exception as error:  # numpy's parser of headers raises nearly anything: tokenize.TokenError, SyntaxError, …
        raise UserError(
            f"{path}: damaged ({first_line(error)}); remove it and run `dvc repro` to make it again"
        ) from None
    if array.dtype != dtype or array.ndim != dimensions:
        raise UserError(
            f"{path}: found {array.ndim}-dimensional {array.dtype}; allowed: {dimensions}-dimensional "
            f"{np.dtype(dtype)}; remove it and run `dvc repro` to make it again"
        )
    return array


def read_split(split: str, *, folder: Path = NORMALIZE) -> tuple[Images, Labels]:
    """Return images (N, H, W, C) uint8 and labels (N,) int64 of train, validation or test, memory-mapped.

    Raises UserError where one is missing or damaged, or their numbers differ.
    """
    images = read_array(folder / f"{split}_images.npy", dtype=np.uint8, dimensions=4)
    labels = read_array(folder / f"{split}_labels.npy", dtype=np.int64, dimensions=1)
    if len(images) != len(labels):
        raise UserError(
            f"{folder}: {len(images)} {split} images but {len(labels)} labels; run `dvc repro normalize --force`"
        )
    return images, labels


def write_checksums(folder: Path, *, known: Mapping[str, str] | None = None) -> None:
    """Write `checksums.md5` with the MD5 of each file in the folder and its subfolders.

    A file whose MD5 is in `known` is not read.
    """
    md5 = known or {}
    lines = (f"{md5.get(name) or file_md5(folder / name)}  {name}\n" for name in _files(folder))
    write_text(folder / CHECKSUMS, "".join(lines))


def verify(folder: Path, names: Iterable[str] | None = None, *, allow_unlisted: bool = False) -> dict[str, str]:
    """Compare files with the folder's `checksums.md5`, and return the MD5 of all listed files by name.

    `names` are the files to compare, by default all that are listed. With `allow_unlisted` the folder may have files
    that are not listed. Raises UserError for the first file that is missing, changed or not listed.
    """
    listing = folder / CHECKSUMS
    listed = _read_checksums(listing)
    for name in listed if names is None else names:
        if problem := _problem(folder / name, md5=listed.get(name), listing=listing):
            raise UserError(f"{folder / name}: {problem}; {_remedy(folder)}")
    for name in [] if allow_unlisted else _files(folder):
        if name not in listed:
            hint = f"remove it if another program left it, else {_remedy(folder)}"
            raise UserError(f"{folder / name}: not listed in {listing}; {hint}")
    return listed


def verify_splits(*splits: str, with_files: bool = False) -> None:
    """Verify the files of `normalize` that later steps read: `dataset.json` and the arrays of these splits.

    With `with_files` also the names and content hashes of their images are verified.
    """
    kinds = ("images.npy", "labels.npy", *(["files.parquet"] if with_files else []))
    verify(NORMALIZE, ["dataset.json", *(f"{split}_{kind}" for split in splits for kind in kinds)])


def _files(folder: Path) -> list[str]:
    """Return the names of the files except `checksums.md5` and hidden ones, which file managers leave."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("[!.]*") if path.is_file())
    return sorted(name for name in names if name != CHECKSUMS)


def _read_checksums(path: Path) -> dict[str, str]:
    """Return the MD5 of each listed file by name; raises UserError where the list is missing or damaged."""
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(missing_file_message(path)) from None
    except UnicodeDecodeError:
        lines = []
    found = [re.fullmatch("([0-9a-f]{32})  (.+)", line) for line in lines]
    listed = {match[2]: match[1] for match in found if match}
    if not listed or len(listed) != len(lines) - 1 or lines[-1]:  # a complete list ends with the end of a line
        raise UserError(f"{path}: damaged or empty; {_remedy(path.parent)}")
    return listed


def _problem(path: Path, *, md5: str | None, listing: Path) -> str | None:
    """Return what is wrong with a file whose listed MD5 is `md5`, or None."""
    if md5 is None:
        return f"not listed in {listing}"
    try:
        size, found = path.stat().st_size, file_md5(path)
    except FileNotFoundError:
        return f"no such file, but {listing} lists it"
    if found == md5:
        return None
    return f"{f'{size:,} bytes with MD5 {found}' if size else 'empty'}, but {listing} lists MD5 {md5}"


def _remedy(folder: Path) -> str:
    """Return how to restore a damaged folder.

    DVC does not check a cached file that is write-protected or has its old modification time; it even replaces a newly
    made file by the damaged cached one.
    """
    if folder.parent != ARTIFACTS:
        return "copy the folder again from its source"
    return (
        f"`rm -rf {folder} && dvc repro {folder.name}` restores it; if this error appears again, DVC's cache is "
        'damaged: run `find "$(dvc cache dir)" -type f -exec chmod u+w {} + -exec touch {} +` first, which makes DVC '
        "check its cached files"
    )


def missing_file_message(path: Path) -> str:
    """Return the error message for a missing file that another step should have written."""
    if path.parent.parent != ARTIFACTS:
        return f"{path}: no such file"
    return f"{path}: no such file; `dvc repro {path.parent.name}` makes it, `dvc pull` fetches it"


def bytes_md5(content: bytes) -> str:
    """Return the MD5 of the content in hexadecimal."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def check_weights(path: Path, md5: str | None) -> None:
    """Raise UserError where `train.weights` names no file that can be read, or its MD5 is not `train.weights_md5`."""
    if not path.is_file():
        raise UserError(
            f"train.weights: no such file {path}; allowed: null, DEFAULT, or a .safetensors or .pth file; "
            f"set it to one of these{copy_hint(path)}"
        )
    if (found := file_md5(path)) != md5:
        raise UserError(
            f"train.weights_md5 is {md5 or 'null'}, but {path} has {found}; set it to that if you trust the file"
        )


def file_md5(path: Path) -> str:
    """Return the MD5 of a file's content in hexadecimal, as DVC records it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
