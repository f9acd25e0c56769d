"""The addresses of sqlite files, as SQLAlchemy reads them: MLflow and Prefect take such addresses for their stores."""

from pathlib import Path
from urllib.parse import unquote

_ENCODED = {"%": "%25", "?": "%3F"}
"""What an address gives a meaning of its own; all other characters stand for themselves."""


def sqlite_uri(path: Path, *, driver: str = "") -> str:
    """Return the address of the sqlite file at an absolute path, percent-encoded where SQLAlchemy needs it.

    Without `driver` it is `sqlite:///…`. An encoded one always names a driver, since MLflow takes what follows
    `sqlite:///` for a path as it stands, and would make the folders that it names.
    """
    text = str(path)
    encoded = "".join(_ENCODED.get(char, char) for char in text)
    driver = driver or ("pysqlite" if encoded != text else "")
    return f"sqlite{'+' if driver else ''}{driver}:///{encoded}"


def sqlite_path(uri: str) -> Path | None:
    """Return the file that an address names, or None where it is none: another database, one in memory, `file:…`."""
    scheme, separator, rest = uri.partition(":///")
    path = unquote(rest.partition("?")[0])
    if not separator or scheme.partition("+")[0] != "sqlite" or not path or path.startswith((":memory:", "file:")):
        return None
    return Path(path)
