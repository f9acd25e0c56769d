"""A sqlite store is created and migrated completely or not at all; one that cannot be migrated is not changed."""

import importlib.util
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import mlflow.store.db.utils
import prefect
import pytest
from alembic import command
from alembic.script import ScriptDirectory
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, temporary_settings

from flows import ui
from flows.prefect_database import ensure_database
from pipeline.core.errors import TemporaryError, UserError
from pipeline.core.sqlite import sqlite_path
from pipeline.tracking import sqlite_store
from pipeline.tracking.sqlite_store import MLFLOW, PREFECT, ensure_store, is_current, revisions
from pipeline.tracking.store import link_migrations, migrate
from tests.conftest import PROJECT

# A revision of MLflow's schema to which the installed version can downgrade.
OLDER_REVISION = "7d34483879f0"
RUN = "INSERT INTO runs (run_uuid, name, status, experiment_id) VALUES ('1f', 'old', 'FINISHED', 0)"
# Opens the store, waits for a line on stdin, and writes.
WRITER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("SELECT 1 FROM runs").fetchall()
print("open", flush=True)
sys.stdin.readline()
try:
    connection.execute("DELETE FROM runs")
    print("written")
except sqlite3.Error as error:
    print(error)
"""


def copy_complete(complete: Path, copy: Path, _lock: int) -> None:
    shutil.copyfile(complete, copy)


def fail(_copy: Path, _lock: int) -> None:
    raise AssertionError("nothing is to be migrated")


def execute(file: Path, *statements: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(file)) as connection, connection:
        return [row for statement in statements for row in connection.execute(statement)]


def names(file: Path) -> list[object]:
    return [name for (name,) in execute(file, "SELECT name FROM runs")]


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory, mlflow_store: Path) -> Path:
    """Return an MLflow store with a run and with the schema of an older MLflow."""
    file = Path(shutil.copy(mlflow_store / "mlflow.db", tmp_path_factory.mktemp("older")))
    execute(file, RUN)
    config = mlflow.store.db.utils._get_alembic_config(f"sqlite:///{file}")  # type: ignore[no-untyped-call]
    engine = mlflow.store.db.utils.create_sqlalchemy_engine(f"sqlite:///{file}")  # type: ignore[no-untyped-call]
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, OLDER_REVISION)
    engine.dispose()
    return file


@pytest.fixture
def store(older: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder with a copy of the older store, and return the copy."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copy(older, tmp_path))


@pytest.fixture
def incomplete_store(store: Path) -> Path:
    """Return a store without runs whose first migration was killed before its revision was recorded."""
    execute(store, "DELETE FROM runs", "DELETE FROM alembic_version")
    return store


def leftovers(file: Path) -> set[str]:
    return {path.name for path in file.parent.iterdir()} - {file.name, f"{file.name}.lock"}


def test_the_revisions_equal_those_that_alembic_reads() -> None:
    for tool, package in ((MLFLOW, mlflow.__file__), (PREFECT, prefect.__file__)):
        assert package
        versions = Path(package).parent / tool.versions
        script = ScriptDirectory(str(versions.parent), version_locations=[str(versions)])
        known, newest = revisions(tool)
        assert [newest] == script.get_heads()
        assert known == {found.revision for found in script.walk_revisions()}


def test_a_migration_that_merges_two_revisions_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "__init__.py").touch()
    for revision, previous in {"a": None, "b": "a", "c": "a", "d": ("b", "c")}.items():
        text = f"revision: str = {revision!r}\ndown_revision: tuple[str, str] = {previous!r}\n"
        (tmp_path / f"{revision}_change.py").write_text(text)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    assert revisions(replace(MLFLOW, versions=".")) == (frozenset("abcd"), "d")


@pytest.mark.parametrize(
    ("uri", "file"),
    [
        ("sqlite:///mlflow.db", "mlflow.db"),
        ("sqlite:////data/my runs/100%.db", "/data/my runs/100%.db"),
        ("sqlite+aiosqlite:////data/prefect.db?timeout=60", "/data/prefect.db"),
        ("sqlite:///file:/data/a%3Fb.db?uri=true", "/data/a?b.db"),
        ("sqlite:///file:///data/a.db?mode=rw&uri=true", "/data/a.db"),
        ("sqlite:///:memory:", None),
        ("sqlite+aiosqlite:///file::memory:?cache=shared&uri=true", None),
        ("sqlite:///file:runs?mode=memory&uri=true", None),
        ("sqlite://", None),
        ("postgresql://me@host/mlflow", None),
        ("http://127.0.0.1:5000", None),
    ],
)
def test_the_file_of_a_database_is_read_from_its_url(uri: str, file: str | None) -> None:
    assert sqlite_path(uri) == (Path(file) if file else None)


def test_an_older_store_is_migrated_with_its_write_ahead_log_and_its_permissions(store: Path) -> None:
    store.chmod(0o600)
    with closing(sqlite3.connect(store, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("UPDATE runs SET name = 'newer'")
        killed = store.parent / "killed"  # a killed process leaves the change in the write-ahead log only
        killed.mkdir()
        for suffix in ("", "-wal"):
            shutil.copy(f"{store}{suffix}", killed)
    file = killed / store.name
    ensure_store(file, tool=MLFLOW, migrate=migrate)
    assert is_current(file, tool=MLFLOW)
    assert names(file) == ["newer"]
    assert execute(file, "PRAGMA journal_mode") == [("wal",)]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not leftovers(file)
    ensure_store(file, tool=MLFLOW, migrate=fail)


@pytest.mark.parametrize("content", [None, b""])
def test_a_store_is_created_where_the_file_is_missing_or_empty(
    tmp_path: Path, mlflow_store: Path, content: bytes | None
) -> None:
    file = tmp_path / "new" / "other.db"
    if content is not None:
        file.parent.mkdir()
        file.write_bytes(content)
    ensure_store(file, tool=MLFLOW, migrate=partial(copy_complete, mlflow_store / "mlflow.db"))
    assert is_current(file, tool=MLFLOW)
    assert not leftovers(file)


def test_leftover_files_of_a_deleted_database_are_not_used_by_a_new_one(tmp_path: Path, mlflow_store: Path) -> None:
    file = tmp_path / "mlflow.db"
    for suffix in ("-journal", "-wal", "-shm"):
        file.with_name(file.name + suffix).write_bytes(b"old")
    ensure_store(file, tool=MLFLOW, migrate=partial(copy_complete, mlflow_store / "mlflow.db"))
    assert not leftovers(file)


def test_a_link_stays_a_link(store: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.db"
    link.symlink_to(store)
    ensure_store(link, tool=MLFLOW, migrate=migrate)
    assert link.is_symlink()
    assert is_current(store, tool=MLFLOW)


def test_an_incomplete_store_without_runs_is_created_again(
    incomplete_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # the journal of a transaction that had not written to the database yet, which sqlite ignores
    incomplete_store.with_name("mlflow.db-journal").write_bytes(bytes(1000))
    ensure_store(incomplete_store, tool=MLFLOW, migrate=migrate)
    assert is_current(incomplete_store, tool=MLFLOW)
    assert "without data; it was created again" in capsys.readouterr().out
    assert not leftovers(incomplete_store)


@pytest.mark.parametrize("row", [RUN, "INSERT INTO experiments (experiment_id, name) VALUES (7, 'mine')"])
def test_an_incomplete_store_with_content_is_reported_and_not_changed(incomplete_store: Path, row: str) -> None:
    execute(incomplete_store, row)
    assert_refused(incomplete_store, match="cannot migrate it .*; nothing was changed.* move the file away")


def test_the_store_of_a_newer_version_is_refused(store: Path) -> None:
    execute(store, "UPDATE alembic_version SET version_num = 'f00'")
    assert_refused(store, match="found schema revision f00, which MLflow [0-9.]+ does not know; a newer MLflow")


def test_a_database_of_another_program_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    execute(file, "CREATE TABLE songs (name)")
    assert_refused(file, match="found the tables songs, which are not of MLflow; allowed: ")


def test_a_file_that_is_not_a_database_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    file.write_bytes(b"no database" * 100)
    assert_refused(file, match="mlflow.db: file is not a database; .* move the file away")


def test_a_damaged_database_is_refused(store: Path) -> None:
    content = bytearray(store.read_bytes())
    content[4096:200_000] = bytes(200_000 - 4096)
    store.write_bytes(content)
    assert_refused(store, match="mlflow.db: ")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unable to open database file; allowed: a file"):
        ensure_store(tmp_path, tool=MLFLOW, migrate=fail)


def assert_refused(file: Path, *, match: str) -> None:
    before = file.read_bytes()
    with pytest.raises(UserError, match=match) as error:
        ensure_store(file, tool=MLFLOW, migrate=migrate)
    assert "\n" not in str(error.value)
    assert file.read_bytes() == before
    assert not leftovers(file)


@contextmanager
def writer(file: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process that has the store open and writes to it after a line on its stdin, and yield it."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "open\n"
        yield process
        process.kill()


def test_a_store_that_another_process_has_open_is_not_migrated(store: Path) -> None:
    with writer(store) as process, pytest.raises(TemporaryError, match=rf"is open in process {process.pid} \("):
        ensure_store(store, tool=MLFLOW, migrate=fail)
    assert not is_current(store, tool=MLFLOW)


def test_a_store_in_wal_mode_that_is_open_elsewhere_is_not_migrated(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_store, "LOCK_SECONDS", 0.1)
    execute(store, "PRAGMA journal_mode = WAL")
    with writer(store), pytest.raises(TemporaryError, match="is in use by another process"):
        ensure_store(store, tool=MLFLOW, migrate=fail)
    assert not is_current(store, tool=MLFLOW)


def test_a_process_that_opens_the_store_while_it_is_migrated_cannot_write_to_the_old_file(store: Path) -> None:
    opened = []

    def open_meanwhile(copy: Path, lock: int) -> None:
        opened.append(stack.enter_context(writer(store)))
        migrate(copy, lock)

    with ExitStack() as stack:
        ensure_store(store, tool=MLFLOW, migrate=open_meanwhile)
        output, _ = opened[0].communicate("\n")
    assert "readonly" in output
    assert names(store) == ["old"]


def test_make_ui_migrates_an_older_store_before_it_starts_the_server(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    monkeypatch.chdir("/")
    for _ in range(2):
        ui._ensure_store(f"sqlite:///{store}", project=store.parent)
        assert names(store) == ["old"]
        assert is_current(store, tool=MLFLOW)
    assert capsys.readouterr().out.count("mlflow.db: migrated to the schema of MLflow") == 1


def test_a_full_disk_is_reported_in_one_line_and_the_store_is_not_changed(store: Path) -> None:
    folder = store.parent / "mnt"
    folder.mkdir()
    script = f"""mount -t tmpfs -o size=1200k tmpfs {folder} && cp {store} {folder} && cd {folder} &&
        {sys.executable} -c '
