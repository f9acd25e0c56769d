"""Check addresses of servers, and keep requests to our own servers away from proxies."""

import os
from urllib.parse import urlsplit

from pipeline.core.settings import get_settings

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SERVER_SCHEMES = ("http", "https")


def is_server(uri: str) -> bool:
    """Return whether the address is of an HTTP server, not of a database or a file."""
    return uri.partition(":")[0].lower() in SERVER_SCHEMES


def has_host(url: str) -> bool:
    """Return whether the URL names a host; its port, if it has one, must be a number."""
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a bracket that is not closed, or a port that is not a number
        return False


def keep_loopback_off_proxies() -> None:
    """Add the loopback addresses, where our servers are, to NO_PROXY and no_proxy.

    Requests to other addresses, such as downloads, use the user's proxies as before.
    """
    settings = get_settings()
    if not (settings.uses_proxy or settings.no_proxy):
        return
    hosts = (_plain_host(host) for host in settings.no_proxy)
    unique = dict.fromkeys(filter(None, [*hosts, *LOOPBACK]))
    value = "*" if "*" in unique else ",".join(unique)
    os.environ |= {"NO_PROXY": value, "no_proxy": value}  # the clients of MLflow and Prefect read one or the other


def _plain_host(host: str) -> str:
    """Return an entry of NO_PROXY in a form that all clients accept, or an empty text where there is none.

    Prefect's client, httpx, fails on `[::1]` and `fd00::/8`.
    """
    host = host.strip().removeprefix("[").removesuffix("]")
    return "" if ":" in host and "/" in host and "://" not in host else host
