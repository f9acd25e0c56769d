"""What killed or careless commands leave in DVC: locks of dead processes, and files that its cache does not have."""

import fcntl
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from dvc.config import Config
from dvc.exceptions import DvcException
from dvc.utils.serialize import parse_yaml

from pipeline.artifacts import file_md5
from pipeline.core.errors import first_line
from pipeline.core.git import git, read_committed
from pipeline.core.processes import START_TOLERANCE_SECONDS

RWLOCK = Path(".dvc/tmp/rwlock")
"""JSON: {"read": {path: [{"pid": …, "cmd": …}]}, "write": {path: {"pid": …, "cmd": …}}}."""
HARDLINK_LOCK = Path(".dvc/tmp/lock")
HERE = "this checkout"
DAMAGED = (DvcException, ValueError, TypeError, KeyError, AttributeError)
"""What is raised where the text of a dvc.lock or of a folder's listing in DVC's cache is not what DVC wrote."""
_EXPERIMENT = re.compile(r"refs/exps/[0-9a-f]{2}/[0-9a-f]{38}/[^/]+")


@dataclass(frozen=True)
class Missing:
    """Outputs of the checkout (owner is HERE) or of an experiment of which files are nowhere to be had."""

    owner: str
    outputs: tuple[str, ...]
    damaged: str = ""
    """Why nothing is known of its outputs, where dvc.yaml or dvc.lock cannot be read."""


def dead_lockers(project: Path) -> list[int]:
    """The dead processes among those that hold a lock on an output or a dependency.

    Raises ValueError where DVC's file is damaged, which stops DVC too.
    """
    path = project / RWLOCK
    try:
        written, text = path.stat().st_mtime, path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    pids = {entry["pid"] for entries in _entries(json.loads(text)) for entry in entries}
    return sorted(pid for pid in pids if not _may_hold(pid, written=written))


def _entries(locks: Any) -> Iterator[list[dict[str, Any]]]:
    yield from locks.get("read", {}).values()
    yield from ([entry] for entry in locks.get("write", {}).values())


def _may_hold(pid: int, *, written: float) -> bool:
    """DVC notes no start time; who started after the file was last written is a later owner of the id.

    A clock set forward moves the start, but not the file's time, so a command of DVC's counts whatever its start.
    """
    try:
        process = psutil.Process(pid)
        older = process.create_time() < written + START_TOLERANCE_SECONDS
        return (older or _runs_dvc(process)) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # another user's, on macOS: what is not known must count as alive
        return True


def _runs_dvc(process: psutil.Process) -> bool:
    """As `dvc …`, `python -m dvc …` or a workspace's `python -m flows.dvc_worker`."""
    return any("dvc" in Path(word).name for word in process.cmdline())


def release_dead_lockers(project: Path) -> bool:
    """Take the locks of dead processes out; False where DVC is writing the file just now."""
    path = project / RWLOCK
    with suppress(BlockingIOError), path.with_name("rwlock.lock").open("a") as guard:  # as DVC itself guards it
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        dead = set(dead_lockers(project))
        locks = json.loads(path.read_text(encoding="utf-8"))
        readers = {
            name: [entry for entry in entries if entry["pid"] not in dead]
            for name, entries in locks.get("read", {}).items()
        }
        writers = {name: entry for name, entry in locks.get("write", {}).items() if entry["pid"] not in dead}
        kept = {"read": {name: entries for name, entries in readers.items() if entries}, "write": writers}
        path.write_text(json.dumps({mode: names for mode, names in kept.items() if names}), encoding="utf-8")
        return True
    return False


def hardlink_lock(project: Path) -> bool:
    """Whether the lock of `core.hardlink_lock` is taken: a second link to the file, with no word on who made it."""
    path = project / HARDLINK_LOCK
    return path.exists() and path.stat().st_nlink > 1


def missing_outputs(project: Path) -> Iterator[Missing]:
    """The outputs, of this checkout and of each experiment, that neither the cache nor the checkout has whole."""
    cache = cache_folder(project)
    for owner, definition, lock in _lock_files(project):
        try:
            outputs = list(_cached_outputs(definition, lock))
        except DAMAGED as error:
            yield Missing(owner, (), damaged=first_line(error))
            continue
        if lacking := tuple(output for output, md5 in outputs if not _is_whole(project, cache, output, md5)):
            yield Missing(owner, lacking)


def cache_folder(project: Path) -> Path:
    settings = Config(dvc_dir=str(project / ".dvc"))
    return Path(settings.get("cache", {}).get("dir") or project / ".dvc" / "cache") / "files" / "md5"


def _lock_files(project: Path) -> Iterator[tuple[str, str, str]]:
    """Owner, dvc.yaml and dvc.lock of the checkout and of each experiment."""
    if (project / "dvc.lock").exists():
        definition, lock = ((project / name).read_text(encoding="utf-8") for name in ("dvc.yaml", "dvc.lock"))
        yield HERE, definition, lock
    for ref in experiment_refs(project):
        texts = [read_committed(project, ref, name) for name in ("dvc.yaml", "dvc.lock")]
        if texts[0] and texts[1]:
            yield ref.rpartition("/")[2], texts[0], texts[1]


def experiment_refs(project: Path) -> list[str]:
    """The refs `refs/exps/<2 digits>/<38 digits of the baseline>/<name>`."""
    refs = git(project, "for-each-ref", "--format=%(refname)", "refs/exps").split()
    return [ref for ref in refs if _EXPERIMENT.fullmatch(ref)]  # DVC has others there for its own use


def _cached_outputs(definition: str, lock: str) -> Iterator[tuple[str, str]]:
    """Path and hash of each output that DVC keeps in its cache (git keeps the others)."""
    uncached = {
        path
        for stage in parse_yaml(definition, "dvc.yaml").get("stages", {}).values()
        for kind in ("outs", "metrics", "plots")
        for entry in stage.get(kind, [])
        if isinstance(entry, dict)
        for path, options in entry.items()
        if options.get("cache") is False
    }
    yield from ((path, md5) for path, md5 in outputs(lock).items() if path not in uncached)


def outputs(lock: str) -> dict[str, str]:
    """Path and hash of each output in the text of a dvc.lock."""
    stages = (parse_yaml(lock, "dvc.lock") or {}).get("stages", {})
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", []) if "md5" in out}


def cached_path(cache: Path, md5: str) -> Path:
    """Where DVC keeps the file, or for a folder (`….dir`) its listing."""
    return cache / md5[:2] / md5[2:]


def _is_whole(project: Path, cache: Path, output: str, md5: str) -> bool:
    """Whether each file of the output is in the cache or in the checkout."""
    listing = cached_path(cache, md5)
    if not md5.endswith(".dir"):
        return listing.exists() or _holds(project / output, md5)
    if not listing.exists():
        return (project / output).is_dir()
    try:
        files = [(entry["relpath"], entry["md5"]) for entry in json.loads(listing.read_text(encoding="utf-8"))]
    except DAMAGED:
        return False
    return all(cached_path(cache, md5).exists() or _holds(project / output / name, md5) for name, md5 in files)


def _holds(path: Path, md5: str) -> bool:
    return path.is_file() and file_md5(path) == md5
