"""Copy files into and out of a backup, only those that are missing there, and compare them with their MD5."""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flows.dvc_state import CACHE_OBJECT
from pipeline.artifacts import atomic, copy_file, file_md5

_RUN = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}/[0-9a-f]{64}")  # an entry of DVC's run cache, named by its content
_TEMPORARY = re.compile(r"\..+\.[0-9]+\.tmp")  # a name that `pipeline.artifacts.atomic` makes


class _DamagedError(Exception):
    """The error for a file whose content does not have its MD5."""


@dataclass
class CopyResult:
    """The result of copying one tree to another.

    `md5` has the MD5 of each file by its path in the tree, and `num_new` is the number of files that were copied.
    `left_out` has a text `<path> (<reason>)` for each file or folder that is damaged or cannot be read. `kept` are the
    paths of files that exist in the target with another size, and were not replaced.
    """

    md5: dict[str, str] = field(default_factory=dict)
    num_new: int = 0
    left_out: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    @contextmanager
    def report_unreadable(self, path: Path, *, name: str = "") -> Iterator[None]:
        """Add `name`, by default `path`, to `left_out` where the block cannot read `path`.

        OSErrors of all other files are raised.
        """
        try:
            yield
        except _DamagedError:
            self.left_out.append(f"{name or path} (damaged)")
        except OSError as error:
            if error.filename is None or os.fspath(error.filename) != str(path):
                raise
            self.left_out.append(f"{name or path} ({error.strerror})")


def copy_objects(source: Path, target: Path, *, protect: bool = False) -> CopyResult:
    """Copy the files of a DVC cache, `<2 digits>/<30 digits>` of their MD5, that `target` does not have yet.

    With `protect` the copies are write-protected, as DVC keeps its own.
    """
    result = CopyResult()
    for name in filter(CACHE_OBJECT.fullmatch, _files(source, result)):
        md5 = name.replace("/", "").removesuffix(".dir")
        with result.report_unreadable(source / name):
            result.num_new += _copy_object(source / name, target / name, md5=md5, protect=protect)
            result.md5[name] = md5
    return result


def copy_run_cache(source: Path, target: Path) -> CopyResult:
    """Copy the entries of DVC's run cache that `target` does not have yet."""
    result = CopyResult()
    for name in filter(_RUN.fullmatch, _files(source, result)):
        with result.report_unreadable(source / name):
            if not (target / name).exists():
                copy_file(source / name, target / name)
                result.num_new += 1
    return result


def store_files(source: Path, objects: Path) -> CopyResult:
    """Copy each file of a tree to its place by MD5 below `objects`, where that does not have it yet."""
    result = CopyResult()
    for name in _files(source, result):
        with result.report_unreadable(source / name):
            md5, is_new = _store_file(source / name, objects)
            result.md5[name] = md5
            result.num_new += is_new
    return result


def restore_files(objects: Path, target: Path, *, md5: Mapping[str, str]) -> CopyResult:
    """Copy the files of `md5`, as `store_files` stored them, that `target` does not have; existing files stay."""
    result = CopyResult()
    for name, expected in md5.items():
        stored = objects / object_name(expected)
        with result.report_unreadable(stored, name=str(target / name)):
            if not (target / name).exists():
                result.num_new += _copy_object(stored, target / name, md5=expected)
            elif (target / name).stat().st_size != stored.stat().st_size:
                result.kept.append(name)
            result.md5[name] = expected
    return result


def remove_temporary_files(folder: Path) -> None:
    """Remove the files that a killed backup was writing below a folder of stored files."""
    for path in list(folder.rglob(".*.tmp")):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def object_name(md5: str) -> str:
    """Return the path of a file with this MD5 below a folder of stored files."""
    return f"{md5[:2]}/{md5[2:]}"


def _store_file(source: Path, objects: Path) -> tuple[str, bool]:
    """Store a file by its MD5; returns the MD5, and whether the file was copied."""
    md5 = file_md5(source)
    if _has_same_size(source, objects / object_name(md5)):
        return md5, False
    incoming = objects / "incoming"
    md5 = copy_file(source, incoming)  # another MD5 where the file has changed since
    target = objects / object_name(md5)
    target.parent.mkdir(exist_ok=True)
    incoming.replace(target)
    return md5, True


def _copy_object(source: Path, target: Path, *, md5: str, protect: bool = False) -> bool:
    """Copy a file unless it is there; returns whether it was copied. Raises _DamagedError where its MD5 is another."""
    if _has_same_size(source, target):
        return False
    with source.open("rb") as content, atomic(target) as file:
        digest = hashlib.md5(usedforsecurity=False)
        while block := content.read(2**20):
            digest.update(block)
            file.write(block)
        if digest.hexdigest() != md5:
            raise _DamagedError
        if protect:
            os.fchmod(file.fileno(), 0o444)
    return True


def _has_same_size(source: Path, target: Path) -> bool:
    """Return whether `target` exists with the size of `source`."""
    return target.exists() and target.stat().st_size == source.stat().st_size


def _files(folder: Path, result: CopyResult) -> Iterator[str]:
    """Yield the paths of all files below the folder, sorted; folders that cannot be read are added to the result."""
    if folder.exists():
        yield from (path.relative_to(folder).as_posix() for path in _walk(folder, result, parents=()))


def _walk(folder: Path, result: CopyResult, *, parents: tuple[Path, ...]) -> Iterator[Path]:
    """Yield the files below the folder, those behind links included, without those that are being written."""
    parents = (*parents, folder.resolve())
    paths: list[Path] = []
    with result.report_unreadable(folder):
        paths = sorted(folder.iterdir())
    for path in paths:
        if not os.path.isdir(path):  # noqa: PTH112  # Path.is_dir raises where a folder cannot be read
            if not _TEMPORARY.fullmatch(path.name):
                yield path
        elif path.resolve() not in parents:  # a link to a parent would be followed forever
            yield from _walk(path, result, parents=parents)
