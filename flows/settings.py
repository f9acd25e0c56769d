"""Which Prefect server the user configured, and where; the settings that cannot hold for the project's own server.

Prefect takes a setting from, in this order: the environment, `.env`, `prefect.toml` and `pyproject.toml` in the current
folder, the active profile. docs/settings.md lists what each setting changes here.
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

NAME = "PREFECT_API_URL"
OWN_NAME = "PIPELINE_OWN_PREFECT_API_URL"
"""Variable by which a shell says that its PREFECT_API_URL is that of the project's own server."""
OWN_PROFILE = "ephemeral"
"""Prefect's own profile that names no server."""
PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")
_FOLDER = Path.cwd()
"""Where Prefect, when it was imported, looked for files of settings."""


@dataclass(frozen=True)
class PrefectServer:
    """The Prefect server in force; `source` says what names it, None where it is the project's own."""

    api_url: str
    source: str | None

    @property
    def page(self) -> str:
        """Address of its pages, without a password."""
        return redact_url(self.api_url).removesuffix("/api")

    def environment(self) -> dict[str, str]:
        """What a process needs to use it; links name its pages, not those of another one."""
        return {NAME: self.api_url} | ({"PREFECT_UI_URL": self.page} if self.source is None else {})


def configured_server() -> PrefectServer | None:
    """The server that the user names by a variable, a file or a profile.

    Raises UserError where a profile or a proxy is named that cannot be used.
    """
    _check_proxies()
    profile = get_settings_context().profile
    # Prefect itself does not honor a profile that it ships, as `local`, where the user's file does not repeat it
    url = PREFECT_API_URL.value() or (profile.settings.get(PREFECT_API_URL) if profile else None)
    if url and not _is_printed_own(str(url)):
        return PrefectServer(str(url), next((name for name, found in _sources() if found == url), "Prefect's settings"))
    _check_profile()
    return None


def _is_printed_own(url: str) -> bool:
    """Whether `make prefect-env` printed the address of this project's own server: another server may have it since."""
    return url == get_settings().own_prefect_api_url and os.environ.get("PREFECT_HOME") == str(PROJECT / ".prefect")


def remedy(source: str) -> str:
    """How to get rid of a server that `source` names."""
    if source == NAME:
        return "unset it to use our own"
    if source.startswith(f"{NAME} in profile "):
        return f"set PREFECT_PROFILE={OWN_PROFILE} to use our own"
    return "remove it there to use our own"


def _sources() -> Iterator[tuple[str, object]]:
    """Each place that may name the server, with the address that it names, in Prefect's order."""
    yield NAME, _in_environment()
    yield f"{NAME} in {_FOLDER / '.env'}", _in_dotenv(_FOLDER / ".env")
    yield f"api.url in {_FOLDER / 'prefect.toml'}", _table(_FOLDER / "prefect.toml", "api").get("url")
    pyproject = _FOLDER / "pyproject.toml"
    yield f"tool.prefect.api.url in {pyproject}", _table(pyproject, "tool", "prefect", "api").get("url")
    if profile := get_settings_context().profile:
        yield f"{NAME} in profile {profile.name!r} of {_profiles_file()}", profile.settings.get(PREFECT_API_URL)


def _in_environment() -> str | None:
    """Prefect honors the variable in capitals and in lower case."""
    return next((value for name, value in os.environ.items() if name.upper() == NAME and value), None)


def _in_dotenv(path: Path) -> str | None:
    with suppress(OSError, UnicodeDecodeError):
        found = re.search(rf"(?im)^\s*(?:export\s+)?{NAME}\s*=\s*['\"]?([^'\"\s]+)", path.read_text(encoding="utf-8"))
        return found[1] if found else None
    return None


def _table(path: Path, *names: str) -> dict[str, Any]:
    values: Any = {}
    with suppress(OSError, tomllib.TOMLDecodeError):
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    for name in names:
        values = values.get(name, {}) if isinstance(values, dict) else {}
    return values if isinstance(values, dict) else {}


def _profiles_file() -> str:
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
            "correct it, or `prefect profile create` makes it"
        )


def _check_proxies() -> None:
    """Raise UserError where Prefect's client would fail on the address of a proxy."""
    for name in (variable for capitals in PROXY_VARIABLES for variable in (capitals, capitals.lower())):
        scheme, separator, _ = os.environ.get(name, "").partition("://")
        if separator and scheme.lower() not in PROXY_SCHEMES:
            raise UserError(
                f"{name}: found a proxy of the kind {scheme}://, which Prefect's client cannot use; allowed: "
                f"{', '.join(f'{one}://' for one in PROXY_SCHEMES)}; change or unset it"
            )


def check_own_server() -> None:
    """Raise UserError where a setting of Prefect asks the project's own server for what it cannot be."""
    settings = get_settings_context().settings
    if settings.server.api.host not in LOOPBACK:
        raise UserError(
            f"PREFECT_SERVER_API_HOST: found {settings.server.api.host!r}; allowed: 127.0.0.1, since the project's own "
            f"server listens on loopback only; unset it, or start a server yourself and set {NAME}"
        )
    database = settings.server.database.connection_url
    if database and ":memory:" in database.get_secret_value():
        raise UserError(
            "PREFECT_SERVER_DATABASE_CONNECTION_URL: found a database in memory, which would lose all flow runs; "
            "allowed: a file or PostgreSQL; unset it, or choose another profile with PREFECT_PROFILE"
        )
    asked, sent = settings.server.api.auth_string, settings.api.auth_string
    if asked and (sent is None or asked.get_secret_value() != sent.get_secret_value()):
        raise UserError(
            "PREFECT_SERVER_API_AUTH_STRING: the project's own server would ask for it, but PREFECT_API_AUTH_STRING, "
            "which clients send, differs; set both alike, or unset both"
        )


def named_port() -> tuple[int | None, str]:
    """The port that the user wants for the project's own server, None where any will do; and the variable for it."""
    api = get_settings_context().settings.server.api
    if os.environ.get("PREFECT_PORT"):
        return ports.port_variable("PREFECT_PORT", api.port), "PREFECT_PORT"
    return (api.port, "PREFECT_SERVER_API_PORT") if "port" in api.model_fields_set else (None, "PREFECT_PORT")


def own_server_environment(port: int, *, home: Path) -> dict[str, str]:
    """Variables that go before all other settings of Prefect, so that the server is where it is expected to be.

    `home` has its database, unless the user chose another one.
    """
    url = f"http://127.0.0.1:{port}/api"
    database = get_settings_context().settings.server.database
    address = sqlite_uri(home / "prefect.db", driver="aiosqlite")  # Prefect's own default is not percent-encoded
    is_default = database.connection_url is None and database.driver is None
    return {
        **({"PREFECT_SERVER_DATABASE_CONNECTION_URL": address} if is_default else {}),
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_API_BASE_PATH": "/api",
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_UI_API_URL": url,  # or its pages would show another server's runs
        "PREFECT_SERVER_UI_SERVE_BASE": "/",
    }
