"""A process is recognized after the clock changes, and distinguished from a later process with the same id."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipeline.core.processes import HOST, PID, STARTED, is_alive, process_state, start_of, this_process

pytestmark = pytest.mark.skipif(not psutil.LINUX, reason="other systems record a start by the wall clock only")


def set_clock(monkeypatch: pytest.MonkeyPatch, *, forward_seconds: float) -> None:
    """Move the clock for psutil, whose boot time is the current time less the time since boot."""
    boot = psutil.boot_time()
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: boot + forward_seconds)


@pytest.mark.parametrize("seconds", [-3600, 3600])
def test_a_living_process_stays_alive_when_the_clock_jumps(monkeypatch: pytest.MonkeyPatch, seconds: int) -> None:
    record, created = this_process(), psutil.Process().create_time()
    set_clock(monkeypatch, forward_seconds=seconds)
    assert psutil.Process().create_time() == created + seconds
    assert (process_state(record), process_state(this_process())) == ("alive", "alive")


def test_a_later_process_with_the_same_id_is_distinguished() -> None:
    record = this_process()
    ticks, _, boot = record[STARTED].partition("@")
    assert process_state({**record, STARTED: f"{int(ticks) - 1}@{boot}"}) == "dead"
    assert process_state({**record, STARTED: f"{ticks}@another-boot"}) == "dead"
    assert process_state({**record, HOST: "far-away"}) == "elsewhere"
    assert process_state({}) == "unknown"


def test_a_record_in_seconds_since_the_epoch_is_still_accepted() -> None:
    record = this_process()
    assert process_state({**record, STARTED: f"{psutil.Process().create_time() + 1:.2f}"}) == "alive"
    assert process_state({**record, STARTED: "1000.0"}) == "dead"


def test_a_process_that_has_ended_is_dead() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        record = {**this_process(), PID: str(process.pid), STARTED: start_of(process.pid)}
        assert process_state(record) == "alive"
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert process_state(record) == "dead"  # it is a zombie until its parent waits for it
    assert process_state(record) == "dead"
    with pytest.raises(psutil.NoSuchProcess):
        start_of(process.pid)


def test_the_start_of_a_process_whose_name_has_spaces_and_brackets_is_read(tmp_path: Path) -> None:
    python = tmp_path / "a) R 1 (b"
    python.symlink_to(sys.executable)
    with subprocess.Popen([python, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        started = start_of(process.pid)
        assert is_alive(process.pid, started=started)
        assert float(started.partition("@")[0]) >= float(start_of(os.getpid()).partition("@")[0])
