"""Files between the steps: where they lie, and how they are written (whole or not at all) and read.

Folder `artifacts/<step>/` holds what a step made. Arrays are `.npy`, read memory-mapped; everything else is JSON, CSV
or safetensors. `checksums.md5` in a folder that another step reads lists its files, for `verify` and `md5sum -c` alike.
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
BEST_WEIGHTS = "best.safetensors"  # in TRAIN: the weights of the selected epoch
HISTORY = "history.csv"
"""In `artifacts/train/`: a row for each epoch."""
# column of HISTORY: in the row of the selected epoch the reason for the selection, empty in the other rows
SELECTED = "selected"
CHECKSUMS = "checksums.md5"
"""A line `<MD5>  <name>` for each other file of the folder, sorted by name, as `md5sum` writes them."""
Images = npt.NDArray[np.uint8]
"""(N, H, W, C) uint8."""
Labels = npt.NDArray[np.int64]
"""(N,) int64, indices into the class names."""


def kept_folder(name: str) -> Path:
    """Return a folder below `pipeline_cache_folder`, as a relative path where that is in the project.

    It holds what must outlive a stage: DVC empties a stage's outputs before it runs the stage.
    """
    project = project_folder()
    return pipeline_cache_folder(Path() if project == Path.cwd() else project) / name


def expand(path: str) -> Path:
    """Return the path that a user wrote, with `~` replaced."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  # Path.expanduser raises where there is no such user


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` in errors that name no file, such as a full disk while writing."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that takes the name `path` only once it is whole and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Have the folder's entries on the disk too, should the power go."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replace_folder(target: Path, *, known: Mapping[str, str] | None = None) -> Iterator[Path]:
    """Yield an empty folder beside `target` that takes its place once the block is done; on failure `target` stays.

    What the block left in it is then listed in `checksums.md5`. Files of which `known` has the MD5 by then, taken while
    they were written, are not read again.
    """
    fresh, old = (target.with_name(f".{target.name}.{word}.tmp") for word in ("new", "old"))
    if old.exists() and not target.exists():  # killed between the two renames below: the good one
        old.rename(target)
    for leftover in (fresh, old):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    with naming(target):
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
    """Raises UserError, naming the step to run, where the file is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(missing(path)) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}); remove it and run `dvc repro` to make it again") from None


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table with a header; all rows have the first one's columns."""
    with atomic(path) as file:
        lines = _Lines(file)
        writer = csv.DictWriter(lines, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read the rows of a table that `write_csv` wrote; all values are text."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class _Lines:
    """What `csv` writes to: text in, UTF-8 bytes out."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, text: str) -> int:
        return self._file.write(text.encode("utf-8"))


def write_array(path: Path, blocks: Iterable[npt.NDArray[Any]], *, shape: tuple[int, ...], dtype: npt.DTypeLike) -> str:
    """Write one `.npy` file from blocks along the first axis, one block in memory at a time; returns its MD5.

    The blocks together must have `shape`; each is cast to `dtype`.
    """
    with atomic(path) as file:
        tee = _Tee(file)
        np.lib.format.write_array_header_2_0(
            tee, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        )
        rows = 0
        for block in blocks:
            tee.write(np.ascontiguousarray(block, dtype=dtype).tobytes())
            rows += len(block)
        assert rows == shape[0], f"{path}: {rows} rows written, {shape[0]} announced"
    return tee.md5


def copy_file(source: Path, target: Path) -> str:
    """Copy a file; returns the MD5 of what was written."""
    with source.open("rb") as content, atomic(target) as file:
        tee = _Tee(file)
        shutil.copyfileobj(content, tee, length=2**20)
    return tee.md5


class _Tee:
    """Writes to a file and knows the MD5 of all that was written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest = file, hashlib.md5(usedforsecurity=False)

    def write(self, content: bytes) -> int:
        self._digest.update(content)
        return self._file.write(content)

    @property
    def md5(self) -> str:
        return self._digest.hexdigest()


def read_array(path: Path, *, dtype: npt.DTypeLike, dimensions: int) -> npt.NDArray[Any]:
    """Memory-map an `.npy` file (pages are copied if written to, never the file); never unpickles.

    Raises UserError where it is missing, cut short, or of another type or number of dimensions.
    """
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="c", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(missing(path)) from None
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
    """Images (N, H, W, C) uint8 and labels (N,) int64 of train, validation or test, memory-mapped."""
    images = read_array(folder / f"{split}_images.npy", dtype=np.uint8, dimensions=4)
    labels = read_array(folder / f"{split}_labels.npy", dtype=np.int64, dimensions=1)
    if len(images) != len(labels):
        raise UserError(
            f"{folder}: {len(images)} {split} images but {len(labels)} labels; run `dvc repro normalize --force`"
        )
    return images, labels


def write_checksums(folder: Path, *, known: Mapping[str, str] | None = None) -> None:
    """List the files that are in the folder now, those of its subfolders included, with their MD5, or that `known`."""
    md5 = known or {}
    lines = (f"{md5.get(name) or file_md5(folder / name)}  {name}\n" for name in _files(folder))
    write_text(folder / CHECKSUMS, "".join(lines))


def verify(folder: Path, names: Iterable[str] | None = None, *, allow_unlisted: bool = False) -> dict[str, str]:
    """Compare files with the folder's `checksums.md5` before they are used; returns MD5 by name, of all listed files.

    `names` are the files that will be read, by default all that are listed. `allow_unlisted` accepts further files.
    Raises UserError naming the first file that is missing, changed or not listed.
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


def verify_splits(*splits: str) -> None:
    """Verify what steps after normalize read: `dataset.json` and the arrays of these splits."""
    arrays = (f"{split}_{kind}.npy" for split in splits for kind in ("images", "labels"))
    verify(NORMALIZE, ["dataset.json", *arrays])


def _files(folder: Path) -> list[str]:
    """Return the names of the files except `checksums.md5` and hidden ones, which file managers leave."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("[!.]*") if path.is_file())
    return sorted(name for name in names if name != CHECKSUMS)


def _read_checksums(path: Path) -> dict[str, str]:
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(missing(path)) from None
    except UnicodeDecodeError:
        lines = []
    found = [re.fullmatch("([0-9a-f]{32})  (.+)", line) for line in lines]
    listed = {match[2]: match[1] for match in found if match}
    if not listed or len(listed) != len(lines) - 1 or lines[-1]:  # the last line has an end too
        raise UserError(f"{path}: damaged or empty; {_remedy(path.parent)}")
    return listed


def _problem(path: Path, *, md5: str | None, listing: Path) -> str | None:
    """Return what is wrong with a file whose listed MD5 is `md5`, or None."""
    if md5 is None:
        return f"not listed in {listing}"
    try:
        size, found = path.stat().st_size, file_md5(path)
    except FileNotFoundError:
        return f"no such file, but {listing} has it"
    if found == md5:
        return None
    return f"{size:,} bytes with MD5 {found} instead of {md5}, by {listing}" if size else f"empty, not so by {listing}"


def _remedy(folder: Path) -> str:
    """Return how to restore an undamaged folder.

    DVC trusts a cached file that is write-protected or has its old modification time; it even replaces a newly made
    file by the damaged one.
    """
    if folder.parent != ARTIFACTS:
        return "copy the folder again from where it came"
    return (
        f"`rm -rf {folder} && dvc repro {folder.name}` brings it back; if this comes again, DVC's cache is damaged: "
        'let it look with `find "$(dvc cache dir)" -type f -exec chmod u+w {} + -exec touch {} +` first'
    )


def missing(path: Path) -> str:
    """Return the message about a missing file between two steps."""
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
            f"train.weights: no such file {path}; allowed: null, DEFAULT, or a .safetensors or .pth file"
            f"{copy_hint(path)}"
        )
    if (found := file_md5(path)) != md5:
        raise UserError(
            f"train.weights_md5 is {md5 or 'null'}, but {path} has {found}; set it to that if the file is right"
        )


def file_md5(path: Path) -> str:
    """Return the MD5 of a file's content in hexadecimal, as DVC records it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
