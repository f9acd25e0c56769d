"""Run git commands for the whole project.

A command that fails raises UserError, so that no failure is mistaken for a result.
"""

import os
import shlex
import subprocess
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import UserError, first_line

UNKNOWN = "unknown"  # recorded in place of what git could not determine
# a diff that `git apply` accepts at the top of the repository, whatever the user's settings for diffs
APPLICABLE_DIFF = (
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
EXCLUDE_OUTPUTS = ":(exclude)artifacts"  # a pathspec that leaves out the outputs of the stages
# what decides how a stage or a flow runs; parameters, the hashes that follow from them, tests and texts are no code
CODE_FOLDERS = ("pipeline/", "flows/", "requirements/")
CODE_FILES = ("dvc.yaml", "pyproject.toml", "python")
PARAMETER_FILES = ("params.yaml", "dvc.lock")
UNTRACKED_CODE = "pipeline/*.py"  # untracked files of this pattern are uncommitted changes: a stage may import them
_MISLEADING_VARIABLES = (
    *("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR", "GIT_PREFIX"),
    *("GIT_DIFF_OPTS", "GIT_LITERAL_PATHSPECS", "GIT_NOGLOB_PATHSPECS"),
)


def environment() -> dict[str, str]:
    """Return the environment variables for git and DVC.

    Variables that a git hook sets are left out: they would lead git and DVC to another repository. So are variables
    that change the meaning of our options and patterns.
    """
    return {name: value for name, value in os.environ.items() if name not in _MISLEADING_VARIABLES}


def git(folder: Path, *arguments: str) -> str:
    """Return the standard output of a git command, without white space around it; raises UserError where git fails."""
    return output(folder, *arguments).decode("utf-8", "replace").strip()


def output(
    folder: Path, *arguments: str, allowed_statuses: Collection[int] = (0,), allow_messages: bool = True
) -> bytes:
    """Return the standard output of a git command that is run in the folder.

    Raises UserError where the exit status is not an allowed one, or where git writes to stderr and `allow_messages` is
    False: with git's reason, and with git's own remedy where the folder belongs to another user.
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
    if done.returncode not in allowed_statuses or (done.stderr and not allow_messages):
        raise UserError(_explain(folder, arguments[0], done.stderr.decode("utf-8", "replace")))
    return done.stdout


def _explain(folder: Path, action: str, message: str) -> str:
    """Return the error message for a git command that failed with `message` on stderr."""
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
    if revision.startswith("-"):  # git would take it for an option; no name may begin so
        return None
    command = ("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    return output(folder, *command, allowed_statuses=(0, 1)).decode().strip() or None


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
    return output(folder, "config", name, allowed_statuses=(0, 1)).decode("utf-8", "replace").strip() or None


@dataclass(frozen=True)
class CodeState:
    """The code in a folder: its `commit`, and `difference`, a patch with the uncommitted changes to `files`.

    What git could not determine is None; `problem` then has the reason.
    """

    commit: str | None
    difference: bytes | None
    files: tuple[str, ...] = ()
    problem: str = ""

    @property
    def dirty(self) -> str:
        """Return whether code, as of `has_code`, has uncommitted changes: `true`, `false` or `unknown`."""
        return UNKNOWN if self.difference is None else str(has_code(self.files)).lower()


def has_code(files: Iterable[str]) -> bool:
    """Return whether code is among the files, whose paths are relative to the project's folder."""
    return any(name in CODE_FILES or name.startswith(CODE_FOLDERS) for name in files)


def code_state(folder: Path, *, tracked: str) -> CodeState:
    """Return the commit and the uncommitted changes of the folder; a failure is a `problem` of the result.

    The repository must track the file `tracked` of the folder. Changes outside the folder, in a larger repository, and
    in the outputs of the stages do not count.
    """
    commit = None
    try:
        commit = check_committed(folder, tracked)
        _check_all_compared(folder)
        paths = ("HEAD", "--", ".", EXCLUDE_OUTPUTS)
        difference = output(folder, *APPLICABLE_DIFF, *paths)
        untracked = _untracked_code(folder)
        changed = _names(output(folder, "diff", "--name-only", "--relative", "-z", *paths)) if difference else []
        return CodeState(commit, difference + _patches(folder, untracked), (*changed, *untracked))
    except UserError as error:
        return CodeState(commit, None, problem=str(error))


def _check_all_compared(folder: Path) -> None:
    """Raise UserError where git's index marks a file as unchanged, so that git does not look at the file.

    A file that a sparse checkout leaves out has such a mark too; it is allowed, since it does not exist.
    """
    entries = output(folder, "ls-files", "-v", "-z", "--", ".").decode("utf-8", "surrogateescape").split("\0")
    for flag, name in (entry.split(" ", 1) for entry in entries if entry):
        if flag.islower() or (flag == "S" and os.path.lexists(folder / name)):
            option = "--no-assume-unchanged" if flag.islower() else "--no-skip-worktree"
            raise UserError(
                f"{folder}: git does not compare {name} with the commit, since it is marked as unchanged; remove the "
                f"mark by `git update-index {option} -- {shlex.quote(name)}`"
            )


def _names(listing: bytes) -> list[str]:
    """Return the names in a listing that git separates by NUL."""
    return [name for name in listing.decode("utf-8", "surrogateescape").split("\0") if name]


def _untracked_code(folder: Path) -> list[str]:
    """Return the code files that git neither tracks nor ignores."""
    return _names(output(folder, "ls-files", "--others", "--exclude-standard", "-z", "--", UNTRACKED_CODE))


def _patches(folder: Path, names: Iterable[str]) -> bytes:
    """Return a patch that adds these files."""
    prefix = git(folder, "rev-parse", "--show-prefix")  # with --no-index, git names files relative to the folder
    diff = (*APPLICABLE_DIFF, f"--src-prefix=a/{prefix}", f"--dst-prefix=b/{prefix}", "--no-index", "--", os.devnull)
    return b"".join(output(folder, *diff, name, allowed_statuses=(0, 1)) for name in names)
