"""Questions to git about the checkout: can it be cloned, what is uncommitted, which experiments exist, who commits."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.core.git import check_committed, git, setting

MAX_TITLE_LENGTH = 40  # characters of an experiment's name before the digits of the flow run's id
NUM_ID_DIGITS = 6


@dataclass(frozen=True)
class Snapshot:
    """The tracked files of the checkout at one moment.

    `commit` has them, uncommitted changes included; `head` is the commit that was checked out.
    """

    commit: str
    head: str


def check_checkout(project: Path) -> None:
    """Raise UserError where the checkout cannot be cloned: if it is read-only, has no commit, or is in a conflict."""
    find_repository(project)
    if not os.access(project, os.W_OK):
        raise UserError(f"{project}: the folder is read-only for this user; make it writable, or clone the repository")
    if not (project / ".dvc" / "config").exists():
        raise UserError(f"{project}: not a DVC repository; run `dvc init` and commit .dvc/config")
    check_committed(project, "dvc.yaml")
    if unmerged := git(project, "diff", "--name-only", "--diff-filter=U"):
        raise UserError(f"{', '.join(unmerged.split())}: merge conflict; resolve it or run `git merge --abort`")
    changed = git(project, "status", "--porcelain", "--untracked-files=no")
    if changed and git(project, "rev-parse", "--is-shallow-repository") == "true":
        raise UserError(
            f"{project}: a shallow clone with uncommitted changes, which cannot be cloned; "
            "run `git fetch --unshallow`, or commit the changes"
        )


def find_repository(project: Path) -> tuple[Path, Path]:
    """Return the top folder of the git repository, and the project's folder relative to it (usually `.`).

    Raises UserError where there is no repository, or git refuses to use it.
    """
    top, subfolder = git(project, "rev-parse", "--show-toplevel", "--show-prefix").partition("\n")[::2]
    return Path(top), Path(subfolder)


def take_snapshot(project: Path) -> str:
    """Return a commit of HEAD plus the uncommitted changes to tracked files; neither files nor index are changed.

    Raises UserError as `check_checkout` does.
    """
    check_checkout(project)
    changes = git(project, "stash", "create")
    return changes or git(project, "rev-parse", "HEAD")


def apply_difference(difference: bytes, top: Path, *, commit: str) -> None:
    """Apply a recorded `git diff` to the clone at `top`; raises UserError where it does not fit the clone's commit."""
    patch = top.parent / "uncommitted.diff"
    patch.write_bytes(difference)
    try:
        git(top, "apply", "--index", "--whitespace=nowarn", str(patch))
    except UserError as error:
        raise UserError(f"the recorded changes do not apply to commit {commit}: {error}; name another run") from None


def untracked_files(project: Path) -> list[str]:
    """Return the files that are neither tracked nor ignored, relative to `project`; a clone does not have them."""
    return git(project, "ls-files", "--others", "--exclude-standard").splitlines()


def experiment_name(project: Path, title: str, *, flow_run_id: str) -> str:
    """Return a name for a new experiment, valid in git refs: `digits-lr-0-03-3fa9c1` for the title `digits lr=0.03`.

    It begins with the words of the title that fit into MAX_TITLE_LENGTH, and ends with the last digits of the flow
    run's id (its first ones are a time in Prefect's newer ids). The name is thus unique among experiments that run at
    the same time, failed, were removed or are on another machine: MLflow and Prefect still have those by name.
    """
    refs = git(project, "for-each-ref", "--format=%(refname)", "refs/exps")
    taken = {ref.rpartition("/")[2] for ref in refs.split()}
    short, digits = _hyphenated(title), flow_run_id.replace("-", "")
    names = [f"{short}-{end}".strip("-") for end in (digits[-NUM_ID_DIGITS:], digits)]
    return next((name for name in names if name not in taken), names[-1])


def _hyphenated(title: str) -> str:
    """Return the first words of a title, joined by hyphens; a first word that is too long is cut."""
    words = [word for part in title.split() if (word := re.sub(r"[^0-9A-Za-z]+", "-", part).strip("-"))]
    while len(words) > 1 and len("-".join(words)) > MAX_TITLE_LENGTH:
        words.pop()
    return "-".join(words)[:MAX_TITLE_LENGTH].strip("-")


def git_identity(project: Path) -> dict[str, str]:
    """Return environment variables with git's user name and email, or placeholders, since DVC needs both to commit."""
    name, email = setting(project, "user.name") or "flow", setting(project, "user.email") or "flow@localhost"
    roles = {"AUTHOR", "COMMITTER"}
    return {f"GIT_{role}_NAME": name for role in roles} | {f"GIT_{role}_EMAIL": email for role in roles}
