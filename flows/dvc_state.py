"""Read DVC's own records: experiments in git's refs, outputs in dvc.lock, and the files in its cache."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvc.config import Config
from dvc.exceptions import DvcException
from dvc.utils.serialize import parse_yaml

from pipeline.core.git import git, read_committed

# raised where the text of a dvc.lock, or of a folder's listing in DVC's cache, is not what DVC wrote
DAMAGED = (DvcException, ValueError, TypeError, KeyError, AttributeError)
EXPERIMENT_REF = re.compile(r"refs/exps/[0-9a-f]{2}/[0-9a-f]{38}/[^/]+")
CACHE_OBJECT = re.compile(r"[0-9a-f]{2}/[0-9a-f]{30}(\.dir)?")  # a file below `cache_folder`, by its MD5


def experiment_refs(project: Path) -> list[str]:
    """Return the git refs of the experiments: `refs/exps/<2 digits>/<38 digits of the baseline commit>/<name>`."""
    refs = git(project, "for-each-ref", "--format=%(refname)", "refs/exps").split()
    return [ref for ref in refs if EXPERIMENT_REF.fullmatch(ref)]  # DVC has others there for its own use


def split_experiment_ref(ref: str) -> tuple[str, str]:
    """Return the baseline commit and the name in the git ref of an experiment."""
    _, _, first, rest, name = ref.split("/", 4)
    return first + rest, name


@dataclass(frozen=True)
class Lock:
    """The content of a dvc.lock: hashes of all outputs and dependencies by path, and the parameters by section."""

    outputs: Mapping[str, str]
    dependencies: Mapping[str, str]
    params: Mapping[str, Mapping[str, Any]]


def parse_lock(lock: str) -> Lock:
    """Return the content of the text of a dvc.lock; raises one of DAMAGED."""
    stages = list((parse_yaml(lock, "dvc.lock") or {}).get("stages", {}).values())
    outs, deps = ([one for stage in stages for one in stage.get(kind, []) if "md5" in one] for kind in ("outs", "deps"))
    params: dict[str, Mapping[str, Any]] = {}
    for stage in stages:
        params |= stage.get("params", {}).get("params.yaml", {})
    return Lock({one["path"]: one["md5"] for one in outs}, {one["path"]: one["md5"] for one in deps}, params)


def outputs(lock: str) -> dict[str, str]:
    """Return path and hash of each output in the text of a dvc.lock; raises one of DAMAGED."""
    return dict(parse_lock(lock).outputs)


def cache_folder(project: Path) -> Path:
    """Return the folder in which DVC stores files by their MD5."""
    return _cache(project) / "files" / "md5"


def run_cache_folder(project: Path) -> Path:
    """Return the folder in which DVC records which stage made which files: its run cache."""
    return _cache(project) / "runs"


def _cache(project: Path) -> Path:
    settings = Config(dvc_dir=str(project / ".dvc"))
    return Path(settings.get("cache", {}).get("dir") or project / ".dvc" / "cache")


def cached_path(cache: Path, md5: str) -> Path:
    """Return the path in the cache of a file or, for the hash of a folder (`….dir`), of the folder's listing."""
    return cache / md5[:2] / md5[2:]


def listing(cache: Path, md5: str) -> dict[str, str]:
    """Return path and hash of each file in a folder; empty where its listing is not cached. Raises one of DAMAGED."""
    path = cached_path(cache, md5)
    if not (md5.endswith(".dir") and path.is_file()):
        return {}
    return {entry["relpath"]: entry["md5"] for entry in json.loads(path.read_text(encoding="utf-8"))}


def is_cached(cache: Path, md5: str) -> bool:
    """Return whether the cache has the file, or for a folder its listing and each file in it."""
    try:
        return all(cached_path(cache, part).is_file() for part in [md5, *listing(cache, md5).values()])
    except DAMAGED:
        return False


def missing_outputs(project: Path, commit: str | None = None) -> list[str]:
    """Return the outputs in the dvc.lock of a commit, by default of the checkout, of which files are not cached.

    Outputs that git tracks are left out. Raises one of DAMAGED. DVC has no command for this: `dvc data status` checks
    only the checkout; `Repo.cache_check_missing`, which is not documented, overlooks damaged listings.
    """
    file, cache = project / "dvc.lock", cache_folder(project)
    lock = read_committed(project, commit, file.name) if commit else file.read_text("utf-8") if file.exists() else None
    tracked = git(project, "ls-tree", "-r", "--name-only", "-z", commit or "HEAD").split("\0")
    return [path for path, md5 in outputs(lock or "").items() if path not in tracked and not is_cached(cache, md5)]
