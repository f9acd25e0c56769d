"""Create or migrate the sqlite database of MLflow or Prefect so that a killed process cannot damage it.

Both tools create and migrate their databases in dozens of transactions. If a process is killed between two of them, the
tool can never open the file again. Here the tool works on a copy beside the file, which replaces the file at the end:

- Only one process at a time does this. It locks `<file>.lock`; the kernel releases the lock when the process ends.
- While the copy is migrated, sqlite's own lock keeps other processes from writing to the file. Where another process
  has the file open already, the migration is refused.
- A process that opens the file during the migration and writes after the rename gets an error from sqlite, which checks
  the name of a file before it begins a rollback journal. In the mode of a write-ahead log (WAL) it does not check, so
  that mode is switched off first, which fails while another process has the file open.
"""

import errno
import fcntl
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from pipeline.artifacts import add_path_to_errors
from pipeline.core.errors import TemporaryError, UserError, first_line
from pipeline.core.sqlite import MOVE_AWAY, REMEDIES, sqlite_errors

# Migrates a copy of a database to the newest schema; an empty file becomes a new database. The second argument is the
# file descriptor of the lock: a child process that does the work inherits it, and holds the lock even if its
# parent is killed.
Migrate = Callable[[Path, int], None]
LOCK_SECONDS = 30.0  # how long sqlite waits for another process to end its transaction
SUFFIXES_BESIDE = ("-journal", "-wal", "-shm")  # of the files that sqlite has beside a database


@dataclass(frozen=True)
class Tool:
    """A package that creates a sqlite database, with alembic migrations in its folder `versions`.

    A database with one of the `first_tables`, which the first migration creates, is one of this tool. `initial_rows`
    has an SQL condition for each table whose rows the tool itself creates. A database with any other row has data.
    """

    name: str
    versions: str
    first_tables: frozenset[str]
    initial_rows: Mapping[str, str] = field(default_factory=dict)

    @property
    def package(self) -> str:
        """Return the name of the Python package."""
        return self.name.lower()

    @property
    def release(self) -> str:
        """Return the tool with the version that is installed."""
        return f"{self.name} {importlib.metadata.version(self.package)}"


MLFLOW = Tool(
    "MLflow",
    "store/db_migrations/versions",
    first_tables=frozenset({"experiments", "runs", "metrics", "params", "tags"}),
    initial_rows={"experiments": "experiment_id = 0", "workspaces": "name = 'default'"},
)
PREFECT = Tool(
    "Prefect",
    "server/database/_migrations/versions/sqlite",
    first_tables=frozenset({"flow", "flow_run", "task_run", "configuration"}),
    initial_rows=dict.fromkeys(("block_type", "block_schema", "block_schema_reference", "configuration"), "true"),
)


def ensure_store(path: Path, *, tool: Tool, migrate: Migrate) -> None:
    """Create the database, or migrate it to the schema of the installed version of the tool.

    An incomplete database without data is created again. Raises UserError where the file cannot be used, TemporaryError
    where another process uses it; in both cases the file is not changed.
    """
    path = Path(os.path.realpath(path))
    if is_current(path, tool=tool):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_current(path, tool=tool):
            return
        copy = path.with_name(f"{path.name}.unfinished")
        _remove(copy)  # a killed process may have left one
        try:
            _create_or_migrate(path, copy, tool=tool, migrate=lambda copy: migrate(copy, lock.fileno()))
        finally:
            _remove(copy)


