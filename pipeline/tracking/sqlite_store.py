"""A sqlite database that another tool makes and migrates: it takes its name, or its new content, only when complete.

MLflow and Prefect make their databases in dozens of transactions. A process killed in between leaves a file that
neither can open again. So they work on a copy beside the file, which is renamed into place at the end:

- A lock beside the file (`<file>.lock`, which the kernel releases with its process) admits one process at a time.
- The file is locked against writers while its copy is migrated. It is refused while another process has it open.
- A process that opens it in between and writes after the rename gets an error from sqlite, which checks the file's name
  before it begins a rollback journal. It does not check before it writes to a write-ahead log; so the file is taken out
  of that mode first, which fails while another process has it open.
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

Migrate = Callable[[Path, int], None]
"""Brings a copy of a database to the newest schema; an empty file stands for a new one.

A child process that does it inherits the second argument, the lock's file descriptor: should its parent be killed, the
next process waits for the child.
"""
LOCK_SECONDS = 30.0
"""How long sqlite waits for another process to end its transaction."""


@dataclass(frozen=True)
class Tool:
    """A package with alembic migrations in `versions`, a folder below it.

    `first_tables` are made first of all: one of them identifies a database of this tool. `made_rows` are the
    rows that the tool makes by itself, as an SQL condition for each table; any other row is worth keeping.
    """

    name: str
    versions: str
    first_tables: frozenset[str]
    made_rows: Mapping[str, str] = field(default_factory=dict)

    @property
    def package(self) -> str:
        return self.name.lower()

    @property
    def release(self) -> str:
        return f"{self.name} {importlib.metadata.version(self.package)}"


MLFLOW = Tool(
    "MLflow",
    "store/db_migrations/versions",
    first_tables=frozenset({"experiments", "runs", "metrics", "params", "tags"}),
    made_rows={"experiments": "experiment_id = 0", "workspaces": "name = 'default'"},
)
PREFECT = Tool(
    "Prefect",
    "server/database/_migrations/versions/sqlite",
    first_tables=frozenset({"flow", "flow_run", "task_run", "configuration"}),
    made_rows=dict.fromkeys(("block_type", "block_schema", "block_schema_reference", "configuration"), "true"),
)


def ensure_store(path: Path, *, tool: Tool, migrate: Migrate) -> None:
    """Make the database, or migrate it, unless it has the schema of the installed version.

    A database that was left half made and holds nothing is made anew.
    Raises UserError where the file cannot be used, TemporaryError where another process uses it; the file then stays as
    it was.
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
        _remove(copy)  # of a process that was killed
        try:
            _make(path, copy, tool=tool, migrate=lambda copy: migrate(copy, lock.fileno()))
        finally:
            _remove(copy)


