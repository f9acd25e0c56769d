"""Backups of real stores while another process writes to them, backups that are killed, and their restoration."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from flows.backup import ARTIFACT_LIST, OBJECTS, back_up, find_backups
from flows.champion_ref import read_ref, write_ref
from flows.restore import find_backup, restore
from flows.stores import check_database
from pipeline.artifacts import bytes_md5, read_json, verify
from pipeline.core.errors import PartialError, TemporaryError, UserError
from pipeline.core.git import git
from tests.conftest import PROJECT, start_repository

WRITER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=60)
connection.executescript("CREATE TABLE one (value INTEGER); CREATE TABLE two (value INTEGER)")
for number in range(10**9):
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("INSERT INTO one VALUES (?)", (number,))
    connection.execute("INSERT INTO two VALUES (?)", (number,))
    connection.execute("COMMIT")
    if number == 10:
        print("writes", flush=True)
"""


def make_project(folder: Path, stores: Path) -> Path:
    """Make a repository with both stores, an experiment, an artifact of MLflow and a file in DVC's cache."""
    shutil.copytree(PROJECT / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    (folder / ".gitignore").write_text("/mlflow.db*\n/mlartifacts\n/.prefect\n")
    start_repository(folder)
    for key in ("user.name", "user.email"):
        git(folder, "config", key, "t")
    git(folder, "update-ref", f"refs/exps/{'0' * 2}/{'1' * 38}/lively-name", "HEAD")
    (folder / ".prefect").mkdir()
    shutil.copy(stores / "mlflow.db", folder)
    shutil.copy(stores / "prefect.db", folder / ".prefect")
    write(folder / "mlartifacts/1/artifacts/model.json", b"{}")
    cache_object(folder, b"content")
    return folder


@pytest.fixture
def project(tmp_path: Path, stores: Path, no_servers: None) -> Path:
    return make_project(tmp_path / "project", stores)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def object_path(content: bytes) -> str:
    md5 = bytes_md5(content)
    return f"{md5[:2]}/{md5[2:]}"


def cache_object(project: Path, content: bytes) -> Path:
    return write(project / ".dvc/cache/files/md5" / object_path(content), content)


def clone(folder: Path, target: Path) -> Path:
    """A fresh clone from the git bundle of the newest backup."""
    bundle = find_backup(folder, None) / "repository.bundle"
    subprocess.run(["git", "clone", "-q", str(bundle), str(target)], check=True)
    return target


def test_a_backup_has_each_database_as_it_was_at_one_moment(project: Path, tmp_path: Path) -> None:
    paths = {"mlflow.db": project / "mlflow.db", "prefect.db": project / ".prefect/prefect.db"}
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) for path in paths.values()
    ]
    try:
        for writer in writers:
            assert writer.stdout
            assert writer.stdout.readline() == b"writes\n"
        back_up(project, tmp_path / "backup")
        assert all(writer.poll() is None for writer in writers)
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    for name in paths:
        copy = find_backup(tmp_path / "backup", None) / name
        check_database(copy)
        with closing(sqlite3.connect(copy)) as connection:
            [rows] = connection.execute("SELECT (SELECT count(*) FROM one), (SELECT count(*) FROM two)")
        assert rows[0] == rows[1] > 10


def test_a_second_backup_copies_only_what_is_new(project: Path, tmp_path: Path) -> None:
    first = back_up(project, tmp_path / "backup")
    assert [line for line in first if line.endswith("1 files, 1 of them new")] == first[3:5]
    first_backup = find_backup(tmp_path / "backup", None)
    first_backup.rename(first_backup.with_name("2026-01-01T000000Z"))
    cache_object(project, b"more")
    second = back_up(project, tmp_path / "backup")
    assert second[3:5] == ["mlartifacts/  1 files, 0 of them new", "DVC's cache   2 files, 1 of them new"]
    [old, new] = find_backups(tmp_path / "backup")
    assert read_json(old / ARTIFACT_LIST) == read_json(new / ARTIFACT_LIST) != {}


@pytest.mark.slow
@pytest.mark.parametrize("function", ["flows.backup.git", "flows.backup.store_files", "os.fsync", "os.sync"])
def test_a_backup_that_is_killed_leaves_the_earlier_one_good(project: Path, tmp_path: Path, function: str) -> None:
    folder = tmp_path / "backup"
    back_up(project, folder)
    [earlier] = find_backups(folder)
    earlier = earlier.rename(folder / "2026-01-01T000000Z")
    cache_object(project, b"more")
    module, _, name = function.rpartition(".")
    killed = (
        f"import os, {module}; from flows.backup import back_up; from pathlib import Path; "
        f"{module}.{name} = lambda *_, **__: os.kill(os.getpid(), {signal.SIGKILL:d}); "
        f"back_up(Path({str(project)!r}), Path({str(folder)!r}))"
    )
    assert subprocess.run([sys.executable, "-c", killed], cwd=PROJECT, check=False).returncode == -signal.SIGKILL
    assert find_backups(folder) == [earlier]
    verify(earlier)
    restore(clone(folder, tmp_path / "clone"), earlier)
    assert (tmp_path / "clone/mlflow.db").read_bytes() == (earlier / "mlflow.db").read_bytes()
    back_up(project, folder)
    assert len(find_backups(folder)) == 2
    assert not list(folder.glob("**/.*.tmp"))


