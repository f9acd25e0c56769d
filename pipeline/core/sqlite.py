"""The addresses of sqlite files, as SQLAlchemy reads them: MLflow and Prefect take such addresses for their stores."""

from pathlib import Path
from urllib.parse import parse_qs, unquote

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
    """Return the file that an address names; None for another kind of database and for one in memory."""
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
