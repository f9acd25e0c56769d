"""DVC's part of `flows.cleanup`: hold off runs, find the files in its cache that nothing needs, and remove them.

`dvc gc` cannot state in advance what it would free without certain experiments, removes the metrics that git keeps from
the cache, although the run cache needs them, and leaves entries in the run cache whose files are gone.
"""

import json
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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

from flows.dvc_state import DAMAGED, EXPERIMENT_REF, cache_folder, cached_path, listing
from flows.workspace import KEPT_CLONES
from flows.workspace_folders import hold_off_flow_runs
from pipeline.core.errors import TemporaryError, UserError, first_line
from pipeline.core.git import git, output
from pipeline.core.project import DVC_TEMPORARY_FOLDERS

HASH = r"[0-9a-f]{32}(\.dir)?"
LOCK_FILES = (":(top)*dvc.lock", ":(top)*.dvc")
RWLOCKS = (Path(".dvc/tmp/rwlock"), DVC_TEMPORARY_FOLDERS / "rwlock")
MAX_TREES_PER_COMMAND = 500
_CACHED = re.compile(r"[0-9a-f]{2}/[0-9a-f]{30}(\.dir)?")


@dataclass(frozen=True)
class DvcExperiment:
    """A DVC experiment: its ref, its commit, the commit that it began with, and when it was saved (seconds, UTC)."""

    ref: str
    name: str
    commit: str
    baseline: str
    created: int


@contextmanager
def hold_off_runs(project: Path) -> Iterator[Any]:
    """Hold off flow runs, which wait, and DVC's commands, which fail, for the block; yields DVC's `Repo`.

    Raises TemporaryError where one of them is running, UserError where DVC's records of them are damaged.
    """
    with ExitStack() as stack:
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
            raise UserError(f"{project}: {first_line(error)}") from None
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
            f"try again after its end, or, if no dvc command runs here: rm -rf {clone}"
        )


def _recorded_processes(project: Path) -> Iterator[tuple[int, Path]]:
    """Yield id and record of each process that DVC has on record as running."""
    for name in RWLOCKS:
        records = _read_json(project / name)
        lists = [*records.get("read", {}).values(), [*records.get("write", {}).values()]]
        yield from ((int(record["pid"]), name) for records in lists for record in records if record)
    for kind in ("celery", "run", "standalone/run"):
        for file in (project / DVC_TEMPORARY_FOLDERS / kind).glob("**/*.json"):
            record = _read_json(file)
            if "pid" in record and record.get("returncode") is None:
                yield int(record["pid"]), file.relative_to(project)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise UserError(f"{file} is damaged; if no dvc command runs here: rm {file}") from None
    return content if isinstance(content, dict) else {}


def list_experiments(project: Path) -> list[DvcExperiment]:
    """Return the DVC experiments, newest first; raises UserError where the commit of one cannot be read."""
    fields = "%(refname) %(objectname) %(committerdate:unix)"
    found = []
    for line in git(project, "for-each-ref", f"--format={fields}", "refs/exps").splitlines():
        ref, commit, created = line.split()
        if EXPERIMENT_REF.fullmatch(ref):
            _, _, first, rest, name = ref.split("/", 4)
            found.append(DvcExperiment(ref, name, commit, first + rest, int(created)))
    return sorted(found, key=lambda one: (-one.created, one.ref))


class History:
    """The commits that count: those of all refs but experiments, of all stashes, and of DVC's own records."""

    def __init__(self, project: Path) -> None:
        self.project = project
        refs = git(project, "for-each-ref", "--format=%(refname)", "refs/exps").split()
        stashes = git(project, "stash", "list", "--format=%H").split()
        self._starts = ["--exclude=refs/exps/*", "--all", *stashes]
        self._starts += [ref for ref in refs if not EXPERIMENT_REF.fullmatch(ref)]
        self.commits = set(git(project, "rev-list", *self._starts).split())

    def hashes(self, experiments: Sequence[DvcExperiment]) -> set[str]:
        """Return each MD5 in each dvc.lock and `*.dvc` of the commits, the experiments, the checkout and kept clones.

        Too many rather than too few: hashes of dependencies are among them, and those in a damaged file.
        """
        commits = [one.commit for one in experiments]
        lines = git(self.project, "rev-list", "--format=%T", *self._starts, *commits).splitlines()
        trees = sorted({line for line in lines if not line.startswith("commit ")})
        found = self._grep([], "--cached")
        for start in range(0, len(trees), MAX_TREES_PER_COMMAND):
            found |= self._grep(trees[start : start + MAX_TREES_PER_COMMAND])
        for file in self._files():
            found |= {match[0] for match in re.finditer(HASH, file.read_text("utf-8", "replace"))}
        return found

    def _grep(self, trees: Sequence[str], *options: str) -> set[str]:
        command = ("grep", *options, "--no-color", "--text", "-h", "-o", "-E", HASH, *trees, "--", *LOCK_FILES)
        return set(output(self.project, *command, allowed_statuses=(0, 1)).decode().split())

    def _files(self) -> Iterator[Path]:
        names = output(self.project, "ls-files", "-z", "--cached", "--others", "--", "*dvc.lock", "*.dvc").decode()
        yield from filter(Path.is_file, (self.project / name for name in names.split("\0") if name))
        for clone in (self.project / KEPT_CLONES).glob("*"):
            yield from filter(Path.is_file, [*clone.rglob("dvc.lock"), *clone.rglob("*.dvc")])


def with_contents(project: Path, hashes: Collection[str]) -> set[str]:
    """Return the hashes, and those of the files in each folder among them that the cache has a listing of.

    Raises UserError where a listing is damaged.
    """
    cache, found = cache_folder(project), set(hashes)
    for md5 in hashes:
        try:
            found |= set(listing(cache, md5).values())
        except DAMAGED as error:
            path = cached_path(cache, md5)
            raise UserError(
                f"{path}, the listing of a folder that is still needed, cannot be read ({first_line(error)}); "
                f"remove it, then bring it back: `dvc fetch --all-commits`, or `dvc repro`"
            ) from None
    return found


def is_own_cache(project: Path) -> bool:
    """Return whether the cache is in the project's folder; another one may be shared with other projects."""
    return cache_folder(project).resolve().is_relative_to(project.resolve())


def unused_objects(project: Path, needed: Collection[str]) -> list[Path]:
    """Return the files in DVC's cache whose MD5 is not among those needed."""
    cache = cache_folder(project)
    paths = [path for path in sorted(cache.glob("??/*")) if _CACHED.fullmatch(f"{path.parent.name}/{path.name}")]
    return [path for path in paths if path.parent.name + path.name not in needed]


def run_cache_entries(project: Path, objects: Collection[Path]) -> list[Path]:
    """Return the entries of DVC's run cache that would lead to one of these files, which are to be removed."""
    gone = {path.parent.name + path.name for path in objects}
    settings = Config(dvc_dir=str(project / ".dvc"))
    folder = Path(settings.get("cache", {}).get("dir") or project / ".dvc" / "cache") / "runs"
    return [path for path in sorted(folder.glob("??/*/*")) if gone & _results(path)]


def _results(entry: Path) -> set[str]:
    """Return the hashes of what a run in the run cache made; nothing where the entry is damaged, which DVC removes."""
    try:
        stage = parse_yaml(entry.read_text(encoding="utf-8"), str(entry))
        return {out["md5"] for out in stage["outs"] if "md5" in out}
    except DAMAGED:
        return set()


def remove_experiments(repo: Any, experiments: Sequence[DvcExperiment]) -> None:
    """Remove the experiments; their commits stay in git until it collects its own garbage."""
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
