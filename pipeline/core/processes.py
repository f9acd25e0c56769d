"""Which process does a piece of work, and on which CPU, written down; another can tell later whether it still lives."""

import os
import platform
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import psutil
from joblib import cpu_count

HOST, PID, STARTED = "process.host", "process.pid", "process.started"
START_TOLERANCE_SECONDS = 5
"""The boot time, from which a start in seconds since the epoch is reckoned, moves by a second when the clock is set."""
Life = Literal["alive", "dead", "elsewhere", "unknown"]


def this_process() -> dict[str, str]:
    """Host, process id and `start_of` it, which tells it from a later owner of its id."""
    return {HOST: socket.gethostname(), PID: str(os.getpid()), STARTED: start_of(os.getpid())}


def start_of(pid: int) -> str:
    """When a process started, on a clock that nobody can set: `<clock ticks since boot>@<id of the boot>`.

    That is Linux's; elsewhere seconds since the epoch. Raises psutil.NoSuchProcess.
    """
    if not psutil.LINUX:
        return f"{psutil.Process(pid).create_time():.2f}"
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    ticks = status.rpartition(b")")[2].split()[19]  # field 22; the name before it may have spaces and brackets
    return f"{ticks.decode()}@{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"


def life(record: Mapping[str, str]) -> Life:
    """What became of the process that wrote `record` with `this_process`; elsewhere: on another host."""
    if not {HOST, PID, STARTED} <= record.keys():
        return "unknown"
    if record[HOST] != socket.gethostname():
        return "elsewhere"
    try:
        return "alive" if lives(int(record[PID]), started=record[STARTED]) else "dead"
    except (ValueError, OverflowError):  # not as `this_process` wrote it
        return "unknown"


def lives(pid: int, *, started: str) -> bool:
    """Whether the process of this id that started then, by `start_of`, still runs."""
    try:
        return _has_start(pid, started) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # another user's, on macOS: what is not known must count as alive
        return True


def _has_start(pid: int, started: str) -> bool:
    if "@" in started:
        return start_of(pid) == started
    # not on Linux, or written by an older version: right unless the clock was set since
    return abs(psutil.Process(pid).create_time() - float(started)) < START_TOLERANCE_SECONDS


def call_at_parent_end(action: Callable[[], object]) -> None:
    """Call `action`, on a thread, within a second after the process that started this one has ended."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        action()

    threading.Thread(target=watch, daemon=True).start()


def num_cores() -> int:
    """Return how many cores this process may use: its affinity and a container's quota of CPU time count."""
    return int(cpu_count())


def cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
