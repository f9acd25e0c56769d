"""Identify processes, so that another process can find out later whether they are alive; describe the CPU."""

import os
import platform
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import psutil

HOST, PID, STARTED = "process.host", "process.pid", "process.started"
# a start in seconds since the epoch is computed from the boot time, which moves by a second when the clock is set
START_TOLERANCE_SECONDS = 5
ProcessState = Literal["alive", "dead", "elsewhere", "unknown"]


def this_process() -> dict[str, str]:
    """Return the record of this process: host, process id and start time.

    The start time distinguishes it from a later process with the same id.
    """
    return {HOST: socket.gethostname(), PID: str(os.getpid()), STARTED: start_of(os.getpid())}


def start_of(pid: int) -> str:
    """Return the start time of a process as `<clock ticks since boot>@<id of the boot>`, a clock that cannot be set.

    On systems other than Linux it is in seconds since the epoch. Raises psutil.NoSuchProcess.
    """
    if not psutil.LINUX:
        return f"{psutil.Process(pid).create_time():.2f}"
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    ticks = status.rpartition(b")")[2].split()[19]  # field 22; the name before it may have spaces and brackets
    return f"{ticks.decode()}@{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"


def process_state(record: Mapping[str, str]) -> ProcessState:
    """Return whether the process of a record from `this_process` is alive; `elsewhere` means on another host."""
    if not {HOST, PID, STARTED} <= record.keys():
        return "unknown"
    if record[HOST] != socket.gethostname():
        return "elsewhere"
    try:
        return "alive" if is_alive(int(record[PID]), started=record[STARTED]) else "dead"
    except (ValueError, OverflowError):  # `this_process` did not write this record
        return "unknown"


def is_alive(pid: int, *, started: str) -> bool:
    """Return whether the process with this id and this start time, from `start_of`, is still running."""
    try:
        return _has_start(pid, started) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # the process of another user, on macOS: it may be alive
        return True


def _has_start(pid: int, started: str) -> bool:
    if "@" in started:
        return start_of(pid) == started
    # the record is of another system than Linux or of an older version; the result is right unless the clock was set
    return abs(psutil.Process(pid).create_time() - float(started)) < START_TOLERANCE_SECONDS


def call_at_parent_end(action: Callable[[], object]) -> None:
    """Call `action`, in a thread, within a second after the parent process has ended."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        action()

    threading.Thread(target=watch, daemon=True).start()


def num_cores() -> int:
    """Return how many CPU cores this process may use, according to its affinity and its container's CPU quota."""
    from joblib import cpu_count  # noqa: PLC0415  # it imports NumPy, 0.1 s that a flow run's DVC process can save

    return int(cpu_count())


def cpu_name() -> str:
    """Return the CPU's model name."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
