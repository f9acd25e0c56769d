"""Read a table of labels: a CSV file with the columns image and label and, if wanted, split and group.

Nothing is looked up in the folder here. `labeled_images.py` finds the images that the rows name.
"""

import csv
import io
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.datasets.layout import SPLIT_WORDS, split_of
from pipeline.datasets.source import check_class_names
from pipeline.images.blocks import SPLITS

REQUIRED_COLUMNS, OPTIONAL_COLUMNS = ("image", "label"), ("split", "group")
KNOWN_COLUMNS = (*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS)
DELIMITERS = ",;\t"
MAX_PROBLEMS_SHOWN = 3
_ALLOWED_COLUMNS = "the columns image and label and, if wanted, split and group, in a first line with these names"


@dataclass(frozen=True)
class Row:
    """One line of the table; `line` is its number in the file, from 1."""

    line: int
    image: str  # as written, with / between folders
    label: str
    split: str  # train, validation or test; "" where the table has no splits
    group: str  # "" for none


@dataclass(frozen=True)
class Problem:
    """What is wrong with one line; `explain` returns what was found, what is allowed, and what to do."""

    line: int
    column: str
    explain: Callable[[], str]  # a function, as it may search for a similar name: only the first ones are called


@dataclass(frozen=True)
class Table:
    """The content of a table of labels."""

    path: Path
    rows: list[Row]
    other_columns: list[str]  # in the order of the file; they are ignored
    problems: list[Problem]  # of lines that are not in `rows`, or whose values contradict those of another line


def read_table(path: Path) -> Table:
    """Read a table: UTF-8, with commas, semicolons or tabs between the fields; blanks around a field do not count.

    Raises UserError where the file cannot be read as a table or has not the required columns. What is wrong with
    single lines is returned, so that `check` can report it together with what is wrong with their images.
    """
    reader = _reader(path)
    header = [_clean(field).casefold() for field in next(reader)[1]]
    _check_header(path, header)
    rows, problems = list[Row](), list[Problem]()
    for line, fields in reader:
        if len(fields) != len(header):
            found = f"{len(fields)} {'field' if len(fields) == 1 else 'fields'}"
            remedy = "put a field with a comma or semicolon in it between quotes"
            problems.append(_problem(line, "all columns", found, f"{len(header)}, as in line 1", remedy))
            continue
        values = {name: _clean(field) for name, field in zip(header, fields, strict=True)}
        row = Row(
            line,
            values["image"].replace("\\", "/").removeprefix("./"),
            values["label"],
            values.get("split", ""),
            values.get("group", ""),
        )
        if problem := _problem_of_row(row):
            problems.append(problem)
        else:
            rows.append(row)
    rows, of_splits = _with_splits(rows)
    problems += [*of_splits, *_similar_labels(rows), *_divided_groups(rows)]
    return Table(path, rows, [name for name in header if name not in KNOWN_COLUMNS], problems)


def check(table: Table, more: Sequence[Problem] = ()) -> None:
    """Raise UserError with the first of all problems and their number, where there are any."""
    problems = sorted([*table.problems, *more], key=lambda problem: problem.line)
    if problems:
        shown = ". ".join(
            f"Line {each.line}, {each.column}: {each.explain()}" for each in problems[:MAX_PROBLEMS_SHOWN]
        )
        hidden = len(problems) - MAX_PROBLEMS_SHOWN
        number = len({problem.line for problem in problems})
        lines = "1 line is" if number == 1 else f"{number:,} lines are"
        raise UserError(f"{table.path}: {lines} wrong. {shown}{f'. {hidden:,} more' if hidden > 0 else ''}")
    if not table.rows:
        raise UserError(
            f"{table.path}: found no images; allowed: a line for each, below the names of the columns; add them"
        )


def _problem(line: int, column: str, found: str, allowed: str, remedy: str) -> Problem:
    return Problem(line, column, lambda: f"found {found}; allowed: {allowed}; {remedy}")


def _reader(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of the line, fields) of each line that is not blank; raises UserError where there is none."""
    text = _text(path)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text), strict=True)
    line, num_lines = 1, 0
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                yield line, fields
                num_lines += 1
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}: line {line}, all columns: found {error}; allowed: fields with both quotes, or none; "
            "add the quote that is missing in this line or before it"
        ) from None
    if not num_lines:
        raise UserError(f"{path}: found an empty file; allowed: {_ALLOWED_COLUMNS}; fill it, or set download.labels")


def _text(path: Path) -> str:
    """Return the text of the file without a byte order mark; raises UserError where it is not UTF-8."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f'{path}: line {line}: found bytes that are not UTF-8; allowed: UTF-8; save it as "CSV UTF-8"'
        ) from None
    if "\0" in text:
        raise UserError(f'{path}: found a zero byte; allowed: a CSV file in UTF-8; save it as "CSV UTF-8"')
    return text


