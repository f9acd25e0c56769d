"""Find the Prefect server that the user configured, and check Prefect's settings for the project's own server.

Prefect reads a setting from the environment, else `.env`, `prefect.toml` or `pyproject.toml` in the current folder,
else the active profile. docs/settings.md lists the effect of each setting here.
"""

import os
import re
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect.context import get_settings_context
from prefect.settings import PREFECT_API_URL, PREFECT_PROFILES_PATH, load_profiles

from flows import PROJECT, ports
from pipeline.core.errors import UserError, redact_url
from pipeline.core.network import LOOPBACK
from pipeline.core.settings import PROXY_VARIABLES, get_settings
from pipeline.core.sqlite import sqlite_uri

API_URL_VARIABLE = "PREFECT_API_URL"
# `make prefect-env` sets this to the same address, to mark PREFECT_API_URL as that of the project's own server
OWN_API_URL_VARIABLE = "PIPELINE_OWN_PREFECT_API_URL"
# addresses for messages about nights (`flows.notifications`): secrets that no stage needs
NOTIFY_ADDRESSES = ("PIPELINE_NOTIFY_WEBHOOK", "PIPELINE_NOTIFY_SLACK", "PIPELINE_NOTIFY_EMAIL")
OWN_SERVER_PROFILE = "ephemeral"  # a profile of Prefect's that names no server
PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")
_SETTINGS_FOLDER = Path.cwd()  # Prefect has read its files of settings from here when it was imported


@dataclass(frozen=True)
class PrefectServer:
    """The Prefect server to use; `source` is the setting that names it, None where it is the project's own."""

    api_url: str
    source: str | None

    @property
    def page(self) -> str:
        """Return the address of its pages, without a password."""
        return redact_url(self.api_url).removesuffix("/api")

    def environment(self) -> dict[str, str]:
        """Return the variables by which a process uses this server, and links to the pages of this server."""
        return {API_URL_VARIABLE: self.api_url} | ({"PREFECT_UI_URL": self.page} if self.source is None else {})


def configured_server() -> PrefectServer | None:
    """Return the server that the user configured by a variable, a file or a profile, or None.

    Raises UserError where the user named a profile or a proxy that cannot be used.
    """
    _check_proxies()
    profile = get_settings_context().profile
    # Prefect ignores a profile that it ships, such as `local`, unless the user's file repeats it
    url = PREFECT_API_URL.value() or (profile.settings.get(PREFECT_API_URL) if profile else None)
    if url and not _is_own_address(str(url)):
        return PrefectServer(str(url), next((name for name, found in _sources() if found == url), "Prefect's settings"))
    _check_profile()
    return None


def _is_own_address(url: str) -> bool:
    """Return whether the address is that of this project's own server, as `make prefect-env` printed it.

    The own server may have another address since, so it is looked up again.
    """
    return url == get_settings().own_prefect_api_url and os.environ.get("PREFECT_HOME") == str(PROJECT / ".prefect")


def remedy(source: str) -> str:
    """Return how to use the project's own server instead of the one that `source` names."""
    if source == API_URL_VARIABLE:
        return "unset it to use our own"
    if source.startswith(f"{API_URL_VARIABLE} in profile "):
        return f"set PREFECT_PROFILE={OWN_SERVER_PROFILE} to use our own"
    return "remove it there to use our own"


def _sources() -> Iterator[tuple[str, object]]:
    """Yield each setting that may name a server, and the address that it names or None, in Prefect's order."""
    yield API_URL_VARIABLE, _in_environment()
    dotenv, toml, pyproject = (_SETTINGS_FOLDER / name for name in (".env", "prefect.toml", "pyproject.toml"))
    yield f"{API_URL_VARIABLE} in {dotenv}", _in_dotenv(dotenv)
    yield f"api.url in {toml}", _table(toml, "api").get("url")
    yield f"tool.prefect.api.url in {pyproject}", _table(pyproject, "tool", "prefect", "api").get("url")
    if profile := get_settings_context().profile:
        yield (
            f"{API_URL_VARIABLE} in profile {profile.name!r} of {_profiles_file()}",
            profile.settings.get(PREFECT_API_URL),
        )


def _in_environment() -> str | None:
    """Return the address in the environment; Prefect accepts the name in upper and lower case."""
    values = (value for name, value in os.environ.items() if name.upper() == API_URL_VARIABLE and value)
    return next(values, None)


