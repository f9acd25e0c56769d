"""A change outside the code of a stage does not run the stage again, and does not invalidate checkpoints."""

import shutil
from pathlib import Path

import pytest

from pipeline.core.stage_code import code_files, code_md5
from tests.conftest import PROJECT


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a folder with a copy of the pipeline's code and of `dvc.yaml`."""
    shutil.copytree(PROJECT / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "dvc.yaml", tmp_path)
    return tmp_path


@pytest.mark.parametrize("module", ["core/errors.py", "tracking/runs.py", "predict.py", "datasets/digits.py"])
def test_a_change_of_other_modules_does_not_change_the_code_of_the_training(project: Path, module: str) -> None:
    before = code_md5("train", project=project)
    with (project / "pipeline" / module).open("a") as file:
        file.write("# a comment\n")
    assert code_md5("train", project=project) == before


@pytest.mark.parametrize("module", ["training/loop.py", "models/lenet.py", "params.py", "train.py"])
def test_a_change_of_a_module_of_the_training_changes_its_code(project: Path, module: str) -> None:
    before = code_md5("train", project=project)
    with (project / "pipeline" / module).open("a") as file:
        file.write("# a comment\n")
    assert code_md5("train", project=project) != before


def test_a_new_or_renamed_module_changes_the_code_of_the_stage(project: Path) -> None:
    before = code_md5("train", project=project)
    (project / "pipeline/models/mlp.py").write_text("")
    added = code_md5("train", project=project)
    (project / "pipeline/models/mlp.py").rename(project / "pipeline/models/other.py")
    assert len({before, added, code_md5("train", project=project)}) == 3


def test_compiled_modules_do_not_change_the_code_of_the_stage(project: Path) -> None:
    before = code_files("train", project=project)
    (project / "pipeline/models/__pycache__").mkdir()
    (project / "pipeline/models/__pycache__/lenet.cpython-311.pyc").write_bytes(b"\x00")
    assert code_files("train", project=project) == before
