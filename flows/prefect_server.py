"""The Prefect server that flow runs use: the one that the user configured, or the project's own."""

from pathlib import Path

from prefect import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import PROJECT, server
from flows.settings import PrefectServer, configured_server, remedy
from pipeline.errors import TemporaryError, shown


def server_in_force(project: Path = PROJECT) -> PrefectServer | None:
    """The server that the user configured, or else the project's own if that is running.

    Raises UserError where a profile or a proxy is named that cannot be used, TemporaryError where it cannot be proven
    that the server that answers is the project's own.
    """
    if configured := configured_server():
        return configured
    own = server.running(project)
    return PrefectServer(own.api_url, None) if own else None


def ensure_server() -> PrefectServer:
    """The server in force, which answers; the project's own is started if need be.

    Raises TemporaryError where the server that the user configured does not answer.
    """
    found = server_in_force()
    if found is None:
        print("Starting the project's Prefect server (about 10 s, once) …", flush=True)
        own, _ = server.start()
        print(f"Prefect server: {own.address}; it stays for later runs, `make stop` ends it", flush=True)
        return PrefectServer(own.api_url, None)
    if found.source:
        with temporary_settings({PREFECT_API_URL: found.api_url}), get_client(sync_client=True) as client:
            if client.api_healthcheck() is not None:
                raise TemporaryError(
                    f"{found.source}: no server answers at {shown(found.api_url)}; start it, or {remedy(found.source)}"
                )
    return found
