"""Keep backup, restore and cleanup from working on the files of a project at the same time, and promotions apart."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.artifacts import bytes_md5
from pipeline.core.errors import TemporaryError

LOCK = Path(".dvc/tmp/pipeline-files.lock")  # its content is the command that holds it
PROMOTIONS = Path(".dvc/tmp/promotions")  # folder of a lock file for each registered model, with the same content


@contextmanager
def hold_files(project: Path, *, command: str) -> Iterator[None]:
    """Hold the project's lock on its files during the block; raises TemporaryError where another command holds it."""
    path = project / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "flows.backup, flows.restore or flows.cleanup"
            raise TemporaryError(f"{holder} is running in {project}; try again after its end") from None
        lock.truncate(0)
        lock.write(command)
        lock.flush()
        yield


@contextmanager
def hold_promotion(project: Path, name: str, *, command: str, on_wait: Callable[[str], None]) -> Iterator[None]:
    """Hold the project's lock on the promotions of a registered model during the block.

    While another process holds it, this waits, after `on_wait` was called with a line that names that process.
    """
    path = project / PROMOTIONS / f"{bytes_md5(name.encode())[:12]}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another promotion"
            on_wait(f"waiting for {holder} of {name}, which runs now")
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(f"{command} (process {os.getpid()})")
        lock.flush()
        yield
