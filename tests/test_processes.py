"""A process is known again, whatever became of the clock, and told from a later one of its id."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipeline.core.processes import HOST, PID, STARTED, is_alive, process_state, start_of, this_process

pytestmark = pytest.mark.skipif(not psutil.LINUX, reason="elsewhere a start is known by the wall clock only")


def set_clock(monkeypatch: pytest.MonkeyPatch, *, forward_seconds: float) -> None:
    """As psutil sees it: the boot time, now less the time since boot, moves with the clock."""
    boot = psutil.boot_time()
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: boot + forward_seconds)


@pytest.mark.parametrize("seconds", [-3600, 3600])
def test_a_living_process_stays_alive_when_the_clock_jumps(monkeypatch: pytest.MonkeyPatch, seconds: int) -> None:
    me, created = this_process(), psutil.Process().create_time()
    set_clock(monkeypatch, forward_seconds=seconds)
    assert psutil.Process().create_time() == created + seconds
    assert (process_state(me), process_state(this_process())) == ("alive", "alive")


def test_a_later_owner_of_the_id_is_told_apart() -> None:
    me = this_process()
    ticks, _, boot = me[STARTED].partition("@")
    assert process_state({**me, STARTED: f"{int(ticks) - 1}@{boot}"}) == "dead"
    assert process_state({**me, STARTED: f"{ticks}@another-boot"}) == "dead"
    assert process_state({**me, HOST: "far-away"}) == "elsewhere"
    assert process_state({}) == "unknown"


def test_a_record_in_seconds_since_the_epoch_still_counts() -> None:
    me = this_process()
    assert process_state({**me, STARTED: f"{psutil.Process().create_time() + 1:.2f}"}) == "alive"
    assert process_state({**me, STARTED: "1000.0"}) == "dead"


def test_a_process_that_has_ended_is_dead() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        record = {**this_process(), PID: str(process.pid), STARTED: start_of(process.pid)}
        assert process_state(record) == "alive"
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert process_state(record) == "dead"  # a zombie
    assert process_state(record) == "dead"
    with pytest.raises(psutil.NoSuchProcess):
        start_of(process.pid)


def test_a_name_with_spaces_and_brackets_does_not_confuse(tmp_path: Path) -> None:
    python = tmp_path / "a) R 1 (b"
    python.symlink_to(sys.executable)
    with subprocess.Popen([python, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        started = start_of(process.pid)
        assert is_alive(process.pid, started=started)
        assert float(started.partition("@")[0]) >= float(start_of(os.getpid()).partition("@")[0])
