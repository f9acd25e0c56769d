"""A recorded commit is reproduced although its folder of images is deleted, if DVC has kept the raw data."""

import shutil
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

import pytest
from dvc.repo import Repo

from flows import reproduce
from flows.dvc_state import outputs
from pipeline.artifacts import DOWNLOAD, NORMALIZE
from pipeline.core.errors import UserError
from pipeline.core.git import git
from pipeline.tracking.provenance import COMMIT
from pipeline.tracking.search import Run
from tests.conftest import PROJECT, start_repository

pytestmark = pytest.mark.slow
DVC_YAML = """\
stages:
  download:
    cmd: mkdir -p artifacts && cp -r "${download.folder}" artifacts/download
    deps: ["${download.folder}"]
    outs: [artifacts/download]
  normalize:
    cmd: mkdir -p artifacts && cp -r artifacts/download artifacts/normalize
    deps: [artifacts/download]
    outs: [artifacts/normalize]
"""


@pytest.fixture
def project(tmp_path: Path, stores: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Change to a project that was run and committed with images of a folder that is then deleted, and yield it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    folder, images = tmp_path / "project", tmp_path / "photos"
    for path in (folder, images / "cats"):
        path.mkdir(parents=True)
    (images / "cats/1.png").write_text("an image")
    (folder / "params.yaml").write_text(
        f"download: {{folder: {images}, urls: [https://localhost/x]}}\ntrain: {{weights: null}}\n"
    )
    (folder / "dvc.yaml").write_text(DVC_YAML)
    (folder / ".gitignore").write_text("/artifacts\n/mlflow.db\n")
    git(folder, "init", "-q")
    Repo.init(str(folder)).close()
    with chdir(folder), Repo(str(folder)) as repo:
        repo.reproduce()
    start_repository(folder)
    shutil.copy(stores / "mlflow.db", folder)
    monkeypatch.chdir(folder)
    (images / "cats/1.png").unlink()
    (images / "cats").rmdir()
    images.rmdir()
    yield folder
    assert not images.exists()


@pytest.fixture
def run(project: Path) -> Run:
    made = outputs((project / "dvc.lock").read_text())
    tags = {f"dvc.{path.name}": made[str(path)] for path in (DOWNLOAD, NORMALIZE)}
    tags |= {COMMIT: git(project, "rev-parse", "HEAD"), "git.dirty": "false"}
    return Run("1" * 32, "run", "", 0, tags, {}, {})


def test_a_run_is_reproduced_from_the_raw_data_that_dvc_has_kept(
    project: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduce, "STAGES", (DOWNLOAD, NORMALIZE))
    result = reproduce.reproduce(project, run, from_cache=False, keep=False)
    assert [stage.differences for stage in result.stages] == [(), ()]
    assert "restored from DVC's cache" in str(result.stages[0])


def test_the_deleted_folder_is_reported_if_dvc_has_not_kept_the_raw_data(project: Path, run: Run) -> None:
    lost = replace(run, tags={**run.tags, "dvc.download": "0" * 32 + ".dir"})
    with pytest.raises(UserError, match=r"^download.folder: '.*/photos' does not exist; allowed: <class>/… or"):
        reproduce.reproduce(project, lost, from_cache=False, keep=False)
