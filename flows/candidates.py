"""Find the models that a text names, with their files in DVC's cache, for a comparison or a promotion.

A model is identified by the `dvc.lock` that made it: that of a DVC experiment, of a git commit or of the checkout. A
model that only MLflow knows is identified by the hashes that its run has recorded.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from flows.lineage import Sources
from pipeline.comparison.pairing import Candidate
from pipeline.core.errors import UserError

Split = Literal["test", "validation"]


@dataclass(frozen=True)
class Model:
    """A trained and evaluated model.

    `label` is its name for people. `commit` is the git commit whose `dvc.lock` made it, None where no commit has that
    file; `experiment` its DVC experiment and `run_id` its MLflow run, each None if unknown. `params` has the parameters
    of all stages by dotted name. `code_commit` is the commit that the training started from, and `is_dirty` whether
    code differed from it, both None if unknown. `stage_code` has the MD5 of each file and folder of the stages' code.
    `files` has the path in DVC's cache of each file below `artifacts/`, by its path in the project; the cache may lack
    a file. `test_md5` identifies the test split, None if unknown.
    """

    label: str
    model_md5: str
    commit: str | None
    experiment: str | None
    run_id: str | None
    params: Mapping[str, str]
    code_commit: str | None
    is_dirty: bool | None
    stage_code: Mapping[str, str]
    files: Mapping[str, Path]
    test_md5: str | None
    seed: str | None = None


@dataclass(frozen=True)
class Group:
    """What a text names: one model, or those of several seeds of a recipe (`is_recipe`), in the order of the seeds."""

    label: str
    models: tuple[Model, ...]
    is_recipe: bool = False


def find_models(project: Path, text: str, *, registered: str | None = None, sources: Sources | None = None) -> Group:
    """Return the models that a text names.

    `text` is an id or a name of an MLflow run, the name of a DVC experiment, a git commit, `.` or `HEAD` for the
    checkout, a registered version (`digits/3`, `models:/digits@champion`), or one of the aliases `champion`,
    `challenger` and `previous` of the registered model `registered`, by default of the only one. Raises UserError where
    the text names no model or several.
    """
    raise NotImplementedError


def candidate(model: Model, split: Split = "test") -> Candidate:
    """Return a model's predictions for a split, and the images of the split that it must not be compared on.

    Raises UserError where DVC's cache lacks one of the files, or the model was evaluated without them.
    """
    raise NotImplementedError


def file_of(model: Model, name: str) -> Path:
    """Return the path in DVC's cache of a model's file, such as `artifacts/normalize/dataset.json`.

    Raises UserError with the command that fetches or makes the file where it is missing.
    """
    raise NotImplementedError
