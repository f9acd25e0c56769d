"""Run trainings that are killed by SIGKILL at a chosen event, or not at all.

`python -m tests.faults.child` reads JSON requests, one per line: {"folder", "log", "kill"}. For each it forks a process
that runs the step `train` in the folder, and prints its exit status, negative after a signal. Forking saves the slow
imports. Each training step, file operation and message to MLflow is two events, before and after it, which the log
lists. "kill" is the number of an event, or a name and the number of the event among those of that name, such as
["step after", 3].
"""

import functools
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from torch.amp import GradScaler

from pipeline import artifacts, train
from pipeline.tracking import logger
from pipeline.training import checkpoints as checkpoint

FILE_OPERATIONS = ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir")
MESSAGES = ("create_run", "log_batch", "log_artifact", "log_inputs", "set_terminated", "finalize_logged_model")


class Events:
    """A counter of events that kills this process at the chosen one."""

    def __init__(self, log: Path, *, kill: Any) -> None:
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._kill, self._count, self._counts, self._over = kill, 0, Counter[str](), False

    def happen(self, name: str) -> bool:
        """Log an event, and return whether it is the chosen one; no event is logged after that one."""
        if self._over:
            return False
        self._count += 1
        self._counts[name] += 1
        os.write(self._log, f"{name}\n".encode())
        self._over = self._kill in (self._count, [name, self._counts[name]])
        return self._over

    def around(self, owner: Any, name: str, *, label: str) -> None:
        """Make the moments before and after each call of `owner.name` events."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(*values: Any, **options: Any) -> Any:
            if self.happen(f"{label} before"):
                die()
            result = original(*values, **options)
            if self.happen(f"{label} after"):
                die()
            return result

        setattr(owner, name, wrapped)

    def during(self, write: Callable[[Path, bytes], None]) -> Callable[[Path, bytes], None]:
        """Return a function that writes a checkpoint, with events when half of it and all of it is on the disk."""

        def wrapped(path: Path, content: bytes) -> None:
            if self.happen("checkpoint half written"):
                with artifacts.atomic(path) as file:
                    file.write(content[: len(content) // 2])
                    file.flush()
                    die()
            write(path, content)
            if self.happen("checkpoint written"):
                die()

        return wrapped


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run(folder: str, log: str, kill: Any) -> None:
    os.chdir(folder)
    with Path("output.txt").open("ab") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    events = Events(Path(log), kill=kill)
    events.around(GradScaler, "step", label="step")
    for name in FILE_OPERATIONS:
        events.around(os, name, label=name)
    for name in MESSAGES:
        events.around(MlflowClient, name, label=name)
    setattr(checkpoint, "write_bytes", events.during(artifacts.write_bytes))  # noqa: B010  (mypy)
    logger.FLUSH_SECONDS = 0.02  # many messages make it likely that some are sent twice
    train.main()


def main() -> None:
    """Fork a process for each request."""
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                run(**request)
            finally:
                sys.stdout.flush()
                os._exit(0 if sys.exc_info()[0] is None else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
