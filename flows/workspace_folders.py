"""Make, find and remove the folders of workspaces, `.dvc/tmp/flows/<name>/`, each with a lock file `<name>.lock`.

Flow run and DVC process hold the lock while they live, and the kernel releases it when they die: a folder whose lock
is free was left by killed processes.
"""

import fcntl
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pipeline.core.errors import TemporaryError

FOLDER = Path(".dvc/tmp/flows")


@contextmanager
def make_folder(project: Path, name: str) -> Iterator[tuple[Path, IO[str]]]:
    """Make a folder and its locked lock file, yield both, and remove them at the end; leftovers are removed first."""
    parent = project / FOLDER
    parent.mkdir(parents=True, exist_ok=True)
    folder, lock_path = parent / name, parent / f"{name}.lock"
    with _exclusive_access(project):
        _remove(_leftovers(project))
        folder.mkdir()
        lock = lock_path.open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    with lock:
        try:
            yield folder, lock
        finally:
            shutil.rmtree(folder)
            lock_path.unlink()


@contextmanager
def _exclusive_access(project: Path) -> Iterator[None]:
    """Exclude other processes in the block: a new folder, whose lock file does not exist yet, is not a leftover."""
    with (project / FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def hold_off_flow_runs(project: Path) -> Iterator[None]:
    """Let flow runs that start during the block wait for its end; raises TemporaryError where one is running."""
    (project / FOLDER).mkdir(parents=True, exist_ok=True)
    with _exclusive_access(project):
        if names := in_use(project):
            raise TemporaryError(
                f"flow runs of this project are running ({', '.join(names)}); try again when they have ended"
            )
        yield


def is_held(project: Path, name: str) -> bool:
    """Return whether a flow run or its stages are running in the workspace of this name."""
    try:
        with (project / FOLDER / f"{name}.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def in_use(project: Path) -> list[str]:
    """Return the names of the workspaces in which flow runs or their stages are running."""
    return [lock.stem for lock in (project / FOLDER).glob("*.lock") if is_held(project, lock.stem)]


def find_leftovers(project: Path) -> list[str]:
    """Return the names of the workspaces that killed flow runs left."""
    if not (project / FOLDER).is_dir():
        return []
    with _exclusive_access(project):
        return [folder.name for folder in _leftovers(project)]


def remove_leftovers(project: Path) -> list[str]:
    """Remove the workspaces that killed flow runs left, and return their names."""
    if not (project / FOLDER).is_dir():
        return []
    with _exclusive_access(project):
        return _remove(_leftovers(project))


def _leftovers(project: Path) -> list[Path]:
    """Return the folders whose lock is free."""
    folders = (path for path in (project / FOLDER).glob("*") if path.is_dir())
    return [folder for folder in folders if not is_held(project, folder.name)]


def _remove(folders: Sequence[Path]) -> list[str]:
    """Remove the folders and their lock files, and return the names of the folders."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_name(f"{folder.name}.lock").unlink(missing_ok=True)
    return [folder.name for folder in folders]
