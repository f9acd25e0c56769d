"""The folders of workspaces, `.dvc/tmp/flows/<name>/`, each beside a lock file `<name>.lock`.

Flow run and DVC process hold the lock while they live, and the kernel releases it when they die: a folder whose lock
nobody holds was left by killed processes.
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
def own_folder(project: Path, name: str) -> Iterator[tuple[Path, IO[str]]]:
    """Make a folder and its locked lock file, and remove both on leaving; folders of the dead are removed first."""
    parent = project / FOLDER
    parent.mkdir(parents=True, exist_ok=True)
    folder, lock_path = parent / name, parent / f"{name}.lock"
    with _all_workspaces(project):
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
def _all_workspaces(project: Path) -> Iterator[None]:
    """Exclude other processes: a folder whose lock is still to be made must not pass for a leftover."""
    with (project / FOLDER / "lock").open("w") as everything:
        fcntl.flock(everything, fcntl.LOCK_EX)
        yield


@contextmanager
def hold_off_flow_runs(project: Path) -> Iterator[None]:
    """Let flow runs that start during the block wait for its end; raises TemporaryError where one is running."""
    (project / FOLDER).mkdir(parents=True, exist_ok=True)
    with _all_workspaces(project):
        if names := in_use(project):
            raise TemporaryError(f"flow runs of this project run ({', '.join(names)}); try again after their end")
        yield


def is_held(project: Path, name: str) -> bool:
    """Whether a flow run or its stages live in the workspace of this name."""
    try:
        with (project / FOLDER / f"{name}.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def in_use(project: Path) -> list[str]:
    """Return the names of the workspaces in which flow runs or their stages live."""
    return [lock.stem for lock in (project / FOLDER).glob("*.lock") if is_held(project, lock.stem)]


def find_leftovers(project: Path) -> list[str]:
    """Return the names of the workspaces that killed flow runs left."""
    if not (project / FOLDER).is_dir():
        return []
    with _all_workspaces(project):
        return [folder.name for folder in _leftovers(project)]


def remove_leftovers(project: Path) -> list[str]:
    """Remove the workspaces that killed flow runs left; returns their names."""
    if not (project / FOLDER).is_dir():
        return []
    with _all_workspaces(project):
        return _remove(_leftovers(project))


def _leftovers(project: Path) -> list[Path]:
    folders = (path for path in (project / FOLDER).glob("*") if path.is_dir())
    return [folder for folder in folders if not is_held(project, folder.name)]


def _remove(folders: Sequence[Path]) -> list[str]:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_name(f"{folder.name}.lock").unlink(missing_ok=True)
    return [folder.name for folder in folders]
