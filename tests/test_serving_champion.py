"""A server of the champion, under load by clients of its own process, while the champion changes."""

import sys
from pathlib import Path

import pytest

from benchmarks.load import Load, Reply, confused_clients
from benchmarks.served_project import started
from flows.ports import free_port
from pipeline.tracking import registry
from pipeline.tracking.store import connect
from tests.conftest import PROJECT
from tests.raw_folders import encoded, noise
from tests.registered_models import register, write_model

PHOTOGRAPHS = [encoded(noise(seed, size=64), "JPEG") for seed in range(8)]


def send(address: str, *, until: bytes, requests: int = 0, change_to: str) -> Load:
    """Send photographs by 4 clients until each has an answer with this text; change the champion after 100 answers."""
    load = Load(f"{address}/predict", PHOTOGRAPHS, "image/jpeg", requests=requests, clients=4)
    load.until, load.change_after = lambda content: until in content, 100
    load.change = lambda: registry.set_alias("digits", "champion", change_to)
    load.run()
    return load


@pytest.mark.slow
def test_no_request_fails_while_the_champion_changes_and_changes_back(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    connect()
    versions = [register(write_model(workspace / f"model {seed}", seed=seed)) for seed in (1, 2)]
    registry.set_alias("digits", "champion", "1")
    old, new = (version.model_md5.encode() for version in versions)
    address = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "pipeline.serve", "--port", address.rpartition(":")[2], "--poll-seconds", "0.1"]
    with started(command, health=f"{address}/health", log=workspace / "log"):
        forth = send(address, until=new, requests=200, change_to="2")
        back = send(address, until=old, change_to="1")
    assert [reply.error for reply in forth.replies + back.replies if reply.error] == []
    assert len(forth.replies) >= 200
    assert all(old in reply.content for reply in forth.replies[:100])
    assert confused_clients(forth.replies, old=old, new=new) == []
    assert confused_clients(back.replies, old=new, new=old) == []


@pytest.mark.parametrize(("contents", "wrong"), [("oonn", []), ("n", []), ("ono", [1]), ("oo", [1]), ("o?n", [1])])
def test_a_client_that_sees_an_old_model_again_is_found(contents: str, wrong: list[int]) -> None:
    replies = [Reply(0, 0, 0, b"n", error=""), *(Reply(1, 0, 0, each.encode(), error="") for each in contents)]
    assert confused_clients(replies, old=b"o", new=b"n") == wrong
