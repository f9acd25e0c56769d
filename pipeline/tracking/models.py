"""The model of a run: log it, fetch it, hash it."""

import importlib.metadata
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema
from mlflow.types.schema import DataType
from mlflow.utils import requirements_utils

from pipeline.artifacts import BEST_WEIGHTS, CHECKSUMS, file_md5, read_json
from pipeline.core.errors import UserError, first_line
from pipeline.tracking.model_code import packaged
from pipeline.tracking.store import connect

SERVED_PACKAGES = ("torch", "torchvision", "numpy", "pandas", "pydantic", "ruamel.yaml", "safetensors")
"""The packages that a served model imports; its requirements name the versions it was trained with."""


def log_model(folder: Path) -> None:
    """Record the model in the active run, for `mlflow.pyfunc.load_model` and `mlflow models serve`, without a pickle.

    Input: images (N, H, W, C) of whole numbers from 0 to 255. Output: a table with `predicted_class` and a column of
    probabilities for each class. The signature has no input: MLflow would cast to its type before the model sees that
    a value is a fraction, negative or too large.
    """
    values = read_json(folder / "model.json")
    size, channels = values["image_size"], values["channels"]
    probabilities = [ColSpec(DataType.double, name) for name in values["class_names"]]
    columns = [ColSpec(DataType.string, "predicted_class"), *probabilities]
    # MLflow asks for an example, which it would trace for half a minute
    with warnings.catch_warnings(), _without_list_of_modules(), packaged() as code:
        warnings.simplefilter("ignore", UserWarning)
        mlflow.pyfunc.log_model(
            name="model",
            python_model=str(code.entry),
            artifacts={
                "weights": str(folder / BEST_WEIGHTS),
                "config": str(folder / "model.json"),
                "checksums": str(folder / CHECKSUMS),  # `predict` verifies a fetched model by them
            },
            code_paths=[str(code.package)],
            signature=ModelSignature(outputs=Schema(list(columns))),
            metadata={"inputs": f"images (N, {size}, {size}, {channels}) of whole numbers from 0 to 255"},
            pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in (*SERVED_PACKAGES, "mlflow")],
        )


@contextmanager
def _without_list_of_modules() -> Iterator[None]:
    """Keep MLflow from listing the files of all installed packages, which takes 0.7 s.

    It needs that list to find the requirements of a model; those of ours are passed to it.
    """
    before = requirements_utils._MODULES_TO_PACKAGES
    requirements_utils._MODULES_TO_PACKAGES = {}  # type: ignore[assignment]
    try:
        yield
    finally:
        requirements_utils._MODULES_TO_PACKAGES = before


def has_model(run_id: str) -> bool:
    """Return whether the run has its model; what a killed process left of one is deleted."""
    client = MlflowClient()
    experiment = client.get_run(run_id).info.experiment_id
    models = client.search_logged_models([experiment], filter_string=f"source_run_id = '{run_id}'")
    for model in models:
        if model.status != LoggedModelStatus.READY:
            client.delete_logged_model(model.model_id)
    return any(model.status == LoggedModelStatus.READY for model in models)


def fetch_model(uri: str) -> Path:
    """Return the folder with the weights of a recorded model: `runs:/<run id>/model`, `models:/<name>/<version>`.

    Only weights and configuration are used of it; no code that lies beside them is run. Raises UserError where there is
    no such model.
    """
    connect()
    try:
        folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri))
    except (MlflowException, OSError) as error:
        raise UserError(
            f"--model {uri}: MLflow cannot provide it ({first_line(error)}); `make ui` shows the runs and their models"
        ) from None
    return next((path.parent for path in sorted(folder.rglob("model.json"))), folder)


def recorded_model_md5(run_id: str) -> str | None:
    """Return the MD5 of the weights that MLflow keeps of the run's model, or None where it keeps none."""
    with tempfile.TemporaryDirectory() as target:
        try:
            folder = mlflow.artifacts.download_artifacts(f"runs:/{run_id}/model", dst_path=target)
        except (MlflowException, OSError):
            return None
        return next((file_md5(path) for path in sorted(Path(folder).rglob(BEST_WEIGHTS))), None)
