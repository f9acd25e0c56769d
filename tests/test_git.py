"""State that git cannot provide is recorded as unknown, with a warning, and never as unchanged."""

import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.git import git_identity, take_snapshot
from pipeline.core.errors import UserError
from pipeline.core.git import UNKNOWN, code_state, find_commit, git, read_committed, setting
from pipeline.tracking.provenance import COMMIT
from pipeline.tracking.runs import find_or_create_run
from pipeline.tracking.search import find_run
from tests.conftest import start_repository

# With this variable git treats every folder as another user's.
REFUSE = "GIT_TEST_ASSUME_DIFFERENT_OWNER"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a repository with a committed params.yaml and a committed module, and return it."""
    folder = tmp_path / "project"
    (folder / "pipeline/training").mkdir(parents=True)
    (folder / "params.yaml").write_text("train: {}\n")
    (folder / "pipeline/training/loop.py").write_text("")
    start_repository(folder)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    return folder


def without_git(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(project))


def of_another_user(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REFUSE, "1")


def without_repository(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / ".git").rename(project / "git")


def without_commit(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_repository(project, monkeypatch)
    git(project, "init", "-q")
    git(project, "add", "params.yaml")


def in_another_repository(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the project, without a repository of its own, into another repository that does not track it."""
    without_repository(project, monkeypatch)
    (project.parent / "notes.txt").write_text("")
    start_repository(project.parent, "notes.txt")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(project.parent.parent))


PROBLEMS: dict[Callable[[Path, pytest.MonkeyPatch], None], str] = {
    without_git: "git: not found; install it",
    of_another_user: "which belongs to another user; if you trust it, run `git config --global --add safe.directory",
    without_repository: "not in a git repository; run `git init`, then commit",
    without_commit: "no git commit yet; run `git add . && git commit -m Start`",
    in_another_repository: "does not track params.yaml here; run `git add .` and commit, or `git init` first for a",
}


@pytest.mark.parametrize("make_problem", PROBLEMS, ids=[make_problem.__name__ for make_problem in PROBLEMS])
def test_code_that_git_does_not_track_is_recorded_as_unknown_with_the_reason(
    project: Path, monkeypatch: pytest.MonkeyPatch, make_problem: Callable[[Path, pytest.MonkeyPatch], None]
) -> None:
    make_problem(project, monkeypatch)
    found = code_state(project, tracked="params.yaml")
    assert (found.commit, found.difference, found.dirty) == (None, None, UNKNOWN)
    assert PROBLEMS[make_problem] in found.problem
    assert "\n" not in found.problem


def test_an_unreadable_difference_is_unknown_although_the_commit_is_known(project: Path) -> None:
    (project / ".git/index").write_bytes(b"damaged")
    assert code_state(project, tracked="params.yaml").dirty == UNKNOWN
    git(project, "read-tree", "HEAD")
    blob = git(project, "rev-parse", "HEAD:params.yaml")
    (project / ".git/objects" / blob[:2] / blob[2:]).unlink()
    (project / "params.yaml").write_text("train: {seed: 1}\n")
    found = code_state(project, tracked="params.yaml")
    assert (found.commit, found.dirty) == (git(project, "rev-parse", "HEAD"), UNKNOWN)


def test_changed_parameters_are_a_difference_but_no_changed_code(project: Path) -> None:
    (project / "params.yaml").write_text("train: {seed: 1}\n")
    found = code_state(project, tracked="params.yaml")
    assert (found.dirty, found.files) == ("false", ("params.yaml",))
    assert found.difference
    (project / "dvc.lock").write_text("schema: '2.0'\n")
    git(project, "add", "-N", "dvc.lock")
    assert code_state(project, tracked="params.yaml").dirty == "false"
    (project / "pipeline/new.py").write_text("x = 1\n")
    assert code_state(project, tracked="params.yaml").files == ("dvc.lock", "params.yaml", "pipeline/new.py")
    assert code_state(project, tracked="params.yaml").dirty == "true"


@pytest.mark.parametrize(
    ("name", "dirty"),
    [
        ("README.md", "false"),
        ("docs/python", "false"),
        ("tests/test_flows.py", "false"),
        ("recipes/params.yaml", "false"),
        ("flows/git.py", "true"),
        ("requirements/base.lock", "true"),
        ("pyproject.toml", "true"),
        ("dvc.yaml", "true"),
        ("python", "true"),
    ],
)
def test_texts_and_tests_are_recorded_but_are_no_code(project: Path, name: str, dirty: str) -> None:
    for folder in (project, project / "part"):  # the project as a folder of a larger repository
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("changed\n")
        (folder / "params.yaml").touch()
        git(project, "add", ".")
        found = code_state(folder, tracked="params.yaml")
        assert name in found.files
        assert found.dirty == dirty


def test_changed_and_untracked_code_makes_a_patch_that_applies(project: Path, tmp_path: Path) -> None:
    assert code_state(project, tracked="params.yaml").dirty == "false"
    (project / "pipeline/notes.txt").write_text("no code")
    assert code_state(project, tracked="params.yaml").dirty == "false"
    (project / "pipeline/new.py").write_text("x = 1\n")
    (project / "params.yaml").write_text("train: {seed: 1}\n")
    found = code_state(project, tracked="params.yaml")
    assert (found.dirty, found.problem) == ("true", "")
    git(tmp_path, "clone", "-q", str(project), "clone")
    subprocess.run(["git", "apply", "-"], cwd=tmp_path / "clone", input=found.difference, check=True)
    assert (tmp_path / "clone/pipeline/new.py").read_text() == "x = 1\n"
    assert (tmp_path / "clone/params.yaml").read_text() == "train: {seed: 1}\n"


