"""Keep the commit whose `dvc.lock` made the champion as a git ref, so that it can be checked out without MLflow.

`refs/champions/<name>` belongs to the registered model <name>. Neither checkout, index nor stash are touched.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from flows.dvc_history import list_experiments
from flows.dvc_state import DAMAGED, cache_folder, listing, outputs
from flows.git import take_snapshot
from pipeline.artifacts import BEST_WEIGHTS, TRAIN, bytes_md5
from pipeline.core.errors import UserError
from pipeline.core.git import find_commit, git, read_committed

CHAMPIONS = "refs/champions"
LOCK_FILE = "dvc.lock"


def ref_of(name: str) -> str:
    """Return the git ref for a registered model: its name, with a hyphen for what is no letter, digit, `_` or `-`.

    A name that is changed gets the first six digits of its MD5 at the end, so that no two share a ref.
    """
    valid = re.sub(r"[^\w-]+", "-", name).strip("-")
    return f"{CHAMPIONS}/{valid if valid == name else f'{valid}-{bytes_md5(name.encode())[:6]}'}"


def champion_refs(project: Path) -> dict[str, str]:
    """Return the commit of each ref of a champion."""
    lines = git(project, "for-each-ref", "--format=%(refname) %(objectname)", CHAMPIONS).splitlines()
    return dict(line.split() for line in lines)


def read_ref(project: Path, name: str) -> str | None:
    """Return the commit of the champion of a registered model, or None where it has none here."""
    return find_commit(project, ref_of(name))


def write_ref(project: Path, name: str, commit: str | None) -> None:
    """Set the ref to a commit, or delete it with None; git replaces it in one step."""
    if commit is None:
        git(project, "update-ref", "-d", ref_of(name))
    else:
        git(project, "update-ref", "--create-reflog", "-m", "promote", ref_of(name), commit)


def champion_commit(project: Path, *, model_md5: str, experiment: str | None = None) -> str:
    """Return a commit whose dvc.lock made the model of this MD5.

    That is the commit of the DVC experiment of this name or, if that did not make the model, of the newest one that
    did; else the commit that is checked out; else a new commit with the uncommitted changes of the checkout, which no
    branch has. Raises UserError where none of their dvc.lock names the model.
    """
    experiments = sorted(list_experiments(project), key=lambda one: one.name != experiment)
    for commit in (*(one.commit for one in experiments), "HEAD"):
        if model_md5 in _models(project, read_committed(project, commit, LOCK_FILE)):
            return git(project, "rev-parse", commit)
    lock = project / LOCK_FILE
    if lock.exists() and model_md5 in _models(project, lock.read_text(encoding="utf-8", errors="replace")):
        commit = take_snapshot(project)
        if model_md5 in _models(project, read_committed(project, commit, LOCK_FILE)):
            return commit
    raise UserError(
        f"model {model_md5}: found no commit here whose {LOCK_FILE} made it; allowed: the model of a DVC experiment or "
        f"of the checkout, whose files are in DVC's cache; `dvc exp pull REMOTE {experiment or 'NAME'}` or `dvc fetch` "
        "brings it"
    )


def _models(project: Path, lock: str | None) -> Iterator[str]:
    """Yield the MD5 of the weights that a dvc.lock names; nothing where that cannot be known."""
    try:
        trained = outputs(lock or "").get(str(TRAIN), "")
        if md5 := listing(cache_folder(project), trained).get(BEST_WEIGHTS):
            yield md5
    except DAMAGED:
        return
