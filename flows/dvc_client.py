"""The flow run's side of `dvc_protocol`: start the DVC process, send it requests, stop it and its stages."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from flows.dvc_protocol import GRACE_SECONDS, Action, Answer, Request

OnLine = Callable[[str], None]  # called with each line that a stage or DVC prints, at once


class StepError(RuntimeError):
    """The failure of a stage, as one line; `status` is the stage's exit status."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class DvcClient:
    """A client of a running DVC process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, action: Action, argument: str, *, on_line: OnLine = lambda _line: None) -> Answer:
        """Send a request and return its answer; if the process ends instead, return an answer with the reason."""
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(Request(action, argument).to_line())
            self._process.stdin.flush()
        for line in self._process.stdout:
            if answer := Answer.from_line(line):
                return answer
            if text := line.rstrip():
                on_line(text)
        return Answer(status=1, reason=f"the DVC process {describe_exit(self._process.wait())}")


def describe_exit(status: int) -> str:
    """Describe how a process ended, for an error message; a shell reports a signal as 128 + its number."""
    number = -status if status < 0 else status - 128
    if number in {int(member) for member in signal.Signals}:
        hint = " (out of memory?)" if number == signal.SIGKILL else ""
        return f"was ended by {signal.Signals(number).name}{hint}"
    return f"ended with exit status {status}"


@contextmanager
def start_dvc(clone: Path, *, project: Path, environment: Mapping[str, str], lock: IO[str]) -> Iterator[DvcClient]:
    """Start the DVC process of a clone, and yield its client; at the end, stop the process and its stages.

    The process leads a process group of its own. It inherits the locked file `lock`: the lock is held until both the
    flow run and the DVC process have ended.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.dvc_worker", str(clone)],
        cwd=project,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        pass_fds=[lock.fileno()],
        start_new_session=True,
    )
    try:
        yield DvcClient(process)
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[str]) -> None:
    """End the process group with SIGTERM and, after GRACE_SECONDS in which it can clean up, SIGKILL."""
    try:
        with _ignored_sigterm(), contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGTERM)
            process.communicate(timeout=GRACE_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def _ignored_sigterm() -> Iterator[None]:
    """Ignore SIGTERM in the block: a second SIGTERM must not interrupt the cleanup after the first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
