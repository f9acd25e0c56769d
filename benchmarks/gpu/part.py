"""Run a part of the GPU benchmark in a process that is killed at its limit, and keep what it found until then."""

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

# Only the parent imports PyTorch, and its children are forks of it. The parent must not use CUDA, since CUDA does not
# work after a fork.
CONTEXT = multiprocessing.get_context("fork")
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Setting:
    """The setting of a part: the folder of CIFAR-10's arrays, `dry` for a dry run, and its end (`time.monotonic`)."""

    arrays: Path
    dry: bool
    deadline: float = math.inf


class Emit(Protocol):
    """A function that records one finding, whose values are text, numbers, true or false."""

    def __call__(self, **row: Any) -> None: ...


Part = Callable[[Setting, Emit], None]


@dataclass
class PartResult:
    """The findings of a part so far; `status` is running, done, failed or cut off, `limit` is in seconds."""

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
                os.killpg(process.pid, signal.SIGKILL)  # also what the process started
        process.kill()  # in case it has no process group of its own yet
        process.join()
        _read(rows, into=result)
        rows.unlink()
    return result


def _run(name: str, part: Part, setting: Setting, rows: Path, log: Path) -> None:
    """Run the part in this process, then exit; write its output and an exception to the log."""
    os.setsid()  # a process group of its own, so that compilers and other children can be killed with it
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    if math.isfinite(setting.deadline):  # in case the parent has died by then
        signal.signal(signal.SIGALRM, lambda *_: os.killpg(0, signal.SIGKILL))
        signal.alarm(max(1, math.ceil(setting.deadline - time.monotonic()) + 5))
    with log.open("a", buffering=1) as file, rows.open("a") as found:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        sys.stdout = sys.stderr = file
        print(f"## {name}", flush=True)

        def emit(**row: Any) -> None:
            """Write one finding as a line of JSON."""
            found.write(json.dumps(row) + "\n")
            found.flush()

        if setting.dry:
            torch.set_num_threads(1)
        try:
            part(setting, emit)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)  # do not wait for threads of the compiler


def _read(rows: Path, *, into: PartResult) -> bool:
    """Read the findings into a result, except an incomplete last line; return whether there are new ones."""
    lines = [line for line in rows.read_text().splitlines(keepends=True) if line.endswith("\n")]
    is_new = len(lines) > len(into.rows)
    into.rows = [json.loads(line) for line in lines]
    return is_new
