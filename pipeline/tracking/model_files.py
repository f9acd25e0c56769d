"""Find the files of the model that a user names: a folder, a weights file, or a model in MLflow."""

import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifacts import BEST_WEIGHTS, CHECKSUMS, TRAIN, expand, file_md5, missing_file_message, verify
from pipeline.core.errors import UserError

WEIGHTS_SUFFIX = ".safetensors"
_RUN_ID = re.compile(r"[0-9a-f]{6,32}")
_URI = re.compile(r"runs:/[^/]+/.*[^/]|models:/[^/@]+(/[^/@]+|@[^/@]+)|models:/m-[0-9a-f]+")  # what MLflow is asked for
MAX_LISTED = 8


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model: `folder` has `model.json` and `<checkpoint>.safetensors`.

    `label` is the name by which the user asked for it, and `weights_md5` the MD5 of the weights file.
    """

    label: str
    folder: Path
    checkpoint: str
    weights_md5: str


def find_model_files(text: str | None = None, *, target: Path | None = None) -> ModelFiles:
    """Return the files of the model that a text names, by default those in `artifacts/train/`.

    The text is a folder, a `.safetensors` file with `model.json` beside it, `runs:/RUN_ID/model`,
    `models:/NAME/VERSION`, `models:/NAME@ALIAS`, the id, its first digits (6 or more) or the name of an MLflow run, or
    the name of a DVC experiment, as `make run` prints it. An existing folder or file has precedence over a run of the
    same name. A model in MLflow is copied into the folder `target` if one is given; without it, the files stay where
    MLflow has them, or in a temporary folder. Raises UserError where there is no such model, where a name is that of
    several models, or where a file was changed since it was written.
    """
    folder, checkpoint = _locate(text, target=target)
    if folder == TRAIN and not folder.is_dir():
        raise UserError(
            f"{TRAIN}: no such folder: this checkout has no model; run `dvc exp apply NAME` for the model of a flow "
            "run, `dvc checkout` for that of the commit, or name one with --model runs:/RUN_ID/model"
        )
    weights = f"{checkpoint}{WEIGHTS_SUFFIX}"
    if folder == TRAIN or (folder / CHECKSUMS).exists():  # another folder without checksums is not verified
        verify(folder, ["model.json", weights], allow_unlisted=folder != TRAIN)
    try:
        weights_md5 = file_md5(folder / weights)
    except FileNotFoundError:
        raise UserError(missing_file_message(folder / weights)) from None
    return ModelFiles(text or str(TRAIN), folder, checkpoint, weights_md5)


def _locate(text: str | None, *, target: Path | None) -> tuple[Path, str]:
    """Return the folder of the model that a text names, and the name of its checkpoint."""
    best = BEST_WEIGHTS.removesuffix(WEIGHTS_SUFFIX)
    if text is None:
        return TRAIN, best
    if ":/" in text:
        if not _URI.fullmatch(text):
            raise _unknown(text, "no address of a model in MLflow")
        return _fetch(text, target=target), best
    path = expand(text)
    if path.is_file():
        if path.suffix != WEIGHTS_SUFFIX:
            raise UserError(
                f"--model {text}: found a {path.suffix or 'plain'} file; allowed: a {WEIGHTS_SUFFIX} file with "
                "model.json beside it, or their folder"
            )
        return path.parent, path.stem
    if path.is_dir() or len(path.parts) != 1:
        return path, best
    return _fetch(f"runs:/{_find_run(text)}/model", target=target), best


def _find_run(text: str) -> str:
    """Return the id of the MLflow run with this id, name or DVC experiment; raises UserError for none, or several."""
    from pipeline.tracking import search  # noqa: PLC0415  # MLflow takes seconds to import
    from pipeline.tracking.provenance import EXPERIMENT  # noqa: PLC0415  # MLflow takes seconds to import
    from pipeline.tracking.store import connect  # noqa: PLC0415  # MLflow takes seconds to import

    connect()
    found = search.find_runs_by_prefix(text) if _RUN_ID.fullmatch(text) else []
    if not {"'", '"'} <= set(text):  # a query can have only one of these
        found = found or search.find_runs_by_name(text)
        found = found or (search.find_runs({EXPERIMENT: text}) if "%" not in text else [])
    models = {run.tags.get("model.md5", ""): run for run in reversed(found) if run.tags.get("model.md5")}
    if len(models) > 1:
        listed = ", ".join(f"{run.run_id[:12]} ({run.name})" for run in list(models.values())[:MAX_LISTED])
        raise UserError(f"--model {text}: names {len(models)} models; allowed: the name of one; name one of {listed}")
    if not models:
        state = (
            f"{len(found)} runs without a model"
            if found
            else "no folder, file, MLflow run or DVC experiment of this name"
        )
        raise _unknown(text, state)
    return next(iter(models.values())).run_id


def _unknown(text: str, found: str) -> UserError:
    """Return the error for a text that names no model."""
    return UserError(
        f"--model {text}: {found}; allowed: a folder, a {WEIGHTS_SUFFIX} file, runs:/RUN_ID/model, "
        "models:/NAME/VERSION, models:/NAME@ALIAS, the id or name of a run, or the name of a DVC experiment; "
        "`make ui` shows the runs and their models"
    )


def _fetch(uri: str, *, target: Path | None) -> Path:
    """Return the folder with a model that MLflow has recorded."""
    from pipeline.tracking.models import fetch_model  # noqa: PLC0415  # MLflow takes seconds to import

    return fetch_model(uri, target=target)
