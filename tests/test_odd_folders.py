"""A project works whatever characters its path has, and as a folder of a larger repository."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
import pytest
import sqlalchemy
from dvc.config import Config

from flows import dvc_worker, git, workspace
from flows.dvc_state import experiment_refs
from flows.lineage import Sources
from pipeline.artifacts import DOWNLOAD
from pipeline.core.errors import UserError, redact_url
from pipeline.core.git import code_state
from pipeline.core.settings import get_settings
from pipeline.core.sqlite import sqlite_path, sqlite_uri
from pipeline.core.yaml import dump_yaml, read_yaml
from pipeline.tracking.experiments import experiment_id
from pipeline.tracking.logger import RunLogger
from pipeline.tracking.run_title import read_setup
from pipeline.tracking.search import find_run, read_file
from pipeline.tracking.store import connect
from pipeline.tracking.store_uri import tracking_uri
from tests.conftest import PROJECT, copy_project, start_repository

SPECIAL_CHARS = "a b#c?d%20e'f\"g&h;i$HOME é 桌面"


@pytest.fixture
def special_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to an empty folder whose name has special characters, and return it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("PIPELINE_PROJECT", raising=False)
    (tmp_path / SPECIAL_CHARS).mkdir()
    monkeypatch.chdir(tmp_path / SPECIAL_CHARS)
    return tmp_path / SPECIAL_CHARS


def test_the_uri_of_a_database_opens_its_file(special_folder: Path) -> None:
    uri = sqlite_uri(special_folder / "x.db")
    with sqlalchemy.create_engine(uri).connect() as connection:
        connection.execute(sqlalchemy.text("CREATE TABLE t (x)"))
    assert list(special_folder.iterdir()) == [special_folder / "x.db"] == [sqlite_path(uri)]
    assert redact_url(uri) == uri


@pytest.mark.parametrize("path", ["/a/mlflow.db", "/a b/é#1/mlflow.db"])
def test_a_uri_without_special_characters_has_the_usual_form(path: str) -> None:
    assert sqlite_uri(Path(path)) == f"sqlite:///{path}"
    assert sqlite_path(f"sqlite:///{path}?timeout=5") == Path(path)


def test_runs_are_recorded_in_the_project(special_folder: Path, mlflow_store: Path) -> None:
    (special_folder / "mlflow.db").write_bytes((mlflow_store / "mlflow.db").read_bytes())
    connect()
    experiment = experiment_id("odd")
    run = RunLogger(mlflow.MlflowClient().create_run(experiment).info.run_id)
    (special_folder / "file.txt").write_text("x")
    run.log_file(special_folder / "file.txt")
    record = find_run(run.run_id)
    assert record
    assert read_file(record, "file.txt") == b"x"
    assert (special_folder / "mlartifacts" / run.run_id / "artifacts" / "file.txt").exists()
    assert list(special_folder.parent.iterdir()) == [special_folder]


def test_the_store_is_in_the_project_unless_the_user_names_one(
    special_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sqlite_path(tracking_uri(special_folder)) == special_folder / "mlflow.db"
    assert workspace.existing_store(special_folder) is None
    (special_folder / "mlflow.db").touch()
    assert workspace.existing_store(special_folder) == tracking_uri(special_folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db?timeout=5")
    get_settings.cache_clear()
    assert tracking_uri(special_folder) == sqlite_uri(special_folder / "other.db") + "?timeout=5"


def test_a_workspace_gets_the_projects_cache_and_remotes(special_folder: Path) -> None:
    project, clone = special_folder / "project", special_folder / "clone"
    for folder in (project, clone):
        (folder / ".dvc").mkdir(parents=True)
        (folder / ".dvc" / "config").write_text(
            "[core]\n    remote = local\n['remote \"local\"']\n    url = ../.dvcstore\n"
        )
    dvc_worker.configure(clone, project=project)
    settings = Config(dvc_dir=str(clone / ".dvc"))
    assert settings["cache"]["dir"] == str(project / ".dvc" / "cache")
    assert settings["remote"]["local"]["url"] == str(project / ".dvcstore")


def test_dvc_keeps_its_index_in_the_workspace_only_if_the_path_has_no_special_characters(special_folder: Path) -> None:
    assert "DVC_SITE_CACHE_DIR" not in workspace.stage_environment(PROJECT, special_folder, variables={})
    plain = workspace.stage_environment(PROJECT, special_folder.parent, variables={})
    assert plain["DVC_SITE_CACHE_DIR"] == str(special_folder.parent / "index")


def larger_repository(top: Path) -> Path:
    """Copy the project, with its first stage only, into a folder of a larger repository, and return its folder."""
    project = copy_project(top / "ml é")
    shutil.rmtree(project / ".git")
    stages = read_yaml(project / "dvc.yaml")["stages"]
    (project / "dvc.yaml").write_text(dump_yaml({"stages": {"download": stages["download"]}}))
    (top / "other.txt").write_text("x")
    start_repository(top)
    return project


def test_a_folder_of_a_larger_repository_is_found(tmp_path: Path) -> None:
    (tmp_path / "ml").mkdir()
    with pytest.raises(UserError, match="not in a git repository; run `git init`"):
        git.check_checkout(tmp_path / "ml")
    (tmp_path / "ml" / "dvc.yaml").touch()
    start_repository(tmp_path)
    assert git.find_repository(tmp_path / "ml") == (tmp_path.resolve(), Path("ml"))
    assert git.find_repository(tmp_path) == (tmp_path.resolve(), Path())


def test_a_project_that_the_larger_repository_does_not_track_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "other.txt").touch()
    start_repository(tmp_path)
    (tmp_path / "ml" / ".dvc").mkdir(parents=True)
    (tmp_path / "ml" / ".dvc" / "config").touch()
    with pytest.raises(UserError, match=r"does not track dvc.yaml here; run `git add \.` and commit") as error:
        git.check_checkout(tmp_path / "ml")
    assert "\n" not in str(error.value)


def test_only_changes_in_the_project_are_recorded_as_uncommitted(tmp_path: Path) -> None:
    (tmp_path / "ml").mkdir()
    for path in ("other.txt", "ml/own.txt"):
        (tmp_path / path).write_text("1\n")
    start_repository(tmp_path)
    for path in ("other.txt", "ml/own.txt"):
        (tmp_path / path).write_text("2\n")
    (tmp_path / "ml" / "pipeline").mkdir()
    (tmp_path / "ml" / "pipeline" / "new.py").write_text("3\n")
    difference = code_state(tmp_path / "ml", tracked="own.txt").difference
    assert difference
    assert b"b/ml/own.txt" in difference
    assert b"b/ml/pipeline/new.py" in difference
    assert b"other.txt" not in difference


@pytest.mark.slow
def test_a_stage_runs_in_a_folder_of_a_larger_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = larger_repository(tmp_path / SPECIAL_CHARS)
    params: Mapping[str, Any] = read_yaml(project / "params.yaml")
    (tmp_path / SPECIAL_CHARS / "other.txt").write_text("changed")
    lines: list[str] = []
    with workspace.open_workspace(
        project, params=params, params_text=dump_yaml(params), experiment="odd", flow_run_id="run"
    ) as opened:
        assert opened.folder.name == project.name
        assert (opened.folder.parent / "other.txt").read_text() == "changed"
        assert not read_setup(opened.folder, recipe="digits").differences
        assert opened.reproduce(DOWNLOAD.name, on_line=lines.append) == "ran", lines
        opened.save(on_line=lines.append)
    [ref] = experiment_refs(project)
    assert ref.endswith("/odd")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///none.db")
    assert str(DOWNLOAD) in Sources(project).outputs(ref)
    assert list(tmp_path.iterdir()) == [tmp_path / SPECIAL_CHARS]
