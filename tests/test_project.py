"""A run is recorded in the project, also from a temporary folder of DVC and after the project was moved."""

import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
from mlflow import MlflowClient

from flows.ports import free_port
from flows.ui import mlflow_server
from pipeline.artifacts import cache_folder
from pipeline.core.errors import TemporaryError, UserError
from pipeline.core.project import DVC_TEMPORARY_FOLDERS, project_folder
from pipeline.core.settings import get_settings
from pipeline.download import download
from pipeline.tracking.logger import RunLogger
from pipeline.tracking.relocation import LOCATIONS, relocate
from pipeline.tracking.runs import create_run, find_or_create_run
from pipeline.tracking.search import find_run, read_file
from pipeline.tracking.store import connect
from pipeline.tracking.store_uri import tracking_uri
from tests.conftest import params

VARIABLES = ("PIPELINE_PROJECT", "DVC_ROOT", "DVC_EXP_NAME", "MLFLOW_TRACKING_URI", "PIPELINE_CACHE_DIR")


@pytest.fixture
def project(workspace: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a project with an MLflow store, the only entry of its parent folder, and return it."""
    folder = Path(shutil.move(workspace, tmp_path_factory.mktemp("place") / "project"))
    workspace.mkdir()
    monkeypatch.chdir(folder)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def temporary(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to the folder in which DVC runs the experiment bold-name of the project, and return it."""
    folder = project / DVC_TEMPORARY_FOLDERS / "tmpabcdef"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DVC_ROOT", str(project))
    monkeypatch.setenv("DVC_EXP_NAME", "bold-name")
    return folder


def make_run(name: str = "0", *, text: str = "x") -> str:
    """Make an MLflow run with a file, and return its id."""
    run, _ = find_or_create_run(name * 32, experiment="digits")
    Path("note.txt").write_text(text)
    run.log_file(Path("note.txt"))
    return run.run_id


def go_to(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Change to a folder as a new process does, without MLFLOW_TRACKING_URI, which MLflow has set in this process."""
    patch.chdir(folder)
    patch.delenv("MLFLOW_TRACKING_URI")
    get_settings.cache_clear()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_temporary_folder_of_dvc_belongs_to_the_project(temporary: Path, project: Path) -> None:
    run_id = make_run()
    assert [path.name for path in temporary.iterdir()] == ["note.txt"]
    assert list((project / "mlartifacts" / run_id).rglob("note.txt"))
    run = find_run(run_id)
    assert run
    assert (run.tags["dvc.experiment"], tracking_uri(project_folder())) == (
        "bold-name",
        f"sqlite:///{project}/mlflow.db",
    )
    assert cache_folder("checkpoints") == project / ".cache/checkpoints"


def test_relative_paths_in_settings_start_in_the_project(
    temporary: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    monkeypatch.setenv("PIPELINE_CACHE_DIR", "kept")
    assert find_run(make_run())
    assert not (temporary / "mlflow.db").exists()
    assert cache_folder("checkpoints") == project / "kept/checkpoints"


def test_a_project_run_by_a_stage_of_another_project_uses_its_own_folder(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(project.parent))
    assert project_folder() == project
    assert cache_folder("checkpoints") == Path(".cache/checkpoints")


def test_a_clone_of_a_flow_run_belongs_to_the_project_that_the_flow_names(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_PROJECT", "/somewhere")
    assert project_folder() == Path("/somewhere")


def test_the_error_about_missing_untracked_images_names_the_option_that_copies_them(temporary: Path) -> None:
    Path("data/images").mkdir(parents=True)
    with pytest.raises(UserError, match=r"`--copy-paths data/images` to `dvc exp run`, or set an absolute path$"):
        download(params(download__dataset="imagefolder").download)
    with pytest.raises(UserError, match=r"no such file; .*`--copy-paths archive.tar.gz` to `dvc exp run`"):
        download(params(download__dataset="cifar10", download__urls=["archive.tar.gz"]).download)


def move(project: Path) -> Path:
    """Rename the project to a name with characters that a URI escapes, and return the new folder."""
    return project.rename(project.with_name("new näme #1"))


def copy(project: Path) -> Path:
    return shutil.copytree(project, project.with_name("copy"))


def link(project: Path) -> Path:
    """Make the store record paths below a symbolic link to the project that no longer exists; return the project."""
    (project.parent / "link").symlink_to(project)
    old, new = f"file://{project}/", f"file://{project.parent}/link/"
    with sqlite3.connect(project / "mlflow.db") as store:
        for table, column in LOCATIONS:
            store.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (old, new))
    store.close()
    (project.parent / "link").unlink()
    return project


@pytest.mark.parametrize("change", [move, copy, link])
def test_a_moved_project_finds_its_old_artifacts_and_writes_nothing_to_the_old_folder(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: Callable[[Path], Path]
) -> None:
    run_id = make_run()
    other, _ = find_or_create_run("1" * 32, experiment="digits")  # it has no artifacts yet
    MlflowClient().create_registered_model("net")
    MlflowClient().create_model_version("net", f"{(project / 'mlartifacts').as_uri()}/models/m-1/artifacts")
    here = change(project)
    before = contents(project) if here != project and project.exists() else {}
    go_to(here, monkeypatch)
    capsys.readouterr()
    connect()
    assert "paths of artifacts were corrected" in capsys.readouterr().err
    found = find_run(run_id)
    assert found
    assert read_file(found, "note.txt") == b"x"
    RunLogger(other.run_id).log_file(Path("params.yaml"))
    run = find_run(other.run_id)
    assert run
    assert list((here / "mlartifacts" / other.run_id).rglob("params.yaml"))
    assert list((here / "mlartifacts" / make_run("2")).rglob("note.txt"))
    [version] = MlflowClient().search_model_versions("name = 'net'")
    assert version.source == f"{(here / 'mlartifacts').as_uri()}/models/m-1/artifacts"
    connect()
    assert capsys.readouterr().err == ""
    if here != project:
        assert (contents(project) if project.exists() else {}) == before


def test_artifacts_that_exist_only_in_another_project_stay_there(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another project records into the store of this one."""
    other = project.with_name("other")
    other.mkdir()
    monkeypatch.chdir(other)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/mlflow.db")
    run_id = make_run()
    go_to(project, monkeypatch)
    connect()
    found = find_run(run_id)
    assert found
    assert read_file(found, "note.txt") == b"x"


def test_a_store_that_cannot_be_corrected_is_reported_in_one_line_and_not_changed(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run()
    here = move(project)
    go_to(here, monkeypatch)
    monkeypatch.setattr("pipeline.tracking.relocation.MAX_BUSY_SECONDS", 0.1)
    with sqlite3.connect(here / "mlflow.db", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(TemporaryError, match=r"holds paths of another folder.*database is locked"):
            relocate(tracking_uri(here), here)
        other.execute("ROLLBACK")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(TemporaryError, match=r"cannot be read \(database is locked\); end what else uses it"):
            relocate(tracking_uri(here), here)
        other.execute("ROLLBACK")
    other.close()
    assert relocate(tracking_uri(here), here)
    assert relocate(tracking_uri(here), here) is None


def test_a_damaged_store_is_not_corrected_as_mlflow_reports_it(project: Path) -> None:
    (project / "mlflow.db").write_bytes(b"no database" * 1000)
    assert relocate(tracking_uri(project), project) is None


@pytest.mark.parametrize("change", [move, copy])
def test_an_artifact_folder_chosen_by_the_user_is_kept(
    project: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], Path]
) -> None:
    chosen = project.parent / "shared/mlartifacts/7"
    chosen.mkdir(parents=True)
    connect()
    MlflowClient().create_experiment("digits", artifact_location=chosen.as_uri())
    make_run()
    here = change(project)
    go_to(here, monkeypatch)
    run_id = make_run("1")
    assert list((chosen / run_id).rglob("note.txt"))
    assert not list((here / "mlartifacts").rglob("note.txt"))


def test_a_project_that_is_moved_without_its_store_writes_nothing_to_the_old_folder(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{project.parent}/elsewhere.db"
    shutil.copy(project / "mlflow.db", project.parent / "elsewhere.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    old = make_run()
    here = move(project)
    go_to(here, monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for name in ("0", "1"):  # the first has a run with artifacts in the old folder, the second is new
        with pytest.raises(
            UserError, match=f"digits keeps its artifacts in {project}/mlartifacts, which no longer"
        ) as error:
            make_run(name)
    with pytest.raises(UserError, match="MLFLOW_EXPERIMENT_NAME=… records into another experiment"):
        create_run("digits", training="t")
    assert not project.exists()
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "moved")
    get_settings.cache_clear()
    new = make_run()
    assert list((here / "mlartifacts" / new).rglob("note.txt"))
    assert not project.exists()
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    get_settings.cache_clear()
    subprocess.run(str(error.value).split("`")[1], shell=True, check=True)
    found = find_run(old)
    assert found
    assert read_file(found, "note.txt") == b"x"
    assert list((here / "mlartifacts" / make_run("2")).rglob("note.txt"))


def test_an_experiment_whose_artifact_folder_was_deleted_is_refused(project: Path) -> None:
    connect()
    chosen = project.parent / "my place/artifacts"
    MlflowClient().create_experiment("digits", artifact_location=chosen.as_uri())
    make_run()
    shutil.rmtree(chosen.parent)
    with pytest.raises(UserError, match=r"`mkdir -p '.*/my place'` makes it again; MLFLOW_EXPERIMENT_NAME=…"):
        make_run("1")
    assert not chosen.parent.exists()


def test_an_experiment_whose_artifact_folder_was_never_created_is_used(project: Path) -> None:
    connect()
    MlflowClient().create_experiment("digits", artifact_location=(project.parent / "new/place").as_uri())
    assert list((project.parent / "new/place" / make_run()).rglob("note.txt"))


@pytest.mark.slow
def test_the_mlflow_ui_of_a_moved_project_shows_old_artifacts(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = make_run()
    here = move(project)
    go_to(here, monkeypatch)
    with mlflow_server(here, port=free_port()) as address:
        content = requests.get(
            f"{address}/get-artifact", params={"path": "note.txt", "run_uuid": run_id}, timeout=30
        ).content
    assert content == b"x"
