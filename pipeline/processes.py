"""Which process does a piece of work, written down so that another one can tell later whether it still lives."""

import os
import socket
from collections.abc import Mapping
from typing import Literal

import psutil

HOST, PID, STARTED = "process.host", "process.pid", "process.started"
START_TOLERANCE_SECONDS = 5
"""The boot time, from which a process's start is reckoned, moves by a second when the clock is set."""

Life = Literal["alive", "dead", "elsewhere", "unknown"]


def this_process() -> dict[str, str]:
    """Host, process id and start time (seconds since the epoch), which tells it from a later owner of its id."""
    return {
        HOST: socket.gethostname(),
        PID: str(os.getpid()),
        STARTED: f"{psutil.Process().create_time():.2f}",
    }


def life(record: Mapping[str, str]) -> Life:
    """What became of the process that wrote `record` with `this_process`; elsewhere: on another host."""
    if not {HOST, PID, STARTED} <= record.keys():
        return "unknown"
    if record[HOST] != socket.gethostname():
        return "elsewhere"
    return "alive" if lives(int(record[PID]), started=float(record[STARTED])) else "dead"


def lives(pid: int, *, started: float) -> bool:
    """Whether the process of this id that started at this time (seconds since the epoch) still runs."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < START_TOLERANCE_SECONDS
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
