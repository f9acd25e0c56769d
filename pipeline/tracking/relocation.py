"""Correct the absolute paths of artifacts in MLflow's sqlite store after the project was moved, renamed or copied.

Such a path is `<folder>/mlartifacts/…`, where `<folder>` is where the project was when MLflow wrote the path.
"""

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from pipeline.core.project import artifact_folder
from pipeline.core.sqlite import DAMAGED_CODES, error_code, sqlite_errors, sqlite_path

# tables, and their columns that hold a path or a `file://` URI
LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
MAX_BUSY_SECONDS = 60  # how long sqlite waits for a lock of another process
PROJECT_FILES = ("mlflow.db", "dvc.yaml")  # a folder that has one of these files is a project
_LOCATION = re.compile(r"(?P<root>(file:|/).*/mlartifacts)(?P<rest>/.*)?")


@dataclass(frozen=True)
class _Change:
    """A row whose path changes from `old` to `new`."""

    table: str
    column: str
    row: int
    old: str
    new: str


def relocate(uri: str, project: Path) -> str | None:
    """Correct the paths in the project's own sqlite store to its folder of artifacts; return a message if any changed.

    A path is not changed where its artifacts exist there and not in the project, or where it is an experiment's folder
    outside of any project. All rows are changed or none. A store that is no sqlite file in the project is not changed.
    Raises TemporaryError where another process has the store locked, UserError where it cannot be changed.
    """
    if not needs_relocation(uri, project):
        return None
    path = _own_store(uri, project)
    assert path
    problem = "holds paths of another folder, since the project was moved or copied, and cannot be changed"
    with closing(_open(path)) as store, sqlite_errors(path, problem=problem):
        num_changed = _correct(store, artifact_folder(project))
    return f"{path.name}: {num_changed} paths of artifacts were corrected, since the project is in {project} now"


def needs_relocation(uri: str, project: Path) -> bool:
    """Return whether `relocate` would change paths in the store; raises TemporaryError, UserError if it is unreadable.

    A damaged store needs none: MLflow, which opens it next, reports the damage.
    """
    path = _own_store(uri, project)
    if path is None:
        return False
    with closing(_open(path)) as store, sqlite_errors(path, problem="cannot be read"):
        try:
            return any(_changes(store, artifact_folder(project)))
        except sqlite3.Error as error:
            if error_code(error) in DAMAGED_CODES:
                return False
            raise


def _own_store(uri: str, project: Path) -> Path | None:
    """Return the sqlite file in the project that an address names, or None."""
    path = sqlite_path(uri)
    return path if path and path.is_file() and path.resolve().is_relative_to(project) else None


def _open(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=MAX_BUSY_SECONDS, isolation_level=None)


def base_folder(location: str) -> Path | None:
    """Return the folder that must exist if a location of artifacts was ever written to; None for `s3://…` and the like.

    That is `…/mlartifacts`; else the parent of `mlruns`, MLflow's own default, or of the folder that the user chose.
    """
    if not location.startswith(("file:", "/")):
        return None
    if found := _LOCATION.fullmatch(location):
        return _path(found["root"])
    folder = _path(location).parent
    return folder.parent if folder.name == "mlruns" else folder


def _correct(store: sqlite3.Connection, folder: Path) -> int:
    """Correct all paths in one transaction; return how many were changed."""
    store.execute("BEGIN IMMEDIATE")  # a second process then finds nothing left to change
    changes = list(_changes(store, folder))
    for change in changes:
        update = f"UPDATE {change.table} SET {change.column} = ? WHERE rowid = ?"  # noqa: S608  # our own names
        store.execute(update, (change.new, change.row))
    store.execute("COMMIT")
    return len(changes)


def _changes(store: sqlite3.Connection, folder: Path) -> Iterator[_Change]:
    """Yield a change for each row whose path should lead to `folder`.

    The path of a run or model is not changed where its files exist there and not in `folder`: another project may own
    them. The path of an experiment, to which new files go, is not changed where it exists and is in no project: then
    the user chose it.
    """
    for table, column in LOCATIONS:
        if column not in {name for _, name, *_ in store.execute(f"PRAGMA table_info({table})")}:
            continue
        query = f"SELECT rowid, {column} FROM {table} WHERE {column} LIKE '%/mlartifacts%'"  # noqa: S608  # our own names
        for row, old in store.execute(query):
            found = _LOCATION.fullmatch(old)
            if found is None or _path(found["root"]) == folder:
                continue
            new = folder.as_uri() + (found["rest"] or "")
            if table == "experiments":
                stays = _path(found["root"]).exists() and not _is_project(_path(found["root"]).parent)
            else:
                stays = _path(old).exists() and not _path(new).exists()
            if not stays:
                yield _Change(table, column, row, old, new)


def _is_project(folder: Path) -> bool:
    """Return whether a project is in this folder, such as the original of which this project is a copy."""
    return any((folder / name).exists() for name in PROJECT_FILES)


def _path(location: str) -> Path:
    """Return the path of a location that is a path or a `file:` URI."""
    return Path(url2pathname(urlsplit(location).path) if location.startswith("file:") else location)