from pipeline.core import errors; from pipeline.tracking.store import connect
with errors.report_errors(): connect()'; echo $?; cmp {store} mlflow.db && ls"""
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let users mount file systems (unshare --user --mount)")
    done = subprocess.run(
        [*unshare, "sh", "-c", script],
        env=environment | {"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.startswith(f"error: {folder}/mlflow.db: ")
    assert "make room on the disk" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout.split() == ["2", "mlartifacts", "mlflow.db", "mlflow.db.lock"]


@pytest.mark.slow
def test_prefects_own_command_makes_the_database_that_its_settings_name(
    tmp_path: Path,
) -> None:
    file = tmp_path / "a b" / "prefect.db"
    file.parent.mkdir()
    environment = os.environ | {"PREFECT_HOME": str(file.parent), "PREFECT_API_URL": ""}
    with pytest.raises(TemporaryError, match="was ended by SIGKILL; run the same command again"):
        ensure_database(environment | {"PYTHONPATH": str(killer(tmp_path))})
    assert not file.exists()
    ensure_database(environment)
    assert is_current(file, tool=PREFECT)
    assert {path.name for path in file.parent.iterdir() if path.name.startswith("prefect.db")} == {
        "prefect.db",
        "prefect.db.lock",
    }


def killer(folder: Path) -> Path:
    """Make a folder for PYTHONPATH that kills each Python process at its first migration, and return it."""
    (folder / "sitecustomize.py").write_text(
        "import os\nfrom alembic.runtime.migration import HeadMaintainer as H\n"
        "H.update_to_step = lambda *_: os.kill(os.getpid(), 9)\n"
    )
    return folder


def test_a_database_that_is_not_a_sqlite_file_is_not_touched(tmp_path: Path) -> None:
    for url in ("postgresql+asyncpg://127.0.0.1:9/prefect", "sqlite+aiosqlite:///file::memory:?cache=shared&uri=true"):
        ensure_database({"PREFECT_HOME": str(tmp_path), "PREFECT_API_DATABASE_CONNECTION_URL": url})
        with temporary_settings({PREFECT_API_DATABASE_CONNECTION_URL: url}):  # a profile sets the URL in this way
            ensure_database({"PREFECT_HOME": str(tmp_path)})
    assert not list(tmp_path.iterdir())


def test_migrations_are_found_where_the_packages_path_has_a_percent_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "100%"
    link.symlink_to(mlflow.store.db.utils._get_package_dir())  # type: ignore[no-untyped-call]
    monkeypatch.setattr(mlflow.store.db.utils, "_get_package_dir", lambda: str(link))
    with pytest.raises(ValueError, match="invalid interpolation syntax"):
        mlflow.store.db.utils._get_alembic_config("sqlite://")  # type: ignore[no-untyped-call]
    link_migrations()
    config = mlflow.store.db.utils._get_alembic_config("sqlite://")  # type: ignore[no-untyped-call]
    assert ScriptDirectory.from_config(config).get_current_head()
    with sqlite_store.without_percent(link) as plain:
        assert "%" not in str(plain)
        assert plain.samefile(link)
    assert not os.path.lexists(plain)
    with sqlite_store.without_percent(tmp_path) as plain:
        assert plain == tmp_path
