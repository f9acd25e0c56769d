"""A project that was moved, renamed or copied: the absolute paths of artifacts in MLflow's sqlite store are corrected.

A path ends in `mlartifacts/…`; what stands before that is the folder in which the project was when it was written.
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

LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Tables and their columns with a path or a `file://` URI."""
BUSY_SECONDS = 60
PROJECT_FILES = ("mlflow.db", "dvc.yaml")
"""A folder with one of them is a project, and so the original of which this project is a copy."""
_LOCATION = re.compile(r"(?P<root>(file:|/).*/mlartifacts)(?P<rest>/.*)?")


@dataclass(frozen=True)
class _Change:
    table: str
    column: str
    row: int
    old: str
    new: str


def relocate(uri: str, project: Path) -> str | None:
    """Correct the paths in the project's own sqlite store to its folder of artifacts; return a message, if any.

    Artifacts that exist in the other place and not here stay where they are, and so does an experiment's folder that is
    in no other project. All rows are changed or none. Raises TemporaryError where another process keeps the store
    locked, UserError where it cannot be changed. Another store than a sqlite file in the project is left alone.
    """
    path = sqlite_path(uri)
    if path is None or not path.is_file() or not path.resolve().is_relative_to(project):
        return None
    with closing(sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)) as store:
        with sqlite_errors(path, problem="cannot be read"):
            try:
                if not any(_changes(store, artifact_folder(project))):
                    return None
            except sqlite3.Error as error:
                if error_code(error) in DAMAGED_CODES:
                    return None  # MLflow, about to open it, reports that
                raise
        problem = "holds paths of another folder, since the project was moved or copied, and cannot be changed"
        with sqlite_errors(path, problem=problem):
            number = _correct(store, artifact_folder(project))
    return f"{path.name}: {number} paths of artifacts were corrected, since the project is in {project} now"


def base_folder(location: str) -> Path | None:
    """The folder that must exist if anything was written at a location of artifacts; None for such as `s3://…`.

    It is `…/mlartifacts`, else the folder around `mlruns/…`, MLflow's own default, or around what the user chose.
    """
    if not location.startswith(("file:", "/")):
        return None
    if found := _LOCATION.fullmatch(location):
        return _path(found["root"])
    folder = _path(location).parent
    return folder.parent if folder.name == "mlruns" else folder


def _correct(store: sqlite3.Connection, folder: Path) -> int:
    """Correct all paths in one transaction; return how many were changed."""
    store.execute("BEGIN IMMEDIATE")  # of two processes, the second finds nothing left to change
    changes = list(_changes(store, folder))
    for change in changes:
        update = f"UPDATE {change.table} SET {change.column} = ? WHERE rowid = ?"  # noqa: S608  # our own names
        store.execute(update, (change.new, change.row))
    store.execute("COMMIT")
    return len(changes)


def _changes(store: sqlite3.Connection, folder: Path) -> Iterator[_Change]:
    """The locations that are to lead to `folder`.

    A run's or model's is left where its files are there and not here: another project may own them. An experiment's,
    to which new files go, is left where the user chose it: in a folder that exists and is of no other project.
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
    return any((folder / name).exists() for name in PROJECT_FILES)


def _path(location: str) -> Path:
    """The path of a `file:` URI or of a path."""
    return Path(url2pathname(urlsplit(location).path) if location.startswith("file:") else location)
