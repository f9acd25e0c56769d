"""Requests to our servers on loopback bypass a proxy of the environment; those to other hosts use it."""

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import requests
import websockets.proxy
import websockets.uri
from prefect import get_client
from prefect.events.clients import PrefectEventsClient
from prefect.events.schemas.events import Event, Resource
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import server, ui
from flows.ports import free_port
from pipeline.core.network import keep_loopback_off_proxies
from pipeline.core.settings import PROXY_VARIABLES, get_settings
from tests.conftest import PROJECT

NAMES = [name for capitals in PROXY_VARIABLES for name in (capitals, capitals.lower())]


class Proxy:
    """A proxy that keeps the first bytes of each connection, and closes it."""

    def __init__(self, listener: socket.socket) -> None:
        self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        self.received: list[bytes] = []
        self._listener = listener

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                self.received.append(connection.recv(1000))


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        found = Proxy(listener)
        thread = threading.Thread(target=found.serve, daemon=True)
        thread.start()
        for name in (*NAMES, "NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NO_PROXY", "")  # monkeypatch then restores it
        monkeypatch.setenv("no_proxy", "")
        yield found
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


LOCAL = ["http://127.0.0.1:4200/api", "http://localhost:4200/api", "http://[::1]:4200/api"]
NO_PROXY = [
    "",
    "corp.example",
    "127.0.0.10",
    "10.127.0.0.1",
    "[::1],corp.example",
    "fd00::/8",
    "10.0.0.0/8",
    "localhost",
]


def uses_proxy(url: str) -> dict[str, bool]:
    """Return for each client, of MLflow, Prefect and Prefect's events, whether it would use a proxy for the URL."""
    with httpx.Client() as client:
        pool = client._transport_for_url(httpx.URL(url))._pool  # type: ignore[attr-defined]
    events = websockets.proxy.get_proxy(websockets.uri.parse_uri(url.replace("http", "ws")))
    return {
        "requests": bool(requests.utils.get_environ_proxies(url)),
        "httpx": "Proxy" in type(pool).__name__,
        "websockets": events is not None,
    }


@pytest.mark.parametrize(
    ("name", "no_proxy"), [*((name, "") for name in NAMES), *(("ALL_PROXY", value) for value in NO_PROXY)]
)
def test_loopback_bypasses_every_proxy_and_other_hosts_do_not(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, name: str, no_proxy: str
) -> None:
    scheme = "socks5" if name.upper() == "ALL_PROXY" else "http"
    monkeypatch.setenv(name, f"{scheme}://{proxy.address}")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    keep_loopback_off_proxies()
    assert [set(uses_proxy(url).values()) for url in LOCAL] == [{False}] * 3
    url = "https://example.org" if name.upper() == "HTTPS_PROXY" else "http://example.org"
    assert uses_proxy(url)["requests"]
    assert uses_proxy(url)["httpx"]


def test_hosts_that_the_user_excludes_from_the_proxy_stay_excluded(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://{proxy.address}")
    monkeypatch.setenv("NO_PROXY", "corp.example")  # an empty `no_proxy` must not take precedence
    keep_loopback_off_proxies()
    assert set(uses_proxy("http://a.corp.example").values()) == {False}
    monkeypatch.setenv("NO_PROXY", "*,corp.example")
    monkeypatch.setenv("no_proxy", "")
    get_settings.cache_clear()
    keep_loopback_off_proxies()
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "*"


def test_without_a_proxy_no_variable_is_set(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_loopback_off_proxies()
    assert os.environ["NO_PROXY"] == ""


def test_a_download_uses_the_proxy(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://{proxy.address}")
    keep_loopback_off_proxies()
    with pytest.raises(requests.ConnectionError):
        requests.get("http://example.org/cifar.tar.gz", timeout=30)
    assert proxy.received[0].startswith(b"GET http://example.org/cifar.tar.gz")


async def send_event() -> None:
    async with PrefectEventsClient() as client:
        await client.emit(Event(event="test", resource=Resource({"prefect.resource.id": "test"})))


@pytest.mark.slow
def test_servers_and_clients_of_the_project_send_nothing_through_a_proxy(
    proxy: Proxy, tmp_path: Path, stores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".prefect").mkdir()
    shutil.copy(stores / "prefect.db", tmp_path / ".prefect")
    shutil.copy(stores / "mlflow.db", tmp_path)
    for name in NAMES:
        monkeypatch.setenv(name, f"socks5://{proxy.address}")
    # settings for servers elsewhere, which our servers must ignore
    for name, value in {
        "PREFECT_API_KEY": "key",
        "PREFECT_SERVER_API_BASE_PATH": "/x",
        "MLFLOW_STATIC_PREFIX": "/y",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    keep_loopback_off_proxies()
    found, _ = server.start(tmp_path, port=free_port())
    try:
        with temporary_settings({PREFECT_API_URL: found.api_url}):
            with get_client(sync_client=True) as client:
                assert client.api_healthcheck() is None
            asyncio.run(send_event())
        with ui.mlflow_server(tmp_path, port=free_port()) as address:
            command = [
                sys.executable,
                "-c",
                "from pipeline.tracking import search, store; store.connect(); print(search.find_runs({}))",
            ]
            environment = {
                **os.environ,
                "MLFLOW_TRACKING_URI": address,
                "NO_PROXY": "",
                "no_proxy": "",
                "PYTHONPATH": str(PROJECT),
            }
            done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    finally:
        server.stop(tmp_path)
    assert proxy.received == []
