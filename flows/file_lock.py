"""Keep backup, restore and cleanup from working on the files of a project at the same time."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.core.errors import TemporaryError

LOCK = Path(".dvc/tmp/pipeline-files.lock")  # its content is the command that holds it


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
