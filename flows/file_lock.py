"""Keep backup, restore and cleanup from working on the files of a project at the same time, and promotions apart."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from pipeline.artifacts import bytes_md5
from pipeline.core.errors import TemporaryError

LOCK = Path(".dvc/tmp/pipeline-files.lock")  # its content is the command that holds it
PROMOTIONS = Path(".dvc/tmp/promotions")  # folder of a lock file for each registered model, with the same content


@contextmanager
def hold_files(project: Path, *, command: str) -> Iterator[None]:
    """Hold the project's lock on its files during the block; raises TemporaryError where another command holds it."""

    def refuse(holder: str) -> None:
        holder = holder or "flows.backup, flows.restore or flows.cleanup"
        raise TemporaryError(f"{holder} is running in {project}; try again after its end")

    with _hold(project / LOCK, content=command, on_held=refuse):
        yield


@contextmanager
def hold_promotion(project: Path, name: str, *, command: str, on_wait: Callable[[str], None]) -> Iterator[None]:
    """Hold the project's lock on the promotions of a registered model during the block.

    While another process holds it, this waits, after `on_wait` was called with a line that names that process.
    """

    def announce(holder: str) -> None:
        on_wait(f"waiting for {holder or 'another promotion'} of {name}, which runs now")

    path = project / PROMOTIONS / f"{bytes_md5(name.encode())[:12]}.lock"
    with _hold(path, content=f"{command} (process {os.getpid()})", on_held=announce):
        yield


@contextmanager
def _hold(path: Path, *, content: str, on_held: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock file with this content during the block.

    While another process holds it, this waits, after `on_held` was called with the content that the file has then;
    `on_held` raises an error where it must not wait.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as lock:
        if not _try_lock(lock):
            lock.seek(0)
            on_held(lock.read().strip())
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(content)
        lock.flush()
        yield


def _try_lock(lock: TextIO) -> bool:
    """Lock an open file, and return whether no other process holds it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
