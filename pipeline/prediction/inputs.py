"""Find the image files that a command line names: files, folders, patterns, and a list on standard input."""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from io import BufferedIOBase
from typing import NamedTuple

from pipeline.core.errors import UserError
from pipeline.datasets.layout import is_hidden, suffix
from pipeline.images.decode import IMAGE_SUFFIXES, RAW_SUFFIXES, UNDECODABLE_SUFFIXES, VIDEO_SUFFIXES, is_image_content

LIST = "-"  # the argument for a list of paths on standard input
MAX_PATH_BYTES = 2**16  # of a path in the list; Linux allows 4,096
_MAGIC = re.compile(r"[*?\[]")
_WINDOWS_LINE = "no such file; the line ends with a carriage return, as lines on Windows do; remove it: `tr -d '\\r'`"
_HERE_ONLY = ("/dev/", "/proc/")  # such as /dev/stdin, which is another file in another process


class Input(NamedTuple):
    """A path to classify, or the reason why nothing can be read there.

    A path with bytes that are not UTF-8 has surrogates for them, as `os.fsdecode` returns. `here_only` is True for what
    other processes cannot open by its path, such as the pipe of the shell's `<(…)`.
    """

    path: str
    error: str = ""
    here_only: bool = False


def expand_paths(arguments: Sequence[str], *, stdin: BufferedIOBase, null: bool) -> Iterator[Input]:
    """Yield the inputs that the arguments name, in their order; what is named twice is yielded twice.

    - A folder stands for the images in it and in its folders: those of a folder sorted by name, then those of its
      folders. Images are recognized by their suffix, and by their first bytes where they have no known suffix; camera
      raw files are yielded too unless an image of the same name is beside them. Hidden files are left out. Links are
      followed, except those to a folder that they are in.
    - A pattern with `*`, `?`, `[…]` or one `**` stands for the files that match, and for the images in the folders that
      match unless it has `**`; a file or folder of that very name has precedence.
    - `-` stands for the list of paths on `stdin`, one a line, or with `null` each followed by a NUL byte. Its paths are
      those of files, and empty ones are left out.

    Where an argument stands for nothing, an input with the reason is yielded. Only the names of one folder and of the
    folders beside those above it are held in memory. Raises UserError as `check_paths`, and for a list that is none.
    """
    check_paths(arguments)
    for argument in arguments:
        yield from _read_list(stdin, null=null) if argument == LIST else _expand(argument)


def check_paths(arguments: Sequence[str]) -> None:
    """Raise UserError for a second `-`, and for a pattern with `**` twice."""
    if arguments.count(LIST) > 1:
        raise UserError(f"found {LIST}, the list on standard input, twice; allowed: once; remove one")
    for argument in arguments:
        if argument.split("/").count("**") > 1 and not os.path.lexists(argument):
            raise UserError(f"{argument}: a pattern with ** twice; allowed: once; use * for the other folders")


def _read_list(stdin: BufferedIOBase, *, null: bool) -> Iterator[Input]:
    """Yield the paths of the list."""
    is_empty = True
    for path in _split(stdin, separator=b"\0" if null else b"\n"):
        if b"\0" in path:
            raise UserError(
                "standard input: found a NUL byte; allowed without --null: one path a line; add --null for a list such "
                "as `find -print0` writes"
            )
        if path:
            is_empty = False
            text = os.fsdecode(path)
            is_windows_line = not null and text.endswith("\r") and not os.path.lexists(text)
            yield Input(text, _WINDOWS_LINE if is_windows_line else "", here_only=_is_here_only(text))
    if is_empty:
        raise UserError("standard input: no paths; allowed: one or more; check the command that writes the list")


def _split(stdin: BufferedIOBase, *, separator: bytes) -> Iterator[bytes]:
    """Yield what is between the separators; raises UserError where that is too long for a path."""
    rest = b""
    while block := stdin.read1(MAX_PATH_BYTES):
        *paths, rest = (rest + block).split(separator)
        if len(rest) > MAX_PATH_BYTES:
            raise UserError(
                f"standard input: found a path of more than {MAX_PATH_BYTES:,} bytes; allowed: one path a line, or "
                "with --null paths separated by NUL bytes; pass images as arguments, not as input"
            )
        yield from paths
    yield rest


def _is_here_only(path: str) -> bool:
    """Return whether another process may find nothing, or something else, at this path."""
    if path.startswith(_HERE_ONLY):
        return True
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)  # noqa: PTH116  # 100,000 `Path` objects take a second
    except OSError:
        return False


def _expand(argument: str) -> Iterator[Input]:
    """Yield the inputs of a path or pattern."""
    if os.path.isdir(argument):  # noqa: PTH112
        yield from _images_in(argument)
    elif _MAGIC.search(argument) and not os.path.lexists(argument):
        yield from _matching(argument)
    else:
        yield Input(argument, here_only=_is_here_only(argument))


