"""A git ref holds the commit that made the champion, and nothing else in the repository changes."""

import json
import shutil
from pathlib import Path

import pytest

from flows.champion_ref import champion_commit, champion_refs, read_ref, ref_of, write_ref
from flows.doctor import missing_objects
from flows.dvc_history import History
from pipeline.artifacts import bytes_md5
from pipeline.core.errors import UserError
from pipeline.core.git import git
from tests.conftest import start_repository
from tests.test_flows import dvc

MODEL, OTHER = "a" * 32, "b" * 32


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Make a repository whose committed dvc.lock names the model MODEL, and return it."""
    project = tmp_path / "project"
    (project / ".dvc").mkdir(parents=True)
    (project / ".dvc/config").write_text("[core]\nremote = local\n['remote \"local\"']\nurl = ../.dvcstore\n")
    (project / ".dvc/.gitignore").write_text("/cache\n/tmp\n/config.local\n")
    (project / "dvc.yaml").write_text("stages: {train: {cmd: 'true', outs: [artifacts/train]}}\n")
    write_lock(project, MODEL)
    start_repository(project)
    for name in ("user.name", "user.email"):
        git(project, "config", name, "t")
    return project


def write_lock(project: Path, model: str) -> str:
    """Write a dvc.lock whose training made this model, and the listing of its folder in the cache; return its hash."""
    listing = json.dumps([{"md5": model, "relpath": "best.safetensors"}]).encode()
    md5 = f"{bytes_md5(listing)}.dir"
    cache(project, listing, md5)
    outs = [{"path": "artifacts/train", "hash": "md5", "md5": md5}]
    (project / "dvc.lock").write_text(json.dumps({"schema": "2.0", "stages": {"train": {"cmd": "true", "outs": outs}}}))
    return md5


def cache(project: Path, content: bytes, md5: str) -> None:
    """Put a file into DVC's cache."""
    path = project / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


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
    assert git(project, "show", "refs/champions/digits:dvc.lock") == (project / "dvc.lock").read_text()
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


def save_experiment(project: Path, name: str, weights: bytes) -> str:
    """Save a DVC experiment that made these weights, with its files in DVC's cache, and return their MD5."""
    model = bytes_md5(weights)
    cache(project, weights, model)
    write_lock(project, model)
    head, tree = git(project, "rev-parse", "HEAD"), f"{git(project, 'stash', 'create')}^{{tree}}"
    commit = git(project, "commit-tree", "-p", head, "-m", name, tree)
    git(project, "update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{name}", commit)
    git(project, "checkout", "-q", ".")
    return model


@pytest.mark.slow
def test_a_colleague_gets_each_new_champion_without_mlflow(project: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "-q", "--bare", str(project), "origin")
    git(project, "remote", "add", "origin", str(tmp_path / "origin"))
    git(tmp_path, "clone", "-q", "origin", "colleague")
    colleague, champions = tmp_path / "colleague", "+refs/champions/*:refs/champions/*"
    for folder in (project, colleague):
        (folder / ".dvc/config.local").write_text(f"['remote \"local\"']\nurl = {tmp_path / 'shared'}\n")
    for name in ("first", "second"):
        model = save_experiment(project, name, name.encode())
        write_ref(project, "digits", champion_commit(project, model_md5=model))
        ref = git(project, "for-each-ref", "--format=%(refname)", "--points-at", "refs/champions/digits", "refs/exps")
        assert ref.endswith(f"/{name}")
        dvc(project, "exp", "push", "origin", name)
        git(project, "push", "-q", "origin", champions)
        git(colleague, "fetch", "-q", "origin", champions)
        dvc(colleague, "get", ".", "artifacts/train", "--rev", "refs/champions/digits", "--out", f"../{name}")
        assert (tmp_path / name / "best.safetensors").read_text() == name
    git(colleague, "worktree", "add", "-q", "--detach", "../champion", "refs/champions/digits")
    shutil.copy(colleague / ".dvc/config.local", tmp_path / "champion/.dvc")
    dvc(tmp_path / "champion", "pull")
    assert (tmp_path / "champion/artifacts/train/best.safetensors").read_text() == "second"


def test_a_cleanup_keeps_the_champions_files_and_the_doctor_reports_missing_ones(project: Path) -> None:
    folder = write_lock(project, OTHER)
    write_ref(project, "digits", champion_commit(project, model_md5=OTHER))
    git(project, "checkout", "-q", "dvc.lock")  # only the ref has the lock of the champion now
    history = History(project)
    assert read_ref(project, "digits") in history.commits
    assert folder in history.hashes([])
    [champion, *_] = missing_objects(project)
    assert champion.what == "champion refs/champions/digits: files are missing in DVC's cache: artifacts/train"
