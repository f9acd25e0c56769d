"""Addresses of servers, and the proxies of the environment, through which nothing to our own servers may go."""

import os
from urllib.parse import urlsplit

from pipeline.core.settings import get_settings

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SERVER_SCHEMES = ("http", "https")


def is_server(uri: str) -> bool:
    """Return whether the address is that of a server, not of a database or a file."""
    return uri.partition(":")[0].lower() in SERVER_SCHEMES


def has_host(url: str) -> bool:
    """Return whether the URL names a host, and a port only if that is a number."""
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a bracket that is not closed, a port that is no number
        return False


def keep_loopback_off_proxies() -> None:
    """Add loopback, where our servers are, to the hosts that NO_PROXY and no_proxy name.

    Other addresses, such as those of downloads, go through the user's proxies as before.
    """
    settings = get_settings()
    if not (settings.uses_proxy or settings.no_proxy):
        return
    hosts = (_plain_host(host) for host in settings.no_proxy)
    unique = dict.fromkeys(filter(None, [*hosts, *LOOPBACK]))
    value = "*" if "*" in unique else ",".join(unique)
    os.environ |= {"NO_PROXY": value, "no_proxy": value}  # which the clients of MLflow and Prefect read


def _plain_host(host: str) -> str:
    """Return an entry of NO_PROXY as all clients understand it: Prefect's, httpx, fails on `[::1]` and `fd00::/8`."""
    host = host.strip().removeprefix("[").removesuffix("]")
    return "" if ":" in host and "/" in host and "://" not in host else host
