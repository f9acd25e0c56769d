"""The Prefect server that flow runs use: the one that the user configured, or the project's own."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.exceptions import PrefectException, PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows import PROJECT, server
from flows.settings import PrefectServer, configured_server, remedy
from pipeline.core.errors import TemporaryError, UserError, first_line, redact_url
from pipeline.core.network import has_host, is_server

MAX_RECORDS_PER_REQUEST = 200  # the server's default limit
REQUEST_SECONDS = 5.0  # of `brief_client`
# RuntimeError: Prefect raises it where the server has another version; ValueError: an answer that is not as expected
SERVER_ERRORS = (httpx.HTTPError, PrefectException, OSError, RuntimeError, ValueError)


def current_server(project: Path = PROJECT) -> PrefectServer | None:
    """Return the server that the user configured, else the project's own if it is running, else None.

    Raises UserError where the user named a profile or a proxy that cannot be used, TemporaryError where it cannot be
    proven that the server that answers is the project's own.
    """
    if configured := configured_server():
        return configured
    own = server.running(project)
    return PrefectServer(own.api_url, None) if own else None


def ensure_server() -> PrefectServer:
    """Return the server that the user configured, else the project's own, which is started if it is not running.

    Raises TemporaryError where the server that the user configured does not answer, UserError where it is not a Prefect
    API, has another version, or refuses the login.
    """
    found = current_server()
    if found is None:
        print("Starting the project's Prefect server (about 10 s, once) …", flush=True)
        own, _ = server.start()
        print(f"Prefect server: {own.address}; it keeps running for later runs; `make stop` stops it", flush=True)
        return PrefectServer(own.api_url, None)
    if found.source:
        with temporary_settings({PREFECT_API_URL: found.api_url}):
            check_answers(found.api_url, found.source)
    return found


@contextmanager
def prefect_client(url: str) -> Iterator[SyncPrefectClient]:
    """Yield a client of the server at this address; raises TemporaryError where a request in the block fails."""
    try:
        with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
            yield client
    except (httpx.HTTPError, PrefectException) as error:
        raise TemporaryError(
            f"{redact_url(url)}: {first_line(error)}; try again, or run `python -m flows.health`"
        ) from None


@contextmanager
def brief_client(*, retries: int = 0) -> Iterator[SyncPrefectClient]:
    """Yield a client that waits at most REQUEST_SECONDS for an answer, and repeats a request at most `retries` times.

    It is for what a flow run can do without. Opening it and each request raise one of SERVER_ERRORS on failure.
    """
    with (
        temporary_settings({PREFECT_CLIENT_MAX_RETRIES: retries}),
        get_client(sync_client=True, httpx_settings={"timeout": REQUEST_SECONDS}) as client,
    ):
        yield client


def check_answers(url: str, source: str) -> None:
    """Raise UserError where the address is not a Prefect API that accepts us, TemporaryError if nothing answers."""
    allowed = "allowed: the address of Prefect's API, as http://HOST:4200/api"
    if not (is_server(url) and has_host(url)):
        raise UserError(f"{source}: found {redact_url(url)!r}, no address of a server; {allowed}; correct it")
    client = get_client(sync_client=True)
    if client.api_healthcheck() is not None:
        raise TemporaryError(f"{source}: no server answers at {redact_url(url)}; start it, or {remedy(source)}")
    try:
        client.raise_for_api_version_mismatch()
    except PrefectHTTPStatusError as error:
        status = error.response.status_code
        raise UserError(
            f"{source}: {redact_url(url)} refuses the login (HTTP status {status}); set "
            "PREFECT_API_AUTH_STRING, or for Prefect Cloud PREFECT_API_KEY"
        ) from None
    except (RuntimeError, ValueError, TypeError) as error:
        problem = first_line(error) if "incompatible" in str(error) else "it does not answer as Prefect's API does"
        raise UserError(f"{source}: found {redact_url(url)}: {problem}; {allowed}; correct it") from None
