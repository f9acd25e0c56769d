"""A git ref holds the commit that made the champion, and nothing else in the repository changes."""

import json
import shutil
from pathlib import Path

import pytest

from flows.champion_ref import champion_commit, champion_refs, read_ref, ref_of, write_ref
from flows.doctor import missing_objects
from flows.dvc_history import History
from pipeline.core.errors import UserError
from pipeline.core.git import git
from tests.conftest import start_repository

MODEL, OTHER = "a" * 32, "b" * 32


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Make a repository whose committed dvc.lock names the model MODEL, and return it."""
    project = tmp_path / "project"
    (project / ".dvc").mkdir(parents=True)
    (project / ".dvc/config").write_text("")
    (project / ".gitignore").write_text("/.dvc/cache\n")
    (project / "dvc.yaml").write_text("stages: {}\n")
    write_lock(project, MODEL)
    start_repository(project)
    for name in ("user.name", "user.email"):
        git(project, "config", name, "t")
    return project


def write_lock(project: Path, model: str) -> None:
    """Write a dvc.lock whose training made this model, and the listing of its folder in DVC's cache."""
    listing = project / ".dvc/cache/files/md5" / model[:2] / f"{model[2:]}.dir"
    listing.parent.mkdir(parents=True, exist_ok=True)
    listing.write_text(json.dumps([{"relpath": "best.safetensors", "md5": model}]))
    outs = [{"path": "artifacts/train", "md5": f"{model}.dir"}]
    (project / "dvc.lock").write_text(json.dumps({"schema": "2.0", "stages": {"train": {"outs": outs}}}))


def state(project: Path) -> list[str]:
    """Return what git knows of the checkout: files, index, branches and stashes."""
    refs = "for-each-ref refs/heads refs/stash refs/exps"
    return [
        git(project, *command.split()) for command in ("status --porcelain", "ls-files --stage", refs, "stash list")
    ]


def test_the_commit_of_the_checkout_is_the_champions_where_its_lock_names_the_model(project: Path) -> None:
    before = state(project)
    commit = champion_commit(project, model_md5=MODEL)
    write_ref(project, "digits", commit)
    assert commit == git(project, "rev-parse", "HEAD") == read_ref(project, "digits")
    assert champion_refs(project) == {"refs/champions/digits": commit}
    assert state(project) == before


def test_uncommitted_results_get_a_commit_that_no_branch_has(project: Path) -> None:
    write_lock(project, OTHER)
    before = state(project)
    commit = champion_commit(project, model_md5=OTHER)
    write_ref(project, "digits", commit)
    assert OTHER in git(project, "show", "refs/champions/digits:dvc.lock")
    assert commit != git(project, "rev-parse", "HEAD")
    assert state(project) == before


def test_the_commit_of_the_named_experiment_is_preferred(project: Path) -> None:
    head = git(project, "rev-parse", "HEAD")
    write_lock(project, OTHER)
    commits = {}
    for name in ("one", "two"):
        commits[name] = git(
            project, "commit-tree", "-p", head, "-m", name, f"{git(project, 'stash', 'create')}^{{tree}}"
        )
        git(project, "update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{name}", commits[name])
    git(project, "checkout", "-q", ".")
    for name, commit in commits.items():
        assert champion_commit(project, model_md5=OTHER, experiment=name) == commit
    assert champion_commit(project, model_md5=MODEL, experiment="one") == head


def test_a_model_that_no_commit_made_is_refused(project: Path) -> None:
    with pytest.raises(
        UserError, match=rf"model {OTHER}: found no commit here whose dvc\.lock made it; allowed: .*fetch"
    ):
        champion_commit(project, model_md5=OTHER)
    shutil.rmtree(project / ".dvc/cache")
    with pytest.raises(UserError, match="found no commit"):
        champion_commit(project, model_md5=MODEL)


@pytest.mark.parametrize(
    "name", ["digits", "digits (images)", "a..b", "x.lock", ".x", "x.", "-x", "日本 1", "a~b", "()", "a.lock.lock"]
)
def test_every_name_of_a_registered_model_has_a_ref_of_its_own(project: Path, name: str) -> None:
    commit = git(project, "rev-parse", "HEAD")
    write_ref(project, name, commit)
    write_ref(project, "other", commit)
    assert (read_ref(project, name), len(champion_refs(project))) == (commit, 2)
    write_ref(project, name, None)
    assert read_ref(project, name) is None
    assert ref_of("digits") == "refs/champions/digits"


def test_a_colleague_gets_the_champion_without_mlflow(project: Path, tmp_path: Path) -> None:
    write_lock(project, OTHER)
    write_ref(project, "digits", champion_commit(project, model_md5=OTHER))
    git(tmp_path, "clone", "-q", str(project), "clone")
    git(tmp_path / "clone", "fetch", "-q", "origin", "refs/champions/*:refs/champions/*")
    git(tmp_path / "clone", "worktree", "add", "-q", "--detach", "../champion", "refs/champions/digits")
    assert OTHER in (tmp_path / "champion/dvc.lock").read_text()


def test_a_cleanup_keeps_the_champions_files_and_the_doctor_reports_missing_ones(project: Path) -> None:
    write_lock(project, OTHER)
    write_ref(project, "digits", champion_commit(project, model_md5=OTHER))
    git(project, "checkout", "-q", "dvc.lock")  # only the ref has the lock of the champion now
    history = History(project)
    assert read_ref(project, "digits") in history.commits
    assert f"{OTHER}.dir" in history.hashes([])
    [champion, *_] = missing_objects(project)
    assert champion.what == "champion refs/champions/digits: files are missing in DVC's cache: artifacts/train"
