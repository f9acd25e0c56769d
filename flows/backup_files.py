"""Files in a backup: how they are copied, only where they are not there yet, and compared with their MD5."""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.artifacts import atomic, copy_file, file_md5

_OBJECT = re.compile(r"[0-9a-f]{2}/[0-9a-f]{30}(\.dir)?")


@dataclass
class Copied:
    """What was copied from one tree to another.

    `md5` has the MD5 of each file by its path in the tree, `num_new` counts the copied ones. `damaged` are the paths of
    files whose content is not that of their MD5; they are not copied.
    """

    md5: dict[str, str] = field(default_factory=dict)
    num_new: int = 0
    damaged: list[str] = field(default_factory=list)


class _DamagedError(Exception):
    """The content of a file does not have its MD5."""


def copy_objects(source: Path, target: Path, *, protect: bool = False) -> Copied:
    """Copy the files of a DVC cache, `<2 digits>/<30 digits>` of their MD5, that `target` does not have yet.

    With `protect` the copies are write-protected, as DVC keeps its own.
    """
    copied = Copied()
    for name in _files(source):
        if not _OBJECT.fullmatch(name):
            continue  # a temporary file
        md5 = name.replace("/", "").removesuffix(".dir")
        try:
            copied.num_new += _copy_object(source / name, target / name, md5=md5, protect=protect)
            copied.md5[name] = md5
        except _DamagedError:
            copied.damaged.append(name)
        except FileNotFoundError:
            continue  # removed meanwhile
    return copied


def _copy_object(source: Path, target: Path, *, md5: str, protect: bool = False) -> bool:
    """Copy a file unless it is there; returns whether it was copied. Raises _DamagedError where its MD5 is another."""
    if target.exists() and target.stat().st_size == source.stat().st_size:
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


def copy_changed(source: Path, target: Path, *, known: Mapping[str, str]) -> Copied:
    """Copy the files that `target` does not have with the same size and time of change.

    `known` has MD5s of an earlier copy, which are taken for files that have not changed since.
    """
    copied = Copied()
    for name in _files(source):
        with suppress(FileNotFoundError):  # removed meanwhile
            state = (source / name).stat()
            if _version(target / name) == (state.st_size, state.st_mtime_ns):
                copied.md5[name] = known.get(name) or file_md5(target / name)
            else:
                copied.md5[name] = copy_file(source / name, target / name)
                os.utime(target / name, ns=(state.st_atime_ns, state.st_mtime_ns))
                copied.num_new += 1
    return copied


def copy_missing(source: Path, target: Path, *, md5: Mapping[str, str]) -> tuple[Copied, list[str]]:
    """Copy the files of `md5` that `target` does not have; what is there stays as it is.

    Also returns the names of those that are there with another size.
    """
    copied, kept = Copied(), []
    for name, expected in md5.items():
        if (target / name).exists():
            kept += [name] if (target / name).stat().st_size != (source / name).stat().st_size else []
            continue
        try:
            copied.num_new += _copy_object(source / name, target / name, md5=expected)
            copied.md5[name] = expected
        except (_DamagedError, FileNotFoundError):
            copied.damaged.append(name)
    return copied, kept


def _version(path: Path) -> tuple[int, int] | None:
    with suppress(FileNotFoundError):
        return path.stat().st_size, path.stat().st_mtime_ns
    return None


def _files(folder: Path) -> Iterator[str]:
    """Yield the paths of all files below the folder, sorted, without those that are being written."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if not name.endswith(".tmp"):
                yield (Path(parent) / name).relative_to(folder).as_posix()
