"""Records of processes, by which another process can find out later whether one is still alive; and the CPU."""

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
Life = Literal["alive", "dead", "elsewhere", "unknown"]


def this_process() -> dict[str, str]:
    """Return this process's record: host, process id and start; a later owner of the id has another start."""
    return {HOST: socket.gethostname(), PID: str(os.getpid()), STARTED: start_of(os.getpid())}


def start_of(pid: int) -> str:
    """Return when a process started, on a clock that cannot be set: `<clock ticks since boot>@<id of the boot>`.

    Other systems than Linux have seconds since the epoch. Raises psutil.NoSuchProcess.
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
    """Return the state of the process with the record `record`; `elsewhere` means on another host."""
    if not {HOST, PID, STARTED} <= record.keys():
        return "unknown"
    if record[HOST] != socket.gethostname():
        return "elsewhere"
    try:
        return "alive" if lives(int(record[PID]), started=record[STARTED]) else "dead"
    except (ValueError, OverflowError):  # not a record of `this_process`
        return "unknown"


def lives(pid: int, *, started: str) -> bool:
    """Return whether the process with this id and start, as from `start_of`, is still running."""
    try:
        return _has_start(pid, started) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # another user's, on macOS: unknown must count as alive
        return True


def _has_start(pid: int, started: str) -> bool:
    if "@" in started:
        return start_of(pid) == started
    # not Linux, or the record of an older version: right unless the clock was set since
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
    """Return how many cores this process may use, by its affinity and a container's quota of CPU time."""
    from joblib import cpu_count  # noqa: PLC0415  # it imports NumPy, which a flow run's DVC process does without: 0.1 s

    return int(cpu_count())


def cpu_name() -> str:
    """Return the CPU's model name."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
