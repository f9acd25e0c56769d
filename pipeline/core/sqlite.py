"""Convert between paths of sqlite files and SQLAlchemy's addresses, and report sqlite's errors in one line."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote

from pipeline.core.errors import TemporaryError, UserError, first_line

BUSY_CODES = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
DAMAGED_CODES = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
REMEDIES = {
    sqlite3.SQLITE_FULL: "make room on the disk, then run the same command again",
    sqlite3.SQLITE_READONLY: "make the file and its folder writable, then run the same command again",
    sqlite3.SQLITE_CANTOPEN: "allowed: a file that can be read and written, in a folder that can be written",
}
# the remedy for errors that are not in REMEDIES
MOVE_AWAY = "restore a backup, or move the file away to begin a new one"
_ENCODED = {"%": "%25", "?": "%3F"}  # the characters that have a special meaning in an address


def sqlite_uri(path: Path, *, driver: str = "") -> str:
    """Return the address of the sqlite file at an absolute path, percent-encoded where SQLAlchemy needs it.

    Without `driver` it is `sqlite:///…`. An encoded address always names a driver: after `sqlite:///` MLflow expects an
    unencoded path, and would create folders with the encoded names.
    """
    text = str(path)
    encoded = "".join(_ENCODED.get(char, char) for char in text)
    driver = driver or ("pysqlite" if encoded != text else "")
    return f"sqlite{'+' if driver else ''}{driver}:///{encoded}"


def sqlite_path(uri: str) -> Path | None:
    """Return the file that an address names, or None for another kind of database and for one in memory."""
    scheme, separator, rest = uri.partition(":///")
    if not separator or scheme.partition("+")[0] != "sqlite":
        return None
    name, _, query = rest.partition("?")
    if "memory" in parse_qs(query).get("mode", []) or ":memory:" in name:
        return None
    name = unquote(name)
    if name.startswith("file:"):
        name = name.removeprefix("file:")
        name = name.removeprefix("//") if name.startswith("///") else name
    return Path(name) if name else None


def error_code(error: sqlite3.Error) -> int:
    """Return the primary code of an error, such as `sqlite3.SQLITE_BUSY`; 0 for an error of Python's own module."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF  # the higher bits hold the extended code


@contextmanager
def sqlite_errors(path: Path, *, problem: str = "") -> Iterator[None]:
    """Turn sqlite's errors into one line with a remedy; `problem` states what could not be done.

    Raises TemporaryError where another process keeps the database locked, else UserError.
    """
    try:
        yield
    except sqlite3.Error as error:
        code, reason = error_code(error), first_line(error)
        found = f"{problem} ({reason})" if problem else reason
        if code in BUSY_CODES:
            found = found if problem else "is in use by another process"
            raise TemporaryError(f"{path}: {found}; end what else uses it, or try again later") from None
        raise UserError(f"{path}: {found}; {REMEDIES.get(code, MOVE_AWAY)}") from None
