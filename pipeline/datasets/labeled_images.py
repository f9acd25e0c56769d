"""Find the images of a folder and their labels, from the names of class folders or from a table.

This module matches the rows of a table with the files; `labels_table.py` reads the table, and `folder_scan.py` finds
the images of class folders.
"""

import difflib
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from pipeline.core.errors import TemporaryError, UserError
from pipeline.datasets.folder_errors import check_is_folder
from pipeline.datasets.folder_scan import (
    COMPANION,
    HIDDEN,
    IMAGE,
    OTHER,
    UNDECODABLE,
    Scan,
    Tally,
    check_counts,
    is_photograph,
    num_files,
    scan,
    undecodable_reason,
    walk,
)
from pipeline.datasets.labels_table import Problem, Row, Table, check, read_table
from pipeline.datasets.layout import shorten_list
from pipeline.images.blocks import SPLITS

DEFAULT_TABLE = "labels.csv"
# the kinds of files that are not used, in the words of the report
UNLISTED = "images that the table of labels does not list"
TABLE = "tables of labels"
LISTED_TWICE = "lines of the table that list an image again, with the same values"


class _File(NamedTuple):
    """A file in the folder: its path, and its kind as `folder_scan` has it."""

    path: Path
    kind: str


def find_images(root: Path, *, labels: str) -> Scan:
    """Return the images in the folder `root` with their labels, from where `download.labels` says that these are.

    Raises UserError where the folder or the table is not as allowed, TemporaryError where the folder changes meanwhile.
    """
    check_is_folder(root)
    if labels == "folders" or (labels == "auto" and not (root / DEFAULT_TABLE).is_file()):
        return scan(root)
    return _scan_table(root, _table_path(root, DEFAULT_TABLE if labels == "auto" else labels))


def _table_path(root: Path, labels: str) -> Path:
    """Return the path of the table; raises UserError where it is not a file inside the folder."""
    path = PurePosixPath(labels)
    problem = None
    if path.is_absolute() or ".." in path.parts:
        problem = "is not inside download.folder"
    elif not (root / path).is_file():
        problem = f"is not a file in {str(root)!r}"
    if problem:
        tables = sorted(each.name for each in root.glob("*.csv"))
        found = f"; it has {shorten_list(tables)}" if tables else ""
        raise UserError(
            f"download.labels: {labels!r} {problem}{found}; allowed: auto, folders, or the path of a CSV file relative "
            "to download.folder; correct it, or put the file there"
        )
    return root / path


def _scan_table(root: Path, path: Path) -> Scan:
    """Find the images that the table lists; raises UserError as `find_images` does."""
    table = read_table(path)
    files = {name: _File(Path(file), kind) for name, file, kind in walk(root, "")}
    own_name = path.relative_to(root).as_posix()
    used, problems, repeated = _match(table, root, files)
    check(table, problems)
    tally = Tally()
    counts, listed, groups = _count(table, used, files, tally)
    for name, file in files.items():
        if name not in used:
            photograph = is_photograph(name, file.kind) or file.kind == COMPANION
            tally.add_unused(name, TABLE if name == own_name else UNLISTED if photograph else OTHER)
    visible, hidden = num_files(root)
    if visible != len(files):
        raise TemporaryError(f"download.folder: {str(root)!r} changes while it is read; try again")
    _check_classes(table, counts)
    check_counts(root, counts)
    not_used = dict(sorted(tally.not_used.items())) | ({HIDDEN: hidden} if hidden else {})
    return Scan(
        class_names=sorted({row.label for row in table.rows}),
        counts=counts,
        undecodable=tally.undecodable,
        ignored=[],
        not_used=not_used,
        examples=tally.examples,
        origin=_origin(table, repeated),
        listed=listed,
        groups=groups,
    )


def _origin(table: Table, repeated: int) -> list[str]:
    """Return lines of text: where the labels are, and what in the table is ignored."""
    lines = [f"labels: {str(table.path)!r}, {len(table.rows):,} lines"]
    if table.other_columns:
        lines.append(f"ignored columns: {', '.join(map(repr, table.other_columns))}")
    if repeated:
        lines.append(f"ignored: {repeated:,} {LISTED_TWICE}")
    return lines


def _match(table: Table, root: Path, files: Mapping[str, _File]) -> tuple[dict[str, Row], list[Problem], int]:
    """Return the row of each listed file by its name in the folder, the problems, and the number of repeated rows."""
    used: dict[str, Row] = {}
    problems, repeated = list[Problem](), 0
    finder = _Finder(table.path.parent.relative_to(root), files)
    for row in table.rows:
        name = finder.find(row)
        if isinstance(name, Problem):
            problems.append(name)
            continue
        other = used.setdefault(name, row)
        if (other.label, other.split, other.group) != (row.label, row.split, row.group):
            problems.append(_contradiction(row, other))
        repeated += other is not row
    return used, problems, repeated