def _images_in(top: str) -> Iterator[Input]:
    """Yield the images in a folder and its folders, and the folders that cannot be listed."""
    is_empty = True
    for folder, names, error in _walk(top):
        found = [Input(folder, error)] if error else (Input(path) for path in _photographs(folder, names))
        for each in found:
            is_empty = False
            yield each
    if is_empty:
        yield Input(top, "a folder without images; name one with images")


def _photographs(folder: str, names: list[str]) -> Iterator[str]:
    """Yield the paths of the images among the files of a folder, in their order."""
    stems: set[str] | None = None
    for name in names:
        found = suffix(name)
        if found in RAW_SUFFIXES:
            if stems is None:
                stems = {_stem(other) for other in names if suffix(other) in IMAGE_SUFFIXES}
            is_used = _stem(name) not in stems
        elif found in UNDECODABLE_SUFFIXES or found in VIDEO_SUFFIXES:
            is_used = False
        else:
            is_used = found in IMAGE_SUFFIXES or _looks_like_an_image(os.path.join(folder, name))  # noqa: PTH118
        if is_used:
            yield os.path.join(folder, name)  # noqa: PTH118


def _stem(name: str) -> str:
    return name.rpartition(".")[0].lower()


def _walk(top: str) -> Iterator[tuple[str, list[str], str]]:
    """Yield each folder from the top down, with the sorted names of its files, or with the reason why it has none.

    The top "" is the current folder, whose name is not part of the paths.
    """
    pending = [(top, frozenset[tuple[int, int]]())]
    while pending:
        folder, above = pending.pop()
        try:
            status = os.stat(folder or os.curdir)  # noqa: PTH116
            files, folders = _list(folder)
        except OSError as error:
            yield folder, [], describe_os_error(error)
            continue
        if (identity := (status.st_dev, status.st_ino)) not in above:
            yield folder, files, ""
            pending += [(os.path.join(folder, name), above | {identity}) for name in reversed(folders)]  # noqa: PTH118


def _list(folder: str, *, hidden: bool = False) -> tuple[list[str], list[str]]:
    """Return the sorted names of the files and of the folders in a folder; pipes and devices are left out.

    Raises OSError where the folder cannot be read.
    """
    files, folders = list[str](), list[str]()
    with os.scandir(folder or os.curdir) as entries:
        for entry in entries:
            if not hidden and is_hidden(entry.name):
                continue
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link that leads nowhere: the reason is found when it is read
                is_folder, is_file = False, True
            if is_folder:
                folders.append(entry.name)
            elif is_file or (entry.is_symlink() and not os.path.exists(entry.path)):  # noqa: PTH110
                files.append(entry.name)
    return sorted(files), sorted(folders)


def _matching(pattern: str) -> Iterator[Input]:
    """Yield the inputs that a pattern stands for."""
    parts = pattern.split("/")
    is_empty = True
    for found in _matches("", parts):
        is_folder = not found.error and os.path.isdir(found.path)  # noqa: PTH112
        if not (is_folder and "**" in parts):
            is_empty = False
            yield from _images_in(found.path) if is_folder else [found]
    if is_empty:
        yield Input(pattern, "no file matches this pattern")


def _matches(prefix: str, parts: Sequence[str]) -> Iterator[Input]:
    """Yield the files and folders whose paths begin with a prefix, "" or a folder with "/", and match the parts.

    A folder that cannot be listed is yielded with the reason.
    """
    part, *others = parts
    if part == "**":
        for folder, _, error in _walk(prefix):
            below = os.path.join(folder, "")  # noqa: PTH118  # adds a "/" where there is none
            yield from [Input(folder, error)] if error else _matches(below, others or ["*"])
        return
    try:
        names = _matching_names(prefix, part, only_folders=bool(others))
    except OSError as error:
        yield Input(prefix, describe_os_error(error))
        return
    for name in names:
        yield from _matches(f"{prefix}{name}/", others) if others else [Input(prefix + name)]


def _matching_names(prefix: str, part: str, *, only_folders: bool) -> list[str]:
    """Return the sorted names in a folder that match a part of a pattern; hidden ones only where it begins with "."."""
    if not _MAGIC.search(part):
        is_root = not prefix + part  # the pattern begins with "/"
        return [part] if is_root or os.path.lexists(prefix + part) else []
    if not os.path.isdir(prefix or os.curdir):  # noqa: PTH112
        return []
    files, folders = _list(prefix, hidden=part.startswith("."))
    return [name for name in (folders if only_folders else sorted(files + folders)) if fnmatchcase(name, part)]


def _looks_like_an_image(path: str) -> bool:
    """Return whether a file begins as images of common formats do; False where it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123
            return is_image_content(file.read(16))
    except OSError:
        return False


def describe_os_error(error: OSError) -> str:
    """Return why a file cannot be read, in one line."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "a folder; in a list on standard input, name files"
    return error.strerror or str(error)
