"""The one place that asks git: a question that git cannot answer raises, so that no failure passes for an answer."""

import os
import shlex
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import UserError, first_line

UNKNOWN = "unknown"
"""What is recorded where a question could not be answered."""
DIFF = (
    "diff",
    "--binary",
    "--no-ext-diff",
    "--no-textconv",
    "--no-color",
    "--src-prefix=a/",
    "--dst-prefix=b/",
    "--no-relative",
    "--submodule=short",
    "--unified=3",
    "--inter-hunk-context=0",
)
"""What `git apply` can take at the top of the repository, whatever the user's settings for diffs."""
NO_OUTPUTS = ":(exclude)artifacts"  # a pathspec without the stages' outputs
CODE = "pipeline/*.py"
"""Which untracked files count as uncommitted changes: a stage may import them."""
_MISLEADING = (
    *("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR", "GIT_PREFIX"),
    *("GIT_DIFF_OPTS", "GIT_LITERAL_PATHSPECS", "GIT_NOGLOB_PATHSPECS"),
)


def environment() -> dict[str, str]:
    """Return our environment without what a git hook sets, which would point git and DVC to another repository.

    Variables that change what our options and patterns mean are left out too.
    """
    return {name: value for name, value in os.environ.items() if name not in _MISLEADING}


def git(folder: Path, *arguments: str) -> str:
    """Return the standard output of a git command, without white space around it; raises UserError where git fails."""
    return output(folder, *arguments).decode("utf-8", "replace").strip()


def output(folder: Path, *arguments: str, answers: Collection[int] = (0,)) -> bytes:
    """Return the standard output of a git command that ends with one of the exit statuses `answers`.

    Raises UserError with git's reason, and git's own remedy where the folder belongs to another user.
    """
    command = ["git", *arguments]
    try:
        done = subprocess.run(
            command, cwd=folder, env={**environment(), "LC_ALL": "C.UTF-8"}, capture_output=True, check=False
        )
    except FileNotFoundError:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder") from None
        raise UserError("git: not found; install it") from None
    except OSError as error:
        raise UserError(f"git: cannot be started ({error.strerror}); reinstall it") from None
    if done.returncode not in answers:
        raise UserError(_explain(folder, arguments[0], done.stderr.decode("utf-8", "replace")))
    return done.stdout


def _explain(folder: Path, action: str, message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    remedy = next((line for line in lines if line.startswith("git config --global --add safe.directory")), None)
    if remedy:
        return f"git refuses {folder}, which belongs to another user; if you trust it, run `{remedy}`"
    if "not a git repository" in message:
        return f"{folder}: not in a git repository; run `git init`, then commit"
    fatal = next((line for line in lines if line.startswith(("fatal: ", "error: "))), None)
    reason = (fatal or (lines or ["no reason given"])[-1]).removeprefix("fatal: ").removeprefix("error: ")
    return f"git {action} in {folder}: {first_line(reason)}; fix that (`git status` and `git fsck` there show more)"


def find_commit(folder: Path, revision: str) -> str | None:
    """Return the full hash of the commit that a revision names, or None where it names none; raises UserError."""
    if revision.startswith("-"):  # an option to git; git allows no such name
        return None
    question = ("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    return output(folder, *question, answers=(0, 1)).decode().strip() or None


def check_committed(folder: Path, tracked: str) -> str:
    """Return the hash of the commit that is checked out.

    Raises UserError where there is none, or where the repository does not have the file `tracked` of the folder.
    """
    commit = find_commit(folder, "HEAD")
    if commit is None:
        raise UserError(f"{folder}: no git commit yet; run `git add . && git commit -m Start`")
    if not output(folder, "ls-files", "--", tracked):
        repository = git(folder, "rev-parse", "--show-toplevel")
        raise UserError(
            f"{folder}: the git repository {repository} does not track {tracked} here; "
            "run `git add .` and commit, or `git init` first for a repository of its own"
        )
    return commit


def read_committed(folder: Path, commit: str, name: str) -> str | None:
    """Return the text of a file in a commit, or None where the commit has no such file; raises UserError."""
    if not output(folder, "ls-tree", "--name-only", commit, "--", name).strip():
        return None
    return output(folder, "show", f"{commit}:./{name}").decode("utf-8", "replace")


def setting(folder: Path, name: str) -> str | None:
    """Return a setting such as user.name, or None where it is not set; raises UserError for damaged settings."""
    return output(folder, "config", name, answers=(0, 1)).decode("utf-8", "replace").strip() or None


@dataclass(frozen=True)
class CodeState:
    """The code in a folder: `commit`, and `difference`, a patch from the commit to what is there.

    Both are None where git could not answer; `problem` says why.
    """

    commit: str | None
    difference: bytes | None
    problem: str = ""

    @property
    def dirty(self) -> str:
        """`true`, `false` or `unknown`."""
        return UNKNOWN if self.difference is None else str(bool(self.difference)).lower()


def code_state(folder: Path, *, tracked: str) -> CodeState:
    """Return which code is in the folder, by a repository that has the file `tracked` of that folder; raises nothing.

    Of a larger repository, changes below the folder count alone; the stages' outputs do not count.
    """
    commit = None
    try:
        commit = check_committed(folder, tracked)
        _check_all_compared(folder)
        return CodeState(commit, output(folder, *DIFF, "HEAD", "--", ".", NO_OUTPUTS) + _untracked_code(folder))
    except UserError as error:
        return CodeState(commit, None, str(error))


def _check_all_compared(folder: Path) -> None:
    """Raise UserError where the index has git take a file for unchanged without a look at it.

    A file that a sparse checkout leaves out is no such file: it is not there.
    """
    entries = output(folder, "ls-files", "-v", "-z", "--", ".").decode("utf-8", "surrogateescape").split("\0")
    for flag, name in (entry.split(" ", 1) for entry in entries if entry):
        if flag.islower() or (flag == "S" and os.path.lexists(folder / name)):
            option = "--no-assume-unchanged" if flag.islower() else "--no-skip-worktree"
            raise UserError(
                f"{folder}: git does not compare {name} with the commit; let it, by "
                f"`git update-index {option} -- {shlex.quote(name)}`"
            )


def _untracked_code(folder: Path) -> bytes:
    """Return a patch that adds the code that git neither tracks nor ignores."""
    names = output(folder, "ls-files", "--others", "--exclude-standard", "-z", "--", CODE).decode().split("\0")
    prefix = git(folder, "rev-parse", "--show-prefix")  # without an index, git names files by the current folder
    diff = (*DIFF, f"--src-prefix=a/{prefix}", f"--dst-prefix=b/{prefix}", "--no-index", "--", os.devnull)
    patches = (output(folder, *diff, name, answers=(0, 1)) for name in names if name)
    return b"".join(patches)