def _contradiction(row: Row, other: Row) -> Problem:
    """Return the problem that two rows list the same image with different values."""
    column = "label" if row.label != other.label else "split" if row.split != other.split else "group"
    found, before = getattr(row, column), getattr(other, column)
    text = (
        f"found {found!r} for {row.image!r}, but {before!r} in line {other.line}; allowed: "
        f"one {column} for each image; remove one of the lines"
    )
    return Problem(row.line, column, lambda: text)


class _Finder:
    """A search for the files that a table names."""

    def __init__(self, base: Path, files: Mapping[str, _File]) -> None:
        """Take the folder of the table, relative to that of the images, and all files in the latter by name."""
        self._base, self._files = base.as_posix(), files
        self._by_file_name: dict[str, list[str]] = defaultdict(list)
        for name in files:
            self._by_file_name[name.rpartition("/")[2]].append(name)

    def find(self, row: Row) -> str | Problem:
        """Return the name, relative to the folder, of the image that a row names, or what is wrong with it."""
        image = row.image
        if image.startswith("/") or image[1:2] == ":" or ".." in image.split("/"):
            return self._problem(row, "a path that may lead out of the folder", "write it relative to the table")
        candidates = [name for name in (f"{self._base}/{image}".removeprefix("./"), image) if name in self._files]
        if not candidates and "/" not in image:
            candidates = self._by_file_name.get(image, [])
            if len(candidates) > 1:
                found = f"a name that {len(candidates)} files have: {shorten_list(candidates)}"
                return self._problem(row, found, "write the path of one of them")
        if not candidates:
            return Problem(row.line, "image", lambda: self._explain_missing(row))
        _, kind = self._files[candidates[0]]
        if kind not in (IMAGE, UNDECODABLE, COMPANION):
            return self._problem(row, f"a file that is no image ({kind})", "correct it, or remove the line")
        return candidates[0]

    @staticmethod
    def _problem(row: Row, found: str, remedy: str) -> Problem:
        text = f"found {row.image!r}, {found}; allowed: an image inside the folder; {remedy}"
        return Problem(row.line, "image", lambda: text)

    def _explain_missing(self, row: Row) -> str:
        """Return what is wrong with a row whose file does not exist, with the most similar name that does."""
        names = list(self._files) if "/" in row.image else list(self._by_file_name)
        close = difflib.get_close_matches(row.image, names, n=1, cutoff=0.6)
        meant = f" (did you mean {close[0]!r}?)" if close else ""
        return (
            f"found {row.image!r}, but there is no such file{meant}; allowed: a path relative to the table, or a file "
            "name that occurs once below the folder; correct it, or remove the line"
        )


def _count(
    table: Table, used: Mapping[str, Row], files: Mapping[str, _File], tally: Tally
) -> tuple[dict[str, dict[str, int]], list[tuple[str, Path]], dict[str, str]]:
    """Return the numbers of images by split and class, (name in the archive, path) of each, and the groups."""
    class_names = sorted({row.label for row in table.rows})
    present = {row.split or "train" for row in table.rows}
    counts = {split: dict.fromkeys(class_names, 0) for split in SPLITS if split in present}
    listed, groups = list[tuple[str, Path]](), dict[str, str]()
    for name, row in used.items():
        split = row.split or "train"
        member, file = f"{split}/{row.label}/{name}", files[name]
        if file.kind == IMAGE:
            counts[split][row.label] += 1
            listed.append((member, file.path))
            if row.group:
                groups[member] = row.group
        else:
            tally.add_unused(name, UNDECODABLE)
            tally.undecodable.append((member, undecodable_reason(str(file.path))))
    return counts, sorted(listed), dict(sorted(groups.items()))


def _check_classes(table: Table, counts: Mapping[str, Mapping[str, int]]) -> None:
    """Raise UserError for a table without the split train, and for one with fewer than two classes."""
    if "train" not in counts:
        raise UserError(
            f"{table.path}: column split: found {', '.join(counts)}, but no train; allowed: train, and validation and "
            "test if wanted; write train in some lines, or empty the column to draw the splits"
        )
    if len(counts["train"]) < 2:
        raise UserError(
            f"{table.path}: column label: found one class only, {next(iter(counts['train']))!r}; allowed: at least "
            "two; add images of another class"
        )