@contextmanager
def without_percent(folder: Path) -> Iterator[Path]:
    """Yield the folder, or a link to it where its path has a `%`, which Alembic would expand in the path of migrations.

    The link is removed at the end of the block.
    """
    if "%" not in str(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as parent:
        link = Path(parent, "folder")
        link.symlink_to(folder)
        yield link


def is_current(path: Path, *, tool: Tool) -> bool:
    """Return whether the database exists and has the newest schema that the installed version knows.

    Raises UserError where the installed version does not know the schema, as after a downgrade.
    """
    if not path.exists():
        return False
    revision = _revision(path)
    if revision is None:
        return False
    known, newest = revisions(tool)
    if revision not in known:
        raise UserError(
            f"{path}: found schema revision {revision}, which {tool.release} does not know; a newer {tool.name} or "
            f"another program made it: install that {tool.name}, or move the file away to begin a new one"
        )
    return revision == newest


def revisions(tool: Tool) -> tuple[frozenset[str], str]:
    """Return all schema revisions that the installed version knows, and the newest of them.

    They are read from the source of the migrations, since alembic would import all of these, which takes seconds.
    """
    spec = importlib.util.find_spec(tool.package)
    assert spec
    assert spec.origin
    known, replaced = set[str](), set[str]()
    for script in (Path(spec.origin).parent / tool.versions).glob("[!_]*.py"):
        source = script.read_text(encoding="utf-8")
        known.update(_assigned_strings("revision", source))
        replaced.update(_assigned_strings("down_revision", source))
    [newest] = known - replaced
    return frozenset(known), newest


def _assigned_strings(name: str, source: str) -> list[str]:
    """Return the strings that the source of a migration assigns to `name`: none, one, or a tuple of several.

    `ast.parse` would sometimes fail: before Python 3.11.8, two threads cannot call it at the same time.
    """
    assigned = re.search(rf"^{name}\b[^=\n]*=\s*(\([^)]*\)|.*)", source, re.MULTILINE)
    assert assigned, name
    return re.findall(r"""["'](\w+)["']""", assigned[1])


def _create_or_migrate(path: Path, copy: Path, *, tool: Tool, migrate: Callable[[Path], None]) -> None:
    """Make `copy` current, and replace `path` by it."""
    if path.exists():
        _migrate(path, copy, tool=tool, migrate=migrate)
        return
    _create(path, copy, tool=tool, migrate=migrate)
    if path.exists():
        raise TemporaryError(f"{path}: another program has just created it; run the same command again")
    _replace(copy, path)


def _create(path: Path, copy: Path, *, tool: Tool, migrate: Callable[[Path], None]) -> None:
    """Create a new database as `copy`; raise UserError, which names `path`, where the tool fails."""
    copy.touch()
    try:
        migrate(copy)
        _finish(copy, tool=tool)
    except (UserError, TemporaryError):
        raise
    except Exception as error:
        raise _failure(path, error, tool=tool) from error


def _migrate(path: Path, copy: Path, *, tool: Tool, migrate: Callable[[Path], None]) -> None:
    """Migrate a copy of the database, and replace the database by the copy.

    Where the migration fails, a new database replaces a database without data; a database with data stays unchanged,
    and the failure is raised as UserError or TemporaryError.
    """
    with _locked(path, tool=tool) as journal_mode:
        with sqlite_errors(path), closing(_open(path)) as source, closing(sqlite3.connect(copy)) as target:
            _check_owner(source, path, tool=tool)
            has_data = _has_data(source, tool=tool)
            source.backup(target)
        is_new = False
        try:
            migrate(copy)
            _finish(copy, tool=tool, journal_mode=journal_mode)
        except (UserError, TemporaryError):
            raise
        except Exception as error:
            if has_data:
                raise _failure(path, error, tool=tool) from error
            is_new = True
        if is_new:
            _remove(copy)
            _create(path, copy, tool=tool, migrate=migrate)
        _copy_permissions(path, copy)
        _replace(copy, path)
    if is_new:
        print(f"{path}: a killed process had left it incomplete, without data; it was created again", flush=True)
    elif has_data:
        print(f"{path}: migrated to the schema of {tool.release}", flush=True)


@contextmanager
def _locked(path: Path, *, tool: Tool) -> Iterator[str]:
    """Prevent other processes from writing to the database during the block; yield its journal mode.

    Raises TemporaryError where another process has the database open.
    """
    with sqlite_errors(path), closing(_open(path)) as connection:
        journal_mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
        connection.execute("PRAGMA journal_mode = DELETE")  # for the reason, see the docstring of this module
        connection.execute("BEGIN IMMEDIATE")
        if users := processes_using(path):
            raise TemporaryError(
                f"{path}: must be migrated to the schema of {tool.release}, but is open in {', '.join(users)}; "
                "end it, then run the same command again"
            )
        yield journal_mode
        connection.rollback()


def processes_using(path: Path) -> list[str]:
    """Return the other processes that have the file open; only root can see those of other users."""
    users = []
    for process in psutil.process_iter(["pid", "name", "open_files"]):
        opened = process.info["open_files"] or []  # None where access is denied
        if process.pid != os.getpid() and any(file.path == str(path) for file in opened):
            users.append(f"process {process.pid} ({process.info['name']})")
    return users


def _finish(copy: Path, *, tool: Tool, journal_mode: str = "delete") -> None:
    """Write the copy completely to the disk, as one file; raise RuntimeError where its schema is not the newest."""
    with closing(sqlite3.connect(copy, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
        if journal_mode == "wal":
            connection.execute("PRAGMA journal_mode = WAL")
    if not is_current(copy, tool=tool):
        raise RuntimeError(f"the migration ended at revision {_revision(copy)}")
    with add_path_to_errors(copy), copy.open("rb") as file:
        os.fsync(file.fileno())


def _copy_permissions(path: Path, copy: Path) -> None:
    """Give the copy the mode and the owner of the file."""
    shutil.copymode(path, copy)
    status = path.stat()
    with suppress(PermissionError):  # root may have migrated another user's file
        os.chown(copy, status.st_uid, status.st_gid)


def _replace(copy: Path, path: Path) -> None:
    """Rename the copy to `path`, after deleting what sqlite would read beside `path` as part of the new database."""
    for suffix in SUFFIXES_BESIDE:
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    copy.replace(path)


def _remove(copy: Path) -> None:
    """Delete the copy with its journals, as far as they exist."""
    for suffix in ("", *SUFFIXES_BESIDE):
        copy.with_name(copy.name + suffix).unlink(missing_ok=True)


def _check_owner(connection: sqlite3.Connection, path: Path, *, tool: Tool) -> None:
    """Raise UserError where the database has tables, but none of this tool."""
    tables = _tables(connection)
    if tables and not tables & (tool.first_tables | {"alembic_version"}):
        raise UserError(
            f"{path}: found the tables {', '.join(sorted(tables)[:3])}, which are not of {tool.name}; allowed: a "
            f"database of {tool.name}, or a file that does not exist yet"
        )


def _has_data(connection: sqlite3.Connection, *, tool: Tool) -> bool:
    """Return whether the database has rows that the tool did not create itself; True where it cannot be read."""
    try:
        for table in _tables(connection) - {"alembic_version"}:
            initial = tool.initial_rows.get(table, "false")
            if connection.execute(f'SELECT 1 FROM "{table}" WHERE NOT ({initial}) LIMIT 1').fetchone():  # noqa: S608
                return True
    except sqlite3.DatabaseError:
        return True
    return False


def _tables(connection: sqlite3.Connection) -> set[str]:
    """Return the names of the tables, without those of sqlite itself."""
    query = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite~_%' ESCAPE '~'"
    return {name for (name,) in connection.execute(query)}


def _revision(path: Path) -> str | None:
    """Return the schema revision that alembic wrote into the database, or None."""
    with sqlite_errors(path), closing(_open(path)) as connection:
        if "alembic_version" not in _tables(connection):
            return None
        rows = connection.execute("SELECT version_num FROM alembic_version").fetchall()
        return rows[0][0] if len(rows) == 1 else None


def _open(path: Path) -> sqlite3.Connection:
    """Open an existing database.

    Do not read it as a plain file: closing that file would release all locks that this process has on it.
    """
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=LOCK_SECONDS)


def _failure(path: Path, error: Exception, *, tool: Tool) -> UserError:
    """Return the error to raise where the migrations of the tool failed on the copy."""
    reason = first_line(error)
    if "disk is full" in reason or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
        return UserError(f"{path}: {reason}; {REMEDIES[sqlite3.SQLITE_FULL]}")
    if not path.exists():
        return UserError(f"{path}: {tool.release} cannot create its database here: {reason}")
    return UserError(
        f"{path}: {tool.release} cannot migrate it ({reason}); nothing was changed. Perhaps a migration was killed "
        f"earlier: {MOVE_AWAY}"
    )