@contextmanager
def without_percent(folder: Path) -> Iterator[Path]:
    """Give the folder, or a link to it where its path has a `%`: in the path of migrations, Alembic would replace that.

    The link is removed on leaving.
    """
    if "%" not in str(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as parent:
        link = Path(parent, "folder")
        link.symlink_to(folder)
        yield link


def is_current(path: Path, *, tool: Tool) -> bool:
    """Whether the database exists and has the newest schema that the installed version knows.

    Raises UserError where the schema is unknown, as that of a newer version is.
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
    """All schema revisions of the installed version, and the newest one.

    They are read from the migrations' source: alembic would import them all, which takes seconds.
    """
    spec = importlib.util.find_spec(tool.package)
    assert spec
    assert spec.origin
    known, replaced = set[str](), set[str]()
    for script in (Path(spec.origin).parent / tool.versions).glob("[!_]*.py"):
        source = script.read_text(encoding="utf-8")
        known.update(_constants("revision", source))
        replaced.update(_constants("down_revision", source))
    [newest] = known - replaced
    return frozenset(known), newest


def _constants(name: str, source: str) -> list[str]:
    """Return the strings that a migration assigns to `name`: one, a tuple of them, or none.

    `ast.parse` would fail now and then: in Python 3.11.7 and before, two threads cannot call it at the same time.
    """
    assigned = re.search(rf"^{name}\b[^=\n]*=\s*(\([^)]*\)|.*)", source, re.MULTILINE)
    assert assigned, name
    return re.findall(r"""["'](\w+)["']""", assigned[1])


def _make(path: Path, copy: Path, *, tool: Tool, migrate: Callable[[Path], None]) -> None:
    if path.exists():
        _migrate(path, copy, tool=tool, migrate=migrate)
        return
    _create(path, copy, tool=tool, migrate=migrate)
    if path.exists():
        raise TemporaryError(f"{path}: another program made it meanwhile; run the same command again")
    _replace(copy, path)


def _create(path: Path, copy: Path, *, tool: Tool, migrate: Callable[[Path], None]) -> None:
    copy.touch()
    try:
        migrate(copy)
        _finish(copy, tool=tool)
    except (UserError, TemporaryError):
        raise
    except Exception as error:
        raise _failure(path, error, tool=tool) from error


def _migrate(path: Path, copy: Path, *, tool: Tool, migrate: Callable[[Path], None]) -> None:
    """Replace a database by its migrated copy, or by a new one where it cannot be migrated and holds nothing."""
    with _locked(path, tool=tool) as journal_mode:
        with sqlite_errors(path), closing(_open(path)) as source, closing(sqlite3.connect(copy)) as target:
            _check_owner(source, path, tool=tool)
            vacant = _is_vacant(source, tool=tool)
            source.backup(target)
        made_again = False
        try:
            migrate(copy)
            _finish(copy, tool=tool, journal_mode=journal_mode)
        except (UserError, TemporaryError):
            raise
        except Exception as error:
            if not vacant:
                raise _failure(path, error, tool=tool) from error
            made_again = True
        if made_again:
            _remove(copy)
            _create(path, copy, tool=tool, migrate=migrate)
        _copy_permissions(path, copy)
        _replace(copy, path)
    if made_again:
        print(f"{path}: was left unfinished by a killed process, with no run in it; made again", flush=True)
    elif not vacant:
        print(f"{path}: migrated to the schema of {tool.release}", flush=True)


@contextmanager
def _locked(path: Path, *, tool: Tool) -> Iterator[str]:
    """Keep all others from writing to the database; yields its journal mode.

    Raises TemporaryError where another process has it open.
    """
    with sqlite_errors(path), closing(_open(path)) as connection:
        journal_mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
        connection.execute("PRAGMA journal_mode = DELETE")  # the module's docstring says why
        connection.execute("BEGIN IMMEDIATE")
        if users := processes_using(path):
            raise TemporaryError(
                f"{path}: must be migrated to the schema of {tool.release}, but is open in {', '.join(users)}; "
                "end that, then run the same command again"
            )
        yield journal_mode
        connection.rollback()


def processes_using(path: Path) -> list[str]:
    """Return the other processes that have the file open, of those that may be examined: one's own, or all for root."""
    users = []
    for process in psutil.process_iter(["pid", "name", "open_files"]):
        opened = process.info["open_files"] or []  # None: not allowed to know
        if process.pid != os.getpid() and any(file.path == str(path) for file in opened):
            users.append(f"process {process.pid} ({process.info['name']})")
    return users


def _finish(copy: Path, *, tool: Tool, journal_mode: str = "delete") -> None:
    """Bring all of the copy into its one file, and that onto the disk; raises RuntimeError where it is not current."""
    with closing(sqlite3.connect(copy, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
        if journal_mode == "wal":
            connection.execute("PRAGMA journal_mode = WAL")
    if not is_current(copy, tool=tool):
        raise RuntimeError(f"the migration ended at revision {_revision(copy)}")
    with add_path_to_errors(copy), copy.open("rb") as file:
        os.fsync(file.fileno())


def _copy_permissions(path: Path, copy: Path) -> None:
    shutil.copymode(path, copy)
    status = path.stat()
    with suppress(PermissionError):  # root may have migrated another user's file
        os.chown(copy, status.st_uid, status.st_gid)


def _replace(copy: Path, path: Path) -> None:
    """Rename the copy, where nothing is left beside `path` that sqlite would take as part of the new database."""
    for name in BESIDE:
        path.with_name(path.name + name).unlink(missing_ok=True)
    copy.replace(path)


def _remove(copy: Path) -> None:
    for name in ("", *BESIDE):
        copy.with_name(copy.name + name).unlink(missing_ok=True)


BESIDE = ("-journal", "-wal", "-shm")
"""What sqlite keeps beside a database."""


def _check_owner(connection: sqlite3.Connection, path: Path, *, tool: Tool) -> None:
    """Raises UserError where the database has tables, but none of this tool."""
    tables = _tables(connection)
    if tables and not tables & (tool.first_tables | {"alembic_version"}):
        raise UserError(
            f"{path}: found the tables {', '.join(sorted(tables)[:3])}, which are not of {tool.name}; allowed: a "
            f"database of {tool.name}, or a file that does not exist yet"
        )


def _is_vacant(connection: sqlite3.Connection, *, tool: Tool) -> bool:
    """Whether the database has no rows but those that the tool made by itself; False where it cannot be read."""
    try:
        for table in _tables(connection) - {"alembic_version"}:
            made = tool.made_rows.get(table, "false")
            if connection.execute(f'SELECT 1 FROM "{table}" WHERE NOT ({made}) LIMIT 1').fetchone():  # noqa: S608
                return False
    except sqlite3.DatabaseError:
        return False
    return True


def _tables(connection: sqlite3.Connection) -> set[str]:
    query = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite~_%' ESCAPE '~'"
    return {name for (name,) in connection.execute(query)}


def _revision(path: Path) -> str | None:
    """The schema revision that alembic wrote into the database, if it did."""
    with sqlite_errors(path), closing(_open(path)) as connection:
        if "alembic_version" not in _tables(connection):
            return None
        rows = connection.execute("SELECT version_num FROM alembic_version").fetchall()
        return rows[0][0] if len(rows) == 1 else None


def _open(path: Path) -> sqlite3.Connection:
    """Open an existing database. (Never read it as a file: closing that would release all locks of this process.)"""
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=LOCK_SECONDS)


def _failure(path: Path, error: Exception, *, tool: Tool) -> UserError:
    """What to say where the tool's own migrations fail, on a copy: the file is as it was."""
    reason = first_line(error)
    if "disk is full" in reason or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
        return UserError(f"{path}: {reason}; {REMEDIES[sqlite3.SQLITE_FULL]}")
    if not path.exists():
        return UserError(f"{path}: {tool.release} could not make its database: {reason}")
    return UserError(
        f"{path}: {tool.release} cannot migrate it ({reason}); nothing was changed. A killed migration may have left "
        f"it so: {MOVE_AWAY}"
    )
