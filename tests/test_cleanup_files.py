"""Which files of DVC's cache a cleanup keeps, and where it refuses, in small projects without trainings."""

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows import dvc_history
from flows.cleanup import clean_up, main
from flows.dvc_history import list_experiments
from flows.dvc_state import cache_folder, cached_path
from flows.file_lock import hold_files
from pipeline.core.errors import PartialError, TemporaryError, UserError
from pipeline.core.settings import get_settings
from pipeline.tracking.store import connect
from tests.conftest import start_repository
from tests.test_dvc_experiments import command

pytestmark = pytest.mark.slow
BASELINE = "a" * 40
STAGE = "stages: {make: {cmd: echo x > out, params: [value], outs: [out]}}"


@pytest.fixture
def project(tmp_path: Path, stores: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a committed DVC project with an empty MLflow store."""
    folder = tmp_path / "it's a project"
    folder.mkdir()
    git(folder, "init", "-q")
    command("dvc", "init", "-q", folder=folder)
    (folder / ".gitignore").write_text("mlflow.db*\n")
    start_repository(folder)
    for name in ("user.name", "user.email"):
        git(folder, "config", name, "t")
    shutil.copy(stores / "mlflow.db", folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    monkeypatch.chdir(folder)
    get_settings.cache_clear()
    connect()
    return folder


def git(folder: Path, *arguments: str) -> str:
    return command("git", *arguments, folder=folder).strip()


def cache_object(project: Path, content: str, suffix: str = "") -> Path:
    """Write a file into DVC's cache, and return its path there."""
    path = cached_path(cache_folder(project), hashlib.md5(content.encode()).hexdigest() + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def add_file(project: Path, name: str, path: Path | None = None) -> Path:
    """Add a file to the project as `dvc add` does, and to git's index; return its path in the cache."""
    path = path or cache_object(project, name)
    (project / f"{name}.dvc").write_text(f"outs:\n- md5: {path.parent.name}{path.name}\n  path: {name}\n")
    git(project, "add", f"{name}.dvc")
    return path


def commit(project: Path, *, ref: str) -> str:
    """Commit the index to a ref alone, and return the commit; the checkout is then as before."""
    git(project, "checkout", "-q", "--detach")
    git(project, "commit", "-q", "--allow-empty", "-m", "A commit")
    made = git(project, "rev-parse", "HEAD")
    git(project, "update-ref", "--create-reflog", ref, made)
    git(project, "checkout", "-q", "-")
    return made


def save_experiment(project: Path, name: str) -> str:
    return commit(project, ref=f"refs/exps/{BASELINE[:2]}/{BASELINE[2:]}/{name}")


def experiments(project: Path) -> list[str]:
    return [one.name for one in list_experiments(project)]


@pytest.mark.parametrize("setting", ["grep.lineNumber", "grep.column", "grep.fullName", "log.showSignature"])
def test_the_users_settings_of_git_do_not_change_which_files_are_needed(project: Path, setting: str) -> None:
    needed, unused = add_file(project, "needed"), cache_object(project, "unused")
    commit(project, ref="refs/heads/other")
    git(project, "config", setting, "true")
    clean_up(project, keep=0, dry_run=False)
    assert needed.exists()
    assert not unused.exists()


def test_an_output_of_git_that_is_not_understood_stops_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = add_file(project, "needed")
    commit(project, ref="refs/heads/other")
    monkeypatch.setattr(dvc_history, "_GREP", (*dvc_history._GREP, "--line-number"))
    with pytest.raises(UserError, match=r"git grep in .*: found '[0-9]+:.*MD5 hashes alone"):
        clean_up(project, keep=0, dry_run=False)
    assert needed.exists()


@pytest.mark.parametrize("is_missing", [True, False])
def test_a_file_of_a_branch_that_git_cannot_read_stops_it(project: Path, is_missing: bool) -> None:
    needed = add_file(project, "needed")
    commit(project, ref="refs/heads/other")
    blob = git(project, "rev-parse", "other:needed.dvc")
    path = project / ".git/objects" / blob[:2] / blob[2:]
    path.unlink()
    if not is_missing:
        path.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"git grep in .*; fix that"):
        clean_up(project, keep=0, dry_run=False)
    assert needed.exists()


def test_the_files_of_all_queued_experiments_stay(project: Path) -> None:
    (project / "dvc.yaml").write_text(STAGE)
    (project / "params.yaml").write_text("value: 1\n")
    git(project, "add", ".")
    git(project, "commit", "-qm", "Add a stage")
    needed = []
    for name in ("first", "second", "third"):
        needed.append(add_file(project, name))
        command("dvc", "exp", "run", "--queue", "-S", f"value={len(needed) + 1}", folder=project)
        git(project, "reset", "-q", "--hard")
    unused = cache_object(project, "unused")
    clean_up(project, keep=0, dry_run=False)
    assert [path.exists() for path in needed] == [True, True, True]
    assert not unused.exists()


def test_the_files_of_all_failed_experiments_of_the_queue_stay(project: Path) -> None:
    needed = []
    for name in ("first", "second"):
        needed.append(add_file(project, name))
        commit(project, ref="refs/exps/celery/failed")
    clean_up(project, keep=0, dry_run=False)
    assert [path.exists() for path in needed] == [True, True]


def test_a_repository_with_two_worktrees_is_refused_in_both(project: Path, tmp_path: Path) -> None:
    save_experiment(project, "one")
    git(project, "worktree", "add", "-q", str(tmp_path / "other"), "--detach")
    for folder in (project, tmp_path / "other"):
        with pytest.raises(UserError, match=r"has 2 worktrees \(.*\); allowed: one"):
            clean_up(folder, keep=0, dry_run=False)
    assert experiments(project) == ["one"]


def add_second_project(project: Path) -> None:
    (project / "second").mkdir()
    command("dvc", "init", "-q", "--subdir", folder=project / "second")
    git(project, "add", "second")


@pytest.mark.parametrize("place", ["checkout", "experiment"])
def test_a_repository_with_another_dvc_project_is_refused(project: Path, place: str) -> None:
    add_second_project(project)
    if place == "checkout":
        git(project, "commit", "-qm", "Add a project")
    save_experiment(project, "one")
    with pytest.raises(UserError, match=r"has other DVC projects \(second\); allowed: this one alone"):
        clean_up(project, keep=0, dry_run=False)
    assert experiments(project) == ["one"]


def test_a_cache_that_is_shared_by_a_group_stays(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unused = cache_object(project, "unused")
    command("dvc", "config", "--local", "cache.shared", "group", folder=project)
    clean_up(project, keep=0, dry_run=False)
    assert unused.exists()
    assert "other projects may use this cache" in capsys.readouterr().out


def test_without_the_listing_of_a_folder_all_files_stay(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = cache_object(project, "a file of the folder")
    entries = json.dumps([{"md5": file.parent.name + file.name, "relpath": "file"}])
    listing, unused = cache_object(project, entries, ".dir"), cache_object(project, "unused")
    add_file(project, "folder", listing)
    listing.unlink()
    clean_up(project, keep=0, dry_run=False)
    assert file.exists()
    assert "it is not known which of them belong to folder, whose listing is missing" in capsys.readouterr().out
    listing.write_text(entries)
    clean_up(project, keep=0, dry_run=False)
    assert file.exists()
    assert not unused.exists()


def test_without_the_listing_of_a_kept_experiment_all_files_stay(project: Path) -> None:
    listing, unused = cache_object(project, "[]", ".dir"), cache_object(project, "unused")
    md5 = listing.parent.name + listing.name
    (project / "dvc.lock").write_text(f"stages: {{make: {{outs: [{{path: out, md5: {md5}}}]}}}}")
    git(project, "add", "dvc.lock")
    save_experiment(project, "kept")
    listing.unlink()
    clean_up(project, keep=1, dry_run=False)
    assert unused.exists()
    clean_up(project, keep=0, dry_run=False)
    assert not unused.exists()


def test_with_a_damaged_lock_file_in_the_checkout_all_files_stay(project: Path) -> None:
    unused = cache_object(project, "unused")
    (project / "dvc.lock").write_text("<<<<<<< ours\n")
    clean_up(project, keep=0, dry_run=False)
    assert unused.exists()


@pytest.mark.parametrize("dry_run", [True, False])
def test_without_a_store_no_experiment_is_removed(project: Path, dry_run: bool) -> None:
    save_experiment(project, "one")
    (project / "mlflow.db").unlink()
    with pytest.raises(UserError, match=r"mlflow.db does not exist, so the models in use are not known"):
        clean_up(project, keep=0, dry_run=dry_run)
    assert experiments(project) == ["one"]


def test_with_nothing_to_remove_it_prints_one_line(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "mlflow.db").unlink()
    clean_up(project, keep=0, dry_run=False)
    assert capsys.readouterr().out == "nothing to remove\n"


def test_a_file_that_cannot_be_removed_is_a_partial_result(project: Path) -> None:
    save_experiment(project, "one")
    path = cache_object(project, "unused")
    path.unlink()
    path.mkdir()  # root can remove every file, but not a folder in this way
    with pytest.raises(PartialError, match=r"only a part was removed: .*; correct that, then the same command"):
        clean_up(project, keep=0, dry_run=False)
    assert experiments(project) == []
    path.rmdir()
    clean_up(project, keep=0, dry_run=False)


def test_it_does_not_run_beside_a_backup(project: Path) -> None:
    unused = cache_object(project, "unused")
    with (
        hold_files(project, command="flows.backup"),
        pytest.raises(TemporaryError, match=r"flows.backup is running"),
    ):
        clean_up(project, keep=0, dry_run=False)
    assert unused.exists()
    clean_up(project, keep=0, dry_run=False)
    assert not unused.exists()


def leave_clone(project: Path) -> Path:
    folder = project / ".dvc/tmp/exps/standalone/tmp1"
    folder.mkdir(parents=True)
    return folder


def damage_rwlock(project: Path) -> Path:
    path = project / ".dvc/tmp/rwlock"
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"write": {"out": {"cmd": "dvc repro"}}}')
    return path


def damage_queue(project: Path) -> Path:
    path = project / ".dvc/tmp/exps/run/one/one.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"pid": null}')
    return path


@pytest.mark.parametrize("leave", [leave_clone, damage_rwlock, damage_queue])
def test_the_command_in_a_message_is_for_this_path(project: Path, leave: Callable[[Path], Path]) -> None:
    path = leave(project)
    with pytest.raises((TemporaryError, UserError), match="if no dvc command runs here: rm") as caught:
        clean_up(project, keep=0, dry_run=False)
    words = shlex.split(str(caught.value).partition("runs here: ")[2])
    assert [word for word in words if word not in {"rm", "-rf"}] == [str(path)]


def test_a_file_whose_name_is_not_utf_8_counts_too(project: Path) -> None:
    needed = add_file(project, "needed")
    (project / "needed.dvc").rename(os.fsdecode(os.fsencode(project) + b"/\xff.dvc"))
    git(project, "reset", "-q")
    clean_up(project, keep=0, dry_run=False)
    assert needed.exists()


def test_control_characters_in_a_runs_name_are_escaped(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_experiment(project, "one")
    tags = {"dvc.experiment": "one", "mlflow.source.git.commit": BASELINE, "process.host": "another"}
    run = MlflowClient().create_run("0", run_name="a\x1b[31m", tags=tags)
    MlflowClient().set_terminated(run.info.run_id)
    clean_up(project, keep=0, dry_run=True)
    said = capsys.readouterr().out
    assert f"MLflow run {run.info.run_id} (a\\x1b[31m): it is not certain" in said
    assert "\x1b" not in said


@pytest.mark.parametrize(
    ("arguments", "found"), [((), "nothing"), (("--keep",), "nothing"), (("--keep", "-1"), "'-1'")]
)
def test_a_number_that_cannot_be_is_refused_in_one_line(
    arguments: tuple[str, ...], found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    allowed = "how many of the newest experiments stay, 0 or more; add it, as in --keep 30"
    assert capsys.readouterr().err == f"error: --keep: found {found}; allowed: {allowed}\n"
