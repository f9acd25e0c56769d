"""DVC's part of `flows.cleanup`: hold off runs, find the files in its cache that nothing needs, and remove them.

`dvc gc` cannot state in advance what it would free without certain experiments, removes the metrics that git keeps from
the cache, although the run cache needs them, and leaves entries in the run cache whose files are gone.
"""

import json
import shlex
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
from dvc.config import Config
from dvc.exceptions import DvcException
from dvc.lock import LockError
from dvc.repo import Repo, lock_repo
from dvc.repo.experiments.refs import CELERY_STASH, WORKSPACE_STASH
from dvc.repo.experiments.utils import get_exp_rwlock
from dvc.utils.serialize import parse_yaml

from flows.dvc_history import DvcExperiment
from flows.dvc_state import CACHE_OBJECT, DAMAGED, cache_folder, run_cache_folder
from flows.file_lock import hold_files
from flows.workspace_folders import hold_off_flow_runs
from pipeline.core.errors import TemporaryError, UserError, first_line
from pipeline.core.project import DVC_TEMPORARY_FOLDERS

RWLOCKS = (Path(".dvc/tmp/rwlock"), DVC_TEMPORARY_FOLDERS / "rwlock")
NUM_READS = 5
READ_INTERVAL_SECONDS = 0.1


@contextmanager
def hold_off_runs(project: Path) -> Iterator[Any]:
    """Make flow runs wait, and DVC's commands, backups and restores fail, during the block; yield DVC's `Repo`.

    Raises TemporaryError where one of them is running, UserError where DVC's records of them are damaged.
    """
    with ExitStack() as stack:
        stack.enter_context(hold_files(project, command="flows.cleanup"))
        stack.enter_context(hold_off_flow_runs(project))
        try:
            repo = stack.enter_context(Repo(str(project)))
            stack.enter_context(lock_repo(repo))
            _check_no_process(project)
            # a queued experiment that a worker starts now fails, and does not lose files
            stack.enter_context(get_exp_rwlock(repo, writes=[CELERY_STASH, WORKSPACE_STASH]))
        except LockError as error:
            raise TemporaryError(f"a dvc command is running in {project} ({first_line(error)}); try again") from None
        except DvcException as error:
            raise UserError(
                f"{project}: DVC reports: {first_line(error)}; allowed: a DVC project that `dvc status` can read; "
                f"correct what DVC names, then try again"
            ) from None
        yield repo


def _check_no_process(project: Path) -> None:
    """Raise TemporaryError where a stage, an experiment or a queue of DVC is running, or may be."""
    for pid, file in _recorded_processes(project):
        if psutil.pid_exists(pid):
            raise TemporaryError(f"dvc is running in {project} (process {pid}, by {file}); try again after its end")
    folder = project / DVC_TEMPORARY_FOLDERS
    for clone in [*folder.glob("tmp*"), *folder.glob("standalone/tmp*")]:
        raise TemporaryError(
            f"`dvc exp run --temp` or `--queue` is running in {clone}, or was killed there; "
            f"try again after its end, or, if no dvc command runs here: rm -rf {shlex.quote(str(clone))}"
        )


def _recorded_processes(project: Path) -> Iterator[tuple[int, Path]]:
    """Yield id and record of each process that DVC has on record as running."""
    for name in RWLOCKS:
        records = _read_json(project / name)
        try:
            lists = [*records.get("read", {}).values(), [*records.get("write", {}).values()]]
            yield from [(int(record["pid"]), name) for records in lists for record in records if record]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise _damaged(project / name) from None
    for kind in ("celery", "run", "standalone/run"):
        for file in (project / DVC_TEMPORARY_FOLDERS / kind).glob("**/*.json"):
            record = _read_json(file)
            if "pid" in record and record.get("returncode") is None:
                try:
                    yield int(record["pid"]), file.relative_to(project)
                except (TypeError, ValueError):
                    raise _damaged(file) from None


def _read_json(file: Path) -> dict[str, Any]:
    """Return a record of DVC, or nothing where it does not exist; raises UserError where it is damaged.

    DVC writes a record in place, so one that cannot be read is read again, in case that it was being written.
    """
    for _ in range(NUM_READS):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError:
            time.sleep(READ_INTERVAL_SECONDS)
        else:
            return content if isinstance(content, dict) else {}
    raise _damaged(file)


def _damaged(file: Path) -> UserError:
    return UserError(f"{file} is damaged; if no dvc command runs here: rm {shlex.quote(str(file))}")


def is_own_cache(project: Path) -> bool:
    """Return whether only this project uses the cache, as its place and the setting `cache.shared` show."""
    if Config(dvc_dir=str(project / ".dvc")).get("cache", {}).get("shared"):
        return False
    return cache_folder(project).resolve().is_relative_to(project.resolve())


def unused_objects(project: Path, needed: Collection[str]) -> list[Path]:
    """Return the files in DVC's cache whose MD5 is not among those needed."""
    cache = cache_folder(project)
    paths = [path for path in sorted(cache.glob("??/*")) if CACHE_OBJECT.fullmatch(f"{path.parent.name}/{path.name}")]
    return [path for path in paths if path.parent.name + path.name not in needed]


def run_cache_entries(project: Path, objects: Collection[Path]) -> list[Path]:
    """Return the entries of DVC's run cache that would lead to one of these files, which are to be removed."""
    gone = {path.parent.name + path.name for path in objects}
    return [path for path in sorted(run_cache_folder(project).glob("??/*/*")) if gone & _results(path)]


def _results(entry: Path) -> set[str]:
    """Return the hashes of what a run in the run cache made; nothing where the entry is damaged, which DVC removes."""
    try:
        stage = parse_yaml(entry.read_text(encoding="utf-8"), str(entry))
        return {out["md5"] for out in stage["outs"] if "md5" in out}
    except DAMAGED:
        return set()


def remove_experiments(repo: Any, experiments: Sequence[DvcExperiment]) -> None:
    """Remove the experiments; their commits stay in git until `git gc` removes them."""
    if experiments:
        repo.experiments.remove(exp_names=[one.ref for one in experiments])


def remove_entries(entries: Sequence[Path]) -> None:
    """Remove entries of the run cache, and a folder with its last one: DVC fails at an empty folder."""
    for entry in entries:
        removed = entry.parents[3] / "removed-runs"
        if removed.exists():  # left by a killed process
            shutil.rmtree(removed)
        if len(list(entry.parent.iterdir())) > 1:
            entry.unlink()
        else:
            entry.parent.rename(removed)
            shutil.rmtree(removed)


def remove_files(paths: Sequence[Path]) -> None:
    """Remove the files; one that is gone already does not count."""
    for path in paths:
        path.unlink(missing_ok=True)