SETTINGS = {
    "diff.context": "0",
    "diff.interHunkContext": "9",
    "diff.noprefix": "true",
    "diff.mnemonicPrefix": "true",
    "diff.relative": "true",
    "diff.renames": "copies",
    "diff.external": "false",
    "diff.submodule": "log",
    "diff.suppressBlankEmpty": "true",
    "diff.algorithm": "histogram",
    "diff.wordRegex": ".",
    "diff.colorMoved": "zebra",
    "color.ui": "always",
    "core.quotePath": "false",
    "core.abbrev": "4",
}


def test_a_patch_applies_whatever_the_settings_for_diffs(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = project / "pipeline/training/loop.py"
    module.write_text("".join(f"{number}\n\n" for number in range(40)))
    (project / "pipeline/é.bin").write_bytes(bytes(range(256)))
    git(project, "add", ".")
    git(project, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "more")
    git(tmp_path, "clone", "-q", str(project), "clone")
    for name, value in SETTINGS.items():
        git(project, "config", name, value)
    monkeypatch.setenv("GIT_DIFF_OPTS", "--unified=0")
    monkeypatch.setenv("GIT_LITERAL_PATHSPECS", "1")
    module.rename(project / "pipeline/renamed.py")
    (project / "pipeline/renamed.py").write_text(
        "".join(f"{number}{' ' * (number % 9 == 5)}\n\n" for number in range(40))
    )
    (project / "pipeline/é.bin").write_bytes(bytes(range(255)))
    (project / "pipeline/own.py").write_text("x = 1\n\n")
    found = code_state(project, tracked="params.yaml")
    command = ["git", "apply", "--index", "--whitespace=nowarn", "-"]
    subprocess.run(command, cwd=tmp_path / "clone", input=found.difference, check=True)
    patched, changed = (folder / "pipeline" for folder in (tmp_path / "clone", project))
    assert {path.name: path.read_bytes() for path in patched.iterdir() if path.is_file()} == {
        path.name: path.read_bytes() for path in changed.iterdir() if path.is_file()
    }


@pytest.mark.parametrize("option", ["--assume-unchanged", "--skip-worktree"])
def test_code_that_git_is_set_not_to_compare_is_unknown_and_the_remedy_is_reported(project: Path, option: str) -> None:
    git(project, "update-index", option, "pipeline/training/loop.py")
    (project / "pipeline/training/loop.py").write_text("changed")
    found = code_state(project, tracked="params.yaml")
    assert (found.commit, found.dirty) == (git(project, "rev-parse", "HEAD"), UNKNOWN)
    assert "git does not compare pipeline/training/loop.py with the commit" in found.problem
    git(project, *shlex.split(found.problem.split("`git ")[1].rstrip("`")))
    assert code_state(project, tracked="params.yaml").dirty == "true"


def test_files_left_out_by_a_sparse_checkout_do_not_count_as_changed(project: Path) -> None:
    (project / "docs").mkdir()
    (project / "docs/long.md").write_text("long")
    git(project, "add", ".")
    git(project, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "more")
    git(project, "sparse-checkout", "set", "pipeline")
    assert not (project / "docs").exists()
    assert code_state(project, tracked="params.yaml").dirty == "false"


def test_an_option_is_not_accepted_as_a_revision(project: Path) -> None:
    for name in ("--all", "--git-dir", "-h", "--"):
        assert find_commit(project, name) is None


def test_a_run_without_a_repository_records_unknown_code_with_a_warning(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(workspace.parent))
    run, _ = find_or_create_run("0" * 32, experiment="digits")
    found = find_run(run.run_id)
    assert found
    assert (found.tags[COMMIT], found.tags["git.dirty"]) == (UNKNOWN, UNKNOWN)
    assert "warning: the run is recorded with unknown code" in capsys.readouterr().out


def test_a_missing_commit_file_or_setting_is_none_and_a_failure_of_git_raises(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_commit(project, "1" * 40) is None
    assert find_commit(project, "HEAD:pipeline") is None
    assert read_committed(project, "HEAD", "dvc.lock") is None
    assert read_committed(project, "HEAD", "params.yaml") == "train: {}\n"
    assert setting(project, "user.name") is None
    assert git_identity(project)["GIT_AUTHOR_NAME"] == "flow"
    (project.parent / ".gitconfig").write_text("[damaged")
    with pytest.raises(UserError, match=r"git config in .*bad config"):
        setting(project, "user.name")
    (project.parent / ".gitconfig").unlink()
    monkeypatch.setenv(REFUSE, "1")
    with pytest.raises(UserError, match="belongs to another user"):
        find_commit(project, "1" * 40)
    with pytest.raises(UserError, match="belongs to another user"):
        read_committed(project, "HEAD", "dvc.lock")


def test_a_flow_run_in_a_checkout_of_another_user_is_refused_with_the_remedy_of_git(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / ".dvc").mkdir()
    (project / ".dvc/config").write_text("")
    monkeypatch.setenv(REFUSE, "1")
    with pytest.raises(UserError) as error:
        take_snapshot(project)
    assert f"`git config --global --add safe.directory {project}`" in str(error.value)


def test_variables_of_a_git_hook_do_not_change_the_repository(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", os.devnull)
    assert code_state(project, tracked="params.yaml").dirty == "false"
