"""The one place that asks git: a question that git cannot answer raises, so that no failure passes for an answer."""

import os
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError, first_line

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
)
"""What `git apply` can take at the top of the repository, whatever the user's settings for diffs."""
CODE = "pipeline/*.py"
"""Which untracked files count as uncommitted changes: a stage may import them."""
_MISLEADING = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR", "GIT_PREFIX")


def environment() -> dict[str, str]:
    """Our environment without what a git hook sets, which would point git and DVC to another repository."""
    return {name: value for name, value in os.environ.items() if name not in _MISLEADING}


def git(folder: Path, *arguments: str) -> str:
    """Standard output of a git command, without white space around it; raises UserError where git fails."""
    return output(folder, *arguments).decode("utf-8", "replace").strip()


def output(folder: Path, *arguments: str, answers: Collection[int] = (0,)) -> bytes:
    """Standard output of a git command that ends with one of the exit statuses `answers`.

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
        raise UserError(f"git: cannot be started ({error.strerror}); install it anew") from None
    if done.returncode not in answers:
        raise UserError(_explain(folder, arguments[0], done.stderr.decode("utf-8", "replace")))
    return done.stdout


def _explain(folder: Path, action: str, said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    remedy = next((line for line in lines if line.startswith("git config --global --add safe.directory")), None)
    if remedy:
        return f"git refuses {folder}, which belongs to another user; if you trust it, run `{remedy}`"
    if "not a git repository" in said:
        return f"{folder}: not in a git repository; run `git init`, then commit"
    fatal = next((line for line in lines if line.startswith(("fatal: ", "error: "))), None)
    reason = (fatal or (lines or ["no reason given"])[-1]).removeprefix("fatal: ").removeprefix("error: ")
    return f"git {action} in {folder}: {first_line(reason)}"


def find_commit(folder: Path, revision: str) -> str | None:
    """The full hash of the commit that a revision names, or None where it names none; raises UserError."""
    question = ("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    return output(folder, *question, answers=(0, 1)).decode().strip() or None


def read_committed(folder: Path, commit: str, name: str) -> str | None:
    """The text of a file in a commit, or None where the commit has no such file; raises UserError."""
    if not output(folder, "ls-tree", "--name-only", commit, "--", name).strip():
        return None
    return output(folder, "show", f"{commit}:./{name}").decode("utf-8", "replace")


def setting(folder: Path, name: str) -> str | None:
    """A setting such as user.name, or None where it is not set; raises UserError where the settings are damaged."""
    return output(folder, "config", name, answers=(0, 1)).decode("utf-8", "replace").strip() or None


@dataclass(frozen=True)
class CodeState:
    """Which code is in a folder: `commit`, and `difference`, a patch from the commit to what is there.

    Both are None where git could not tell; `problem` says why.
    """

    commit: str | None
    difference: bytes | None
    problem: str = ""

    @property
    def dirty(self) -> str:
        """`true`, `false` or `unknown`."""
        return UNKNOWN if self.difference is None else str(bool(self.difference)).lower()


def code_state(folder: Path, *, tracked: str) -> CodeState:
    """Which code is in the folder, by a repository that has the file `tracked` of that folder; raises nothing.

    Of a larger repository, changes below the folder count alone.
    """
    commit = None
    try:
        if not output(folder, "ls-files", "--", tracked):
            raise UserError(f"{folder}: git does not track its {tracked}; run `git init` there, then commit")
        commit = find_commit(folder, "HEAD")
        if commit is None:
            raise UserError(f"{folder}: no git commit yet; run `git add . && git commit -m Start`")
        return CodeState(commit, output(folder, *DIFF, "HEAD", "--", ".") + _untracked_code(folder))
    except UserError as error:
        return CodeState(commit, None, str(error))


def _untracked_code(folder: Path) -> bytes:
    """A patch that adds the code that git neither tracks nor ignores."""
    names = output(folder, "ls-files", "--others", "--exclude-standard", "-z", "--", CODE).decode().split("\0")
    prefix = git(folder, "rev-parse", "--show-prefix")  # without an index, git names files by the current folder
    diff = (*DIFF, f"--src-prefix=a/{prefix}", f"--dst-prefix=b/{prefix}", "--no-index", "--", os.devnull)
    patches = (output(folder, *diff, name, answers=(0, 1)) for name in names if name)
    return b"".join(patches)