def _in_dotenv(path: Path) -> str | None:
    """Return the address in a `.env` file, or None."""
    with suppress(OSError, UnicodeDecodeError):
        found = re.search(
            rf"(?im)^\s*(?:export\s+)?{API_URL_VARIABLE}\s*=\s*['\"]?([^'\"\s]+)", path.read_text(encoding="utf-8")
        )
        return found[1] if found else None
    return None


def _table(path: Path, *names: str) -> dict[str, Any]:
    """Return a nested table of a TOML file; empty where the file or the table does not exist."""
    values: Any = {}
    with suppress(OSError, tomllib.TOMLDecodeError):
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    for name in names:
        values = values.get(name, {}) if isinstance(values, dict) else {}
    return values if isinstance(values, dict) else {}


def _profiles_file() -> str:
    """Return the path of the user's profiles, for messages."""
    path = PREFECT_PROFILES_PATH.value()
    return str(path) if path.exists() else "Prefect's own profiles"


def _check_profile() -> None:
    """Raise UserError where the user names a profile that does not exist: Prefect would use another one."""
    profiles = load_profiles()
    name = os.environ.get("PREFECT_PROFILE")
    place = "PREFECT_PROFILE" if name else f"active in {_profiles_file()}"
    name = name or profiles.active_name
    if name and name not in profiles.names:
        raise UserError(
            f"{place}: found {name!r}, which is no Prefect profile; allowed: {', '.join(sorted(profiles.names))}; "
            "correct it, or create it with `prefect profile create`"
        )


def _check_proxies() -> None:
    """Raise UserError where a variable names a proxy of a kind that Prefect's client cannot use."""
    for name in (variable for capitals in PROXY_VARIABLES for variable in (capitals, capitals.lower())):
        scheme, separator, _ = os.environ.get(name, "").partition("://")
        if separator and scheme.lower() not in PROXY_SCHEMES:
            raise UserError(
                f"{name}: found a proxy of the kind {scheme}://, which Prefect's client cannot use; allowed: "
                f"{', '.join(f'{one}://' for one in PROXY_SCHEMES)}; change or unset it"
            )


def check_own_server() -> None:
    """Raise UserError where a setting of Prefect contradicts how the project's own server works."""
    settings = get_settings_context().settings
    if settings.server.api.host not in LOOPBACK:
        raise UserError(
            f"PREFECT_SERVER_API_HOST: found {settings.server.api.host!r}; allowed: 127.0.0.1, since the project's own "
            f"server listens on loopback only; unset it, or start a server yourself and set {API_URL_VARIABLE}"
        )
    database = settings.server.database.connection_url
    if database and ":memory:" in database.get_secret_value():
        raise UserError(
            "PREFECT_SERVER_DATABASE_CONNECTION_URL: found a database in memory, which would lose all flow runs; "
            "allowed: a file or PostgreSQL; unset it, or choose another profile with PREFECT_PROFILE"
        )
    expected, sent = settings.server.api.auth_string, settings.api.auth_string
    if expected and (sent is None or expected.get_secret_value() != sent.get_secret_value()):
        raise UserError(
            "PREFECT_SERVER_API_AUTH_STRING: the project's own server would require it, but PREFECT_API_AUTH_STRING, "
            "which clients send, differs; set both alike, or unset both"
        )


def named_port() -> tuple[int | None, str]:
    """Return the port that the user chose for the project's own server, or None, and the variable that chooses it."""
    api = get_settings_context().settings.server.api
    if os.environ.get("PREFECT_PORT"):
        return ports.port_variable("PREFECT_PORT", api.port), "PREFECT_PORT"
    return (api.port, "PREFECT_SERVER_API_PORT") if "port" in api.model_fields_set else (None, "PREFECT_PORT")


def own_server_environment(port: int, *, home: Path) -> dict[str, str]:
    """Return the variables with which the project's own server is started; they override all other settings of Prefect.

    Its database is in the folder `home`, unless the user chose another one.
    """
    url = f"http://127.0.0.1:{port}/api"
    database = get_settings_context().settings.server.database
    address = sqlite_uri(home / "prefect.db", driver="aiosqlite")  # Prefect's default is not percent-encoded
    is_default = database.connection_url is None and database.driver is None
    return {
        **({"PREFECT_SERVER_DATABASE_CONNECTION_URL": address} if is_default else {}),
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_API_BASE_PATH": "/api",
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_UI_API_URL": url,  # else its pages might show the runs of another server
        "PREFECT_SERVER_UI_SERVE_BASE": "/",
    }
