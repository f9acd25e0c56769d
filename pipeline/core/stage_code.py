"""Read the stages from `dvc.yaml`, and the code of each stage: the files that decide what the stage writes.

DVC runs a stage again when one of these files changed. The checkpoint fingerprint and MLflow's tag `code.md5` are
hashes of the same files.
"""

import hashlib
from pathlib import Path

from pipeline.core.yaml import read_yaml

PACKAGE = "pipeline"
PROJECT = Path(__file__).resolve().parents[2]


def stage_names(*, project: Path = PROJECT) -> list[str]:
    """Return the names of the stages in the order of `dvc.yaml`, which is the order in which they run.

    Raises UserError where `dvc.yaml` is missing or cannot be read.
    """
    return list(read_yaml(project / "dvc.yaml")["stages"])


def code_files(stage: str, *, project: Path = PROJECT) -> list[Path]:
    """Return the Python files of a stage's code, relative to the project, in sorted order.

    They are the entries below `pipeline/` of the stage's `deps` in `dvc.yaml`; a folder stands for all its modules.
    Raises UserError where `dvc.yaml` is missing or cannot be read.
    """
    entries = [Path(entry) for entry in read_yaml(project / "dvc.yaml")["stages"][stage]["deps"]]
    code = [project / entry for entry in entries if entry.parts[0] == PACKAGE]
    files = {file for path in code for file in (path.rglob("*.py") if path.is_dir() else [path])}
    return sorted(file.relative_to(project) for file in files)


def code_md5(stage: str, *, project: Path = PROJECT) -> str:
    """Return one hash of the names and contents of a stage's code files."""
    digest = hashlib.md5(usedforsecurity=False)
    for file in code_files(stage, project=project):
        content = hashlib.md5((project / file).read_bytes(), usedforsecurity=False)
        digest.update(f"{content.hexdigest()}  {file}\n".encode())
    return digest.hexdigest()
