"""A backup and its restoration lose nothing without a word, and touch nothing that is not theirs."""

import errno
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flows import backup_files
from flows import restore as restore_module
from flows.backup import ARTIFACTS, OBJECTS, RUNS, back_up, find_backups
from flows.file_lock import hold_files
from flows.restore import find_backup, restore
from flows.stores import find_databases
from flows.workspace_folders import make_folder
from pipeline.artifacts import file_md5
from pipeline.core.errors import PartialError, TemporaryError, UserError
from pipeline.core.git import find_commit, git
from tests.test_backup import clone, make_project, object_path, write

MODEL = "mlartifacts/1/artifacts/model.json"


@pytest.fixture
def project(tmp_path: Path, stores: Path, no_servers: None) -> Path:
    return make_project(tmp_path / "project", stores)


def back_up_as(name: str, project: Path, folder: Path) -> Path:
    """Back up under this name, and return the backup."""
    back_up(project, folder)
    return find_backups(folder)[-1].rename(folder / name)


def test_what_others_have_in_the_folder_stays(project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "nas"
    names = ("photos/.project.tmp/file", "photos/.x.12.tmp", "mlartifacts/.mine.tmp", ".new.tmp/file", "cache/.x.1.tmp")
    foreign = [write(folder / name, b"mine") for name in names]
    leftovers = [
        write(folder / ".2026-01-01T000000Z.new.tmp/mlflow.db", b""),
        write(folder / ARTIFACTS / "ab/.cd.123.tmp", b""),
        write(folder / OBJECTS / "ab/.cd.123.tmp", b""),
        write(folder / RUNS / "ab/.cd.123.tmp", b""),
    ]
    back_up(project, folder)
    assert all(path.read_bytes() == b"mine" for path in foreign)
    assert not [path for path in leftovers if path.exists()]


def test_each_backup_keeps_the_artifacts_that_it_was_made_with(project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "backup"
    old = back_up_as("2026-01-01T000000Z", project, folder)
    write(project / MODEL, b"[]")
    back_up(project, folder)
    restored = clone(folder, tmp_path / "clone")
    restore(restored, old)
    assert (restored / MODEL).read_bytes() == b"{}"


def test_an_artifact_that_a_killed_backup_has_copied_is_restored(project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "backup"
    back_up_as("2026-01-01T000000Z", project, folder)
    write(project / MODEL, b"[]")
    killed = (
        "import os, flows.backup; from pathlib import Path; "
        "flows.backup.copy_objects = lambda *_, **__: os.kill(os.getpid(), 9); "
        f"flows.backup.back_up(Path({str(project)!r}), Path({str(folder)!r}))"
    )
    assert subprocess.run([sys.executable, "-c", killed], check=False).returncode == -9
    back_up(project, folder)
    restored = clone(folder, tmp_path / "clone")
    restore(restored, find_backup(folder, None))
    assert (restored / MODEL).read_bytes() == b"[]"


def test_linked_folders_and_names_that_end_in_tmp_are_in_the_backup(project: Path, tmp_path: Path) -> None:
    write(tmp_path / "disk/2/weights", b"weights")
    (project / "mlartifacts/2").symlink_to(tmp_path / "disk/2")
    (project / "mlartifacts/2/loop").symlink_to(tmp_path / "disk/2")
    write(project / "mlartifacts/1/.notes.tmp", b"notes")
    write(project / "mlartifacts/1/.notes.123.tmp", b"being written")
    back_up(project, tmp_path / "backup")
    restored = clone(tmp_path / "backup", tmp_path / "clone")
    restore(restored, find_backup(tmp_path / "backup", None))
    assert (restored / "mlartifacts/2/weights").read_bytes() == b"weights"
    assert (restored / "mlartifacts/1/.notes.tmp").read_bytes() == b"notes"
    assert not (restored / "mlartifacts/1/.notes.123.tmp").exists()


@pytest.mark.parametrize("function", ["iterdir", "open"])
def test_what_cannot_be_read_is_named_and_all_the_rest_backed_up(
    project: Path, tmp_path: Path, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = (project / MODEL) if function == "open" else (project / MODEL).parent
    original = getattr(Path, function)

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(path, *arguments, **options)

    with monkeypatch.context() as context:
        context.setattr(Path, function, refuse)
        with pytest.raises(PartialError, match=rf"1 missing .*: {closed} \(Permission denied\); "):
            back_up(project, tmp_path / "backup")
    assert (tmp_path / "backup" / OBJECTS / object_path(b"content")).is_file()
    assert (find_backup(tmp_path / "backup", None) / "mlflow.db").is_file()


def test_a_file_that_is_removed_during_the_backup_is_named(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove_first(path: Path) -> str:
        path.unlink()
        return file_md5(path)

    monkeypatch.setattr(backup_files, "file_md5", remove_first)
    with pytest.raises(PartialError, match=r"model.json \(No such file or directory\)"):
        back_up(project, tmp_path / "backup")


def test_a_full_disk_is_not_taken_for_an_unreadable_file(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_source: Path, target: Path) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(backup_files, "copy_file", fail)
    with pytest.raises(OSError, match="No space left"):
        back_up(project, tmp_path / "backup")
    assert not find_backups(tmp_path / "backup")


def test_a_cleanup_at_the_same_time_is_refused(project: Path, tmp_path: Path) -> None:
    back_up(project, tmp_path / "backup")
    with hold_files(project, command="flows.cleanup"):
        with pytest.raises(TemporaryError, match=r"flows.cleanup is running in .*; try again after its end"):
            back_up(project, tmp_path / "backup")
        with pytest.raises(TemporaryError, match=r"flows.cleanup is running"):
            restore(project, find_backup(tmp_path / "backup", None), overwrite=True)


@pytest.mark.parametrize("name", ["mlflow.db", ".prefect/prefect.db"])
def test_a_missing_database_is_named(
    project: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / name).unlink()
    with pytest.raises(PartialError, match=rf"1 missing .*{Path(name).name} \(no file .*: set [A-Z_]* as the runs"):
        back_up(project, tmp_path / "backup")
    assert f"no {Path(name).name}: {project / name} does not exist" in capsys.readouterr().out
    lines = restore(clone(tmp_path / "backup", tmp_path / "clone"), find_backup(tmp_path / "backup", None))
    assert f"{Path(name).name:<14}not in this backup" in lines


def test_a_restore_of_files_only_says_that_there_are_no_databases(project: Path, tmp_path: Path) -> None:
    back_up(project, tmp_path / "backup", files_only=True)
    lines = restore(clone(tmp_path / "backup", tmp_path / "clone"), find_backup(tmp_path / "backup", None))
    assert lines[-2:] == ["mlflow.db     not in this backup", "prefect.db    not in this backup"]


def test_a_shallow_clone_is_refused(project: Path, tmp_path: Path) -> None:
    git(project, "commit", "--quiet", "--allow-empty", "-m", "two")
    shallow = tmp_path / "shallow"
    subprocess.run(["git", "clone", "-q", "--depth=1", project.as_uri(), str(shallow)], check=True)
    with pytest.raises(UserError, match=r"found a shallow clone, .*`git fetch --unshallow`"):
        back_up(shallow, tmp_path / "backup", files_only=True)


def test_a_folder_is_for_one_project(project: Path, tmp_path: Path, stores: Path) -> None:
    other = make_project(tmp_path / "other", stores)
    git(other, "commit", "--quiet", "--amend", "-m", "Another start")
    folder = tmp_path / "backup"
    back_up(project, folder)
    with pytest.raises(UserError, match=f"found a backup of another project, {project}; allowed: .*; name another"):
        back_up(other, folder)
    assert len(find_backups(folder)) == 1
    with pytest.raises(UserError, match="found a backup of another project"):
        restore(other, find_backup(folder, None), overwrite=True)
    lines = restore(clone(folder, tmp_path / "clone"), find_backup(folder, None))
    assert lines[0].endswith(f" of {project}")


def test_a_backup_made_before_the_first_commit_of_a_branch_can_be_restored(project: Path, tmp_path: Path) -> None:
    restored = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(project), str(restored)], check=True)
    branch = git(project, "branch", "--show-current")
    git(project, "checkout", "--quiet", "--orphan", "fresh")
    back_up(project, tmp_path / "backup")
    backup = find_backup(tmp_path / "backup", None)
    restore(restored, backup)
    assert find_commit(restored, f"backup-{backup.name}/{branch}") == find_commit(project, branch)


def test_branches_of_two_backups_do_not_hide_each_other(project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "backup"
    git(project, "branch", "topic")
    first = back_up_as("2026-01-01T000000Z", project, folder)
    git(project, "branch", "-D", "topic")
    git(project, "branch", "topic/new")
    second = back_up_as("2026-01-02T000000Z", project, folder)
    for backup in (first, second):
        restore(project, backup, overwrite=True)
    assert find_commit(project, f"backup-{first.name}/topic")
    assert find_commit(project, f"backup-{second.name}/topic/new")


def test_a_tag_that_git_cannot_add_is_named(project: Path, tmp_path: Path) -> None:
    git(project, "tag", "v1/rc")
    back_up(project, tmp_path / "backup")
    git(project, "tag", "-d", "v1/rc")
    git(project, "tag", "v1")
    with pytest.raises(PartialError, match=r"1 damaged or missing .*: refs/tags/v1/rc \(git cannot add it"):
        restore(project, find_backup(tmp_path / "backup", None), overwrite=True)


def test_refs_of_a_running_dvc_and_of_its_queue_are_not_restored(project: Path, tmp_path: Path) -> None:
    for ref in ("refs/exps/exec/EXEC_HEAD", "refs/exps/celery/stash", "refs/exps/stash", "refs/stash"):
        git(project, "update-ref", ref, "HEAD")
    lines = back_up(project, tmp_path / "backup")
    assert "git           2 branches, tags and HEAD; 1 experiments; 0 champions" in lines
    restored = clone(tmp_path / "backup", tmp_path / "clone")
    lines = restore(restored, find_backup(tmp_path / "backup", None))
    assert [line for line in lines if line.startswith("git           1 experiments, champions and tags")]
    assert git(restored, "for-each-ref", "--format=%(refname)", "refs/exps", "refs/stash").count("\n") == 0


def test_an_entry_of_the_run_cache_that_exists_stays(project: Path, tmp_path: Path) -> None:
    names = [f"{digit * 2}/{digit * 64}/{'0' * 64}" for digit in "ab"]
    for name in names:
        write(project / ".dvc/cache/runs" / name, b"saved")
    back_up(project, tmp_path / "backup")
    restored = clone(tmp_path / "backup", tmp_path / "clone")
    here = write(restored / ".dvc/cache/runs" / names[0], b"here")
    restore(restored, find_backup(tmp_path / "backup", None))
    assert here.read_bytes() == b"here"
    assert (restored / ".dvc/cache/runs" / names[1]).read_bytes() == b"saved"


def test_a_restore_waits_for_no_flow_run(project: Path, tmp_path: Path) -> None:
    back_up(project, tmp_path / "backup")
    with make_folder(project, "run"), pytest.raises(TemporaryError, match="flow runs of this project are running"):
        restore(project, find_backup(tmp_path / "backup", None), overwrite=True)


def test_a_database_that_is_opened_while_files_are_copied_is_not_replaced(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back_up(project, tmp_path / "backup")
    before = write(project / "mlflow.db", (project / "mlflow.db").read_bytes() + b"\0" * 4096).read_bytes()
    original, opened = restore_module._restore_files, list[Path]()

    def open_meanwhile(project: Path, backup: Path, *, lines: list[str]) -> list[str]:
        opened.append(project / "mlflow.db")
        return original(project, backup, lines=lines)

    monkeypatch.setattr(restore_module, "_restore_files", open_meanwhile)
    monkeypatch.setattr(restore_module, "processes_using", lambda path: ["process 1"] if path in opened else [])
    with pytest.raises(TemporaryError, match=r"mlflow.db: is open in process 1"):
        restore(project, find_backup(tmp_path / "backup", None), overwrite=True)
    assert (project / "mlflow.db").read_bytes() == before


def test_a_project_that_was_moved_is_backed_up_without_a_false_warning(project: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(project / "mlflow.db")) as store, store:
        store.execute(
            "INSERT INTO runs (run_uuid, artifact_uri) VALUES ('a', ?)", (f"{project.as_uri()}/mlartifacts/1/a",)
        )
    moved = Path(shutil.move(project, tmp_path / "moved"))
    lines = back_up(moved, tmp_path / "backup")
    assert [line for line in lines if "paths of artifacts were corrected" in line]
    assert not [line for line in lines if line.startswith("warning")]


def test_models_whose_files_are_elsewhere_are_named(project: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(project / "mlflow.db")) as store, store:
        store.execute("PRAGMA foreign_keys = OFF")
        store.execute(
            "INSERT INTO model_versions (name, version, source, storage_location) "
            "VALUES ('m', 1, 'models:/m-1', 's3://bucket/m-1')"
        )
    [warning] = [line for line in back_up(project, tmp_path / "backup") if line.startswith("warning")]
    assert warning.endswith("s3://bucket/m-1")


def test_a_backup_does_not_look_for_a_server_that_nobody_configured(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(_project: Path) -> None:
        raise TemporaryError("the server is being started")

    monkeypatch.setattr("flows.server.running", wait)
    assert find_databases(project)["prefect.db"] == project / ".prefect/prefect.db"