def test_a_damaged_file_of_the_cache_is_reported_and_left_out(project: Path, tmp_path: Path) -> None:
    cache_object(project, b"damaged").write_bytes(b"another")
    with pytest.raises(PartialError, match=rf"1 missing .*/{object_path(b'damaged')} \(damaged\); remove"):
        back_up(project, tmp_path / "backup")
    assert (tmp_path / "backup" / OBJECTS / object_path(b"content")).is_file()
    assert not (tmp_path / "backup" / OBJECTS / object_path(b"damaged")).exists()
    verify(find_backup(tmp_path / "backup", None))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MLFLOW_TRACKING_URI", "postgresql://me:secret@host/mlflow"),
        ("MLFLOW_TRACKING_URI", "http://host:5000"),
        ("PREFECT_API_URL", "http://host:4200/api"),
        ("PREFECT_API_DATABASE_CONNECTION_URL", "postgresql+asyncpg://me:secret@host/prefect"),
    ],
)
def test_a_store_elsewhere_is_refused_in_one_line(project: Path, tmp_path: Path, variable: str, value: str) -> None:
    shutil.copytree(PROJECT / "flows", project / "flows")
    shutil.copytree(PROJECT / "pipeline", project / "pipeline")
    command = [sys.executable, "-m", "flows.backup", str(tmp_path / "backup")]
    environment = {**os.environ, variable: value}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "pg_dump" in done.stderr
    assert "secret" not in done.stderr
    assert not (tmp_path / "backup").exists()
    subprocess.run([*command, "--files-only"], cwd=project, env=environment, check=True, capture_output=True)
    assert not list((tmp_path / "backup").glob("*Z/*.db"))


def test_a_folder_in_the_project_is_refused(project: Path) -> None:
    with pytest.raises(UserError, match=r"is inside the project .*; allowed: a folder outside it"):
        back_up(project, project / "backup")


def test_runs_whose_artifacts_are_elsewhere_are_named(project: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(project / "mlflow.db")) as connection, connection:
        connection.execute("INSERT INTO runs (run_uuid, artifact_uri) VALUES ('a', 's3://bucket/1/a/artifacts')")
        connection.execute(
            "INSERT INTO runs (run_uuid, artifact_uri) VALUES ('b', ?)", (f"file://{project}/mlartifacts/1/b",)
        )
        connection.execute(
            "INSERT INTO model_versions (name, version, source, storage_location) VALUES ('m', 1, 'models:/m-1', NULL)"
        )
    [warning] = [line for line in back_up(project, tmp_path / "backup") if line.startswith("warning")]
    assert "runs and models keep files in 1 other places" in warning
    assert warning.endswith("s3://bucket/1/a/artifacts")


def test_a_fresh_clone_gets_all_of_it_back(project: Path, tmp_path: Path) -> None:
    champion = git(project, "commit-tree", "-m", "uncommitted results", "HEAD^{tree}")
    write_ref(project, "digits", champion)
    back_up(project, tmp_path / "backup")
    restored = clone(tmp_path / "backup", tmp_path / "clone")
    restore(restored, find_backup(tmp_path / "backup", None))
    assert read_ref(restored, "digits") == champion
    assert (restored / "mlartifacts/1/artifacts/model.json").read_bytes() == b"{}"
    cached = restored / ".dvc/cache/files/md5" / object_path(b"content")
    assert (cached.read_bytes(), cached.stat().st_mode & 0o777) == (b"content", 0o444)
    assert git(restored, "for-each-ref", "--format=%(refname)", "refs/exps") == f"refs/exps/00/{'1' * 38}/lively-name"
    for path in (restored / "mlflow.db", restored / ".prefect/prefect.db"):
        check_database(path)