def _delimiter(text: str) -> str:
    """Return the delimiter that splits the first line into the most columns that are known; a comma where none does."""
    first = next((line for line in text.splitlines() if line.strip()), "")

    def num_known(delimiter: str) -> int:
        fields = next(csv.reader([first], delimiter=delimiter), [])
        return sum(_clean(field).casefold() in KNOWN_COLUMNS for field in fields)

    return max(DELIMITERS, key=num_known)


def _clean(field: str) -> str:
    """Return a field without blanks around it, in Unicode's composed form, as the names of files are compared."""
    return unicodedata.normalize("NFC", field.strip())


def _check_header(path: Path, header: list[str]) -> None:
    """Raise UserError where a column is missing or occurs twice."""
    missing = [name for name in REQUIRED_COLUMNS if name not in header]
    twice = [name for name in KNOWN_COLUMNS if header.count(name) > 1]
    if missing or twice:
        what = f"no column {' and no column '.join(missing)}" if missing else f"two columns {twice[0]}"
        raise UserError(
            f"{path}: line 1: found {what} in {', '.join(map(repr, header))}; allowed: {_ALLOWED_COLUMNS}; rename a "
            "column, or set download.labels=folders if the class folders have the labels"
        )


def _problem_of_row(row: Row) -> Problem | None:
    """Return what is wrong with the fields of a row, or None."""
    line = row.line
    if not row.image:
        return _problem(line, "image", "nothing", "the path of an image", "write it, or remove the line")
    if not row.label:
        remedy = "write it, or remove the line: an image that is not listed is not used"
        return _problem(line, "label", "nothing", "the name of a class", remedy)
    if row.label in (".", "..", "predicted_class") or not _is_class_name(row.label):
        allowed = "printable characters without /, and not ., .. or predicted_class"
        return _problem(line, "label", repr(row.label), allowed, "rename the class")
    if row.split and split_of(row.split) is None:
        words = ", ".join(
            f"{split} ({', '.join(word for word, meant in SPLIT_WORDS.items() if meant == split and word != split)})"
            for split in SPLITS
        )
        return _problem(line, "split", repr(row.split), words, "correct it, or remove the column to draw the splits")
    if not row.group.isprintable():
        return _problem(line, "group", repr(row.group), "printable characters", "rename the group")
    return None


def _is_class_name(name: str) -> bool:
    try:
        check_class_names([name], origin="")
    except UserError:
        return False
    return True


def _with_splits(rows: list[Row]) -> tuple[list[Row], list[Problem]]:
    """Return the rows with the names of their splits; it is a problem if only some rows have one."""
    first = next((row for row in rows if row.split), None)
    if first is None:
        return rows, []
    problems = [
        _problem(row.line, "split", f"nothing, but {first.split!r} in line {first.line}",
                 "a split in all lines or in none", "write it, or empty the column to draw the splits")
        for row in rows if not row.split
    ]  # fmt: skip
    named = [Row(row.line, row.image, row.label, split_of(row.split) or "", row.group) for row in rows]
    return named, problems


def _similar_labels(rows: list[Row]) -> Iterator[Problem]:
    """Yield the first line of each label that differs from an earlier one only in case, which is probably a mistake."""
    first: dict[str, Row] = {}
    reported = set[str]()
    for row in rows:
        other = first.setdefault(row.label.casefold(), row)
        if other.label != row.label and row.label not in reported:
            reported.add(row.label)
            found = f"{row.label!r}, but {other.label!r} in line {other.line}"
            yield _problem(row.line, "label", found, "names that differ in more than case", "rename one")


def _divided_groups(rows: list[Row]) -> Iterator[Problem]:
    """Yield the first line of each group that is in another split than an earlier line of the same group."""
    first: dict[str, Row] = {}
    reported = set[str]()
    for row in rows:
        other = first.setdefault(row.group, row) if row.group else row
        if other.split != row.split and row.group not in reported:
            reported.add(row.group)
            found = f"{row.group!r} in {row.split}, but in {other.split} in line {other.line}"
            yield _problem(row.line, "group", found, "each group in one split", "change the split or the group")
