"""Find the experiments of a project, and the hashes of all files that its branches, stashes and clones need.

An answer that is not certain raises UserError: what this module does not find, `flows.cleanup` removes.
"""

import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dvc.utils.serialize import parse_yaml

from flows.dvc_state import (
    DAMAGED,
    EXPERIMENT_REF,
    cache_folder,
    cached_path,
    listing,
    split_experiment_ref,
)
from flows.workspace import KEPT_CLONES
from pipeline.core.errors import UserError, first_line
from pipeline.core.git import git, output, read_committed

HASH = r"[0-9a-f]{32}(\.dir)?"
LOCK_FILES = (":(top)*dvc.lock", ":(top)*.dvc")
MAX_TREES_PER_COMMAND = 500
# the user's settings for `git grep` must not change what it prints
_GREP = ("grep", "--no-color", "--no-line-number", "--no-column", "--no-recurse-submodules", "--text", "-h", "-o", "-E")
_DVC_FOLDER = re.compile(r"(?:(.*)/)?\.dvc/[^/]+")  # a file in the folder `.dvc` of a project


@dataclass(frozen=True)
class DvcExperiment:
    """A DVC experiment: its ref, its commit, the commit that it began with, and when it was saved (seconds, UTC)."""

    ref: str
    name: str
    commit: str
    baseline: str
    created: int


def list_experiments(project: Path) -> list[DvcExperiment]:
    """Return the DVC experiments, newest first; raises UserError where the commit of one cannot be read."""
    fields = "%(refname) %(objectname) %(committerdate:unix)"
    found = []
    for line in git(project, "for-each-ref", f"--format={fields}", "refs/exps").splitlines():
        ref, commit, created = line.split()
        if EXPERIMENT_REF.fullmatch(ref):
            baseline, name = split_experiment_ref(ref)
            found.append(DvcExperiment(ref, name, commit, baseline, int(created)))
    return sorted(found, key=lambda one: (-one.created, one.ref))


def check_only_project(project: Path, experiments: Sequence[DvcExperiment]) -> None:
    """Raise UserError where the repository has another worktree or another DVC project.

    Their experiments are among those of this repository, but their stores, locks and unsaved files are not known here.
    """
    lines = output(project, "worktree", "list", "--porcelain").decode("utf-8", "surrogateescape").splitlines()
    worktrees = [line.removeprefix("worktree ") for line in lines if line.startswith("worktree ")]
    if len(worktrees) > 1:
        raise UserError(
            f"{project}: its git repository has {len(worktrees)} worktrees ({', '.join(worktrees)}); allowed: one, "
            "since experiments of all of them would be removed; remove the others: `git worktree remove FOLDER`"
        )
    listings = [output(project, "ls-files", "-z", "--full-name", "--", ":(top)")]
    listings += [
        output(project, "ls-tree", "-r", "-z", "--name-only", "--full-tree", one.commit) for one in experiments
    ]
    names = {name for listed in listings for name in os.fsdecode(listed).split("\0")}
    projects = {match[1] or "." for name in names if (match := _DVC_FOLDER.fullmatch(name))}
    here = git(project, "rev-parse", "--show-prefix").rstrip("/") or "."
    if others := sorted(projects - {here}):
        raise UserError(
            f"{project}: its git repository has other DVC projects ({', '.join(others)}); allowed: this one alone, "
            "since their experiments would be removed; remove experiments by hand: `dvc exp remove NAME`"
        )


class History:
    """The commits whose files must be kept: those of all refs except experiments, of stashes, and of DVC's records."""

    def __init__(self, project: Path) -> None:
        self.project = project
        refs = git(project, "for-each-ref", "--format=%(refname)", "refs/exps", "refs/stash").split()
        records = [ref for ref in refs if not EXPERIMENT_REF.fullmatch(ref)]
        # DVC's queue and git's stashes are lists: the ref is the newest entry, its reflog has the others
        entries = git(project, "rev-list", "--walk-reflogs", *records).split() if records else []
        self._starts = ["--exclude=refs/exps/*", "--all", *records, *entries]
        self.commits = set(git(project, "rev-list", *self._starts).split())

    def hashes(self, experiments: Sequence[DvcExperiment]) -> set[str]:
        """Return each MD5 in each dvc.lock and `*.dvc` of the commits, the experiments, the checkout and kept clones.

        The result may have more hashes than are needed: those of dependencies, and those in a damaged file.
        """
        commits = [one.commit for one in experiments]
        lines = git(self.project, "rev-list", "--format=%T", *self._starts, *commits).splitlines()
        trees = sorted({line for line in lines if not line.startswith("commit ")})
        found = self._grep([], "--cached")
        for start in range(0, len(trees), MAX_TREES_PER_COMMAND):
            found |= self._grep(trees[start : start + MAX_TREES_PER_COMMAND])
        for text in self._local_texts():
            found |= {match[0] for match in re.finditer(HASH, text)}
        return found

    def missing_folders(self, experiments: Sequence[DvcExperiment]) -> list[str]:
        """Return the output folders of the checkout, kept clones and experiments whose listing is not in the cache.

        The hashes of the files in such a folder are not known. A dvc.lock that cannot be read counts as one.
        """
        cache, found = cache_folder(self.project), set[str]()
        committed = (read_committed(self.project, one.commit, "dvc.lock") or "" for one in experiments)
        for text in [*self._local_texts(), *committed]:
            try:
                folders = _output_folders(text)
            except DAMAGED:
                found.add("those in a damaged dvc.lock or .dvc file")
            else:
                found |= {path for path, md5 in folders.items() if not cached_path(cache, md5).is_file()}
        return sorted(found)

    def _grep(self, trees: Sequence[str], *options: str) -> set[str]:
        """Return the hashes that git finds; raises UserError where git reports that it could not read a file."""
        command = (*_GREP, *options, HASH, *trees, "--", *LOCK_FILES)
        found = set(output(self.project, *command, allowed_statuses=(0, 1), allow_messages=False).decode().split())
        if unknown := [text for text in found if not re.fullmatch(HASH, text)]:
            raise UserError(
                f"git grep in {self.project}: found {unknown[0]!r}; allowed: MD5 hashes alone; remove the sections "
                "`grep` of your git settings (`git config --show-origin --get-regexp grep` lists them)"
            )
        return found

    def _local_texts(self) -> Iterator[str]:
        """Yield the text of each dvc.lock and `*.dvc` of the checkout and of kept clones."""
        listed = output(self.project, "ls-files", "-z", "--cached", "--others", "--", "*dvc.lock", "*.dvc")
        files = [self.project / name for name in os.fsdecode(listed).split("\0") if name]
        for clone in (self.project / KEPT_CLONES).glob("*"):
            files += [*clone.rglob("dvc.lock"), *clone.rglob("*.dvc")]
        yield from (file.read_text("utf-8", "replace") for file in files if file.is_file())


def _output_folders(text: str) -> dict[str, str]:
    """Return path and hash of each folder among the outputs in a dvc.lock or `*.dvc` file; raises one of DAMAGED."""
    content = parse_yaml(text, "dvc.lock") or {}
    stages = [content, *content.get("stages", {}).values()]
    outs = [out for stage in stages for out in stage.get("outs", [])]
    return {out["path"]: out["md5"] for out in outs if out.get("md5", "").endswith(".dir")}


def add_folder_contents(project: Path, hashes: Collection[str]) -> set[str]:
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