def test_stores_that_exist_are_replaced_only_if_told_and_kept(project: Path, tmp_path: Path) -> None:
    back_up(project, tmp_path / "backup")
    backup = find_backup(tmp_path / "backup", None)
    before = write(project / "mlflow.db", (project / "mlflow.db").read_bytes() + b"\0" * 4096).read_bytes()
    write(project / "mlartifacts/1/artifacts/model.json", b"newer")
    with pytest.raises(UserError, match=r"mlflow.db: exists already; .*--overwrite"):
        restore(project, backup)
    assert (project / "mlflow.db").read_bytes() == before
    lines = restore(project, backup, overwrite=True)
    [kept] = project.glob("mlflow.db.before-restore-*")
    assert kept.read_bytes() == before
    assert (project / "mlflow.db").read_bytes() == (backup / "mlflow.db").read_bytes()
    assert (project / "mlartifacts/1/artifacts/model.json").read_bytes() == b"newer"
    assert "kept as they are here, although the backup has them with another size: 1/artifacts/model.json …" in lines


def test_a_store_that_a_process_uses_is_not_replaced(project: Path, tmp_path: Path) -> None:
    back_up(project, tmp_path / "backup")
    script = "import sys; file = open(sys.argv[1]); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(project / "mlflow.db")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        assert user.stdout
        user.stdout.readline()
        with pytest.raises(TemporaryError, match=rf"mlflow.db: is open in process {user.pid}"):
            restore(project, find_backup(tmp_path / "backup", None), overwrite=True)
        user.communicate(b"")


@pytest.mark.parametrize("name", ["mlflow.db", "prefect.db", "repository.bundle"])
def test_a_damaged_backup_is_refused_before_anything_is_written(project: Path, tmp_path: Path, name: str) -> None:
    back_up(project, tmp_path / "backup")
    backup = find_backup(tmp_path / "backup", None)
    restored = clone(tmp_path / "backup", tmp_path / "clone")
    content = bytearray((backup / name).read_bytes())
    content[len(content) // 2] ^= 1
    (backup / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: .* but"):
        restore(restored, backup)
    assert not (restored / ".dvc/cache").exists()
    assert not (restored / "mlflow.db").exists()


def test_damaged_files_in_a_backup_are_named_and_all_others_restored(project: Path, tmp_path: Path) -> None:
    cache_object(project, b"more")
    back_up(project, tmp_path / "backup")
    write(tmp_path / "backup" / OBJECTS / object_path(b"more"), b"less")
    write(tmp_path / "backup/mlartifacts" / object_path(b"{}"), b"[]")
    restored = clone(tmp_path / "backup", tmp_path / "clone")
    named = rf"2 damaged .*/{object_path(b'more')} \(damaged\), .*/mlartifacts/1/artifacts/model.json \(damaged\)"
    with pytest.raises(PartialError, match=named):
        restore(restored, find_backup(tmp_path / "backup", None))
    assert (restored / ".dvc/cache/files/md5" / object_path(b"content")).is_file()
    assert not (restored / ".dvc/cache/files/md5" / object_path(b"more")).exists()
    check_database(restored / "mlflow.db")


def test_a_folder_without_a_backup_is_refused(project: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no finished backup"):
        find_backup(tmp_path, None)
    back_up(project, tmp_path / "backup")
    with pytest.raises(UserError, match="--backup: found 'old'; allowed: 20"):
        find_backup(tmp_path / "backup", "old")


def test_a_restored_project_can_check_out_trace_and_predict(recorded: Path, tmp_path: Path) -> None:
    def run(*command: str, folder: Path) -> str:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PREFECT_"))
        }
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    python = (sys.executable, "-m")
    run(*python, "flows.backup", str(tmp_path / "backup"), folder=recorded)
    project = clone(tmp_path / "backup", tmp_path / "clone")
    run(*python, "flows.restore", str(tmp_path / "backup"), folder=project)
    [name] = run(*python, "dvc", "exp", "list", "--name-only", folder=project).split()
    for key in ("user.name", "user.email"):
        git(project, "config", key, "t")
    run(*python, "dvc", "exp", "apply", name, folder=project)
    shutil.rmtree(project / "artifacts/train")
    run(*python, "dvc", "checkout", folder=project)
    trace = run(*python, "flows.trace", name, folder=project)
    assert "not in the DVC cache" not in trace
    [run_id] = [line.split()[2] for line in trace.splitlines() if line.startswith("MLflow run")]
    script = (
        "import numpy, sys; from PIL import Image; "
        "Image.fromarray(numpy.load('artifacts/normalize/test_images.npy')[0].squeeze()).save('one.png')"
    )
    run(sys.executable, "-c", script, folder=project)
    model = f"runs:/{run_id}/model"
    restored = run(*python, "pipeline.predict", "--model", model, "one.png", folder=project)
    assert restored == run(*python, "pipeline.predict", "one.png", folder=project)
    assert restored.startswith("one.png: ")
    with closing(sqlite3.connect(project / "mlflow.db")) as store:
        places = [place for (place,) in store.execute("SELECT artifact_uri FROM runs")]
    assert places
    assert all(place.startswith(project.as_uri()) for place in places)
