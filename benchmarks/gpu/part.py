"""Run a part of the GPU benchmark in a process of its own, which is killed at its limit, and keep what it has found."""

import json
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

CONTEXT = multiprocessing.get_context("fork")
"""PyTorch is imported once, by the parent, which never uses CUDA: a process that does so may not fork."""
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Setting:
    """Where the arrays of CIFAR-10 are, whether all sizes are tiny, and when the part must end (`time.monotonic`)."""

    arrays: Path
    dry: bool
    deadline: float = math.inf


class Emit(Protocol):
    """Write down one finding: text, numbers, true or false."""

    def __call__(self, **row: Any) -> None: ...


Part = Callable[[Setting, Emit], None]


@dataclass
class PartResult:
    """What a part has found so far; `status` is running, done, failed or cut off."""

    status: str = "running"
    seconds: float = 0.0
    limit: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)


def run_part(
    name: str,
    part: Part,
    setting: Setting,
    *,
    seconds: float,
    out: Path,
    result: PartResult | None = None,
    on_change: Callable[[], None] = lambda: None,
) -> PartResult:
    """Run a part for at most `seconds`; its output goes to `out/log.txt`. Calls `on_change` after new findings."""
    result = result or PartResult()
    start, result.limit = time.monotonic(), max(seconds, 0.0)
    rows, log = out / f".{name}.rows", out / "log.txt"
    rows.write_text("")
    setting = Setting(setting.arrays, dry=setting.dry, deadline=start + seconds)
    process = CONTEXT.Process(target=_run, args=(name, part, setting, rows, log))
    process.start()
    try:
        while process.is_alive() and time.monotonic() < setting.deadline:
            process.join(POLL_SECONDS)
            result.seconds = time.monotonic() - start
            if _read(rows, into=result):
                on_change()
        result.status = {None: "cut off", 0: "done"}.get(process.exitcode, "failed")
    finally:
        if process.pid:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all that it started
        process.kill()  # where it had no group of its own yet
        process.join()
        _read(rows, into=result)
        rows.unlink()
    return result


def _run(name: str, part: Part, setting: Setting, rows: Path, log: Path) -> None:
    """Run the part in this process; an exception is written to the log."""
    os.setsid()  # compilers and other children end with it
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    if math.isfinite(setting.deadline):  # should the parent be gone by then
        signal.signal(signal.SIGALRM, lambda *_: os.killpg(0, signal.SIGKILL))  # with all that it started
        signal.alarm(max(1, math.ceil(setting.deadline - time.monotonic()) + 5))
    with log.open("a", buffering=1) as file, rows.open("a") as found:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        sys.stdout = sys.stderr = file
        print(f"## {name}", flush=True)

        def emit(**row: Any) -> None:
            found.write(json.dumps(row) + "\n")
            found.flush()

        if setting.dry:
            torch.set_num_threads(1)
        try:
            part(setting, emit)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)  # without a wait for threads of the compiler


def _read(rows: Path, *, into: PartResult) -> bool:
    """Take over the findings; return whether there are new ones. A line that is not complete is left for later."""
    lines = [line for line in rows.read_text().splitlines(keepends=True) if line.endswith("\n")]
    is_new = len(lines) > len(into.rows)
    into.rows = [json.loads(line) for line in lines]
    return is_new
