"""Record the model of a run in MLflow, download it, or return its hash."""

import importlib.metadata
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import DataType
from mlflow.utils import requirements_utils

from pipeline.artifacts import BEST_WEIGHTS, CHECKSUMS, file_md5, read_json
from pipeline.core.errors import UserError, first_line
from pipeline.models.names import TIMM_PREFIX
from pipeline.tracking.model_code import renamed_package
from pipeline.tracking.store import connect

# A served model imports these packages; its requirements name the versions with which it was trained.
SERVED_PACKAGES = ("torch", "torchvision", "numpy", "pandas", "pydantic", "ruamel.yaml", "safetensors", "mlflow")
# MLflow links all metrics of a model's step to it: at step 0 those of the untrained network and the use of the CPU
NO_STEP = -1


def log_model(folder: Path) -> None:
    """Record the model in the active run, for `mlflow.pyfunc.load_model` and `mlflow models serve`, without a pickle.

    Input: images (N, H, W, C) of whole numbers from 0 to 255. Output: a table with `predicted_class` and a column of
    probabilities for each class. The optional parameter `coverage` makes the predicted class "unknown" where its
    probability is below the threshold of the model. The signature leaves the input out: MLflow would cast the values to
    its type, and the model could no longer refuse fractions, negative and too large values.
    """
    values = read_json(folder / "model.json")
    size, channels = values["image_size"], values["channels"]
    probabilities = [ColSpec(DataType.double, name) for name in values["class_names"]]
    columns = [ColSpec(DataType.string, "predicted_class"), *probabilities]
    coverage = ParamSchema([ParamSpec("coverage", DataType.double, default=None)])
    # MLflow warns that there is no example of the input, with which it would trace the model for half a minute
    with warnings.catch_warnings(), _without_list_of_modules(), renamed_package() as code:
        warnings.simplefilter("ignore", UserWarning)
        mlflow.pyfunc.log_model(
            name="model",
            step=NO_STEP,
            python_model=str(code.entry),
            artifacts={
                "weights": str(folder / BEST_WEIGHTS),
                "config": str(folder / "model.json"),
                "checksums": str(folder / CHECKSUMS),  # `predict` verifies a fetched model by them
            },
            code_paths=[str(code.package)],
            signature=ModelSignature(outputs=Schema(list(columns)), params=coverage),
            metadata={"inputs": f"images (N, {size}, {size}, {channels}) of whole numbers from 0 to 255"},
            pip_requirements=_requirements(values["model"]),
        )


def _requirements(model: str) -> list[str]:
    """Return the packages that a network of this name needs where it is served, as in `torch==2.11.0`."""
    packages = (*SERVED_PACKAGES, "timm") if model.startswith(TIMM_PREFIX) else SERVED_PACKAGES
    return [f"{name}=={importlib.metadata.version(name)}" for name in packages]


@contextmanager
def _without_list_of_modules() -> Iterator[None]:
    """Stop MLflow from listing the files of all installed packages, which takes 0.7 s.

    MLflow uses that list to find the requirements of a model, but `log_model` passes the requirements itself.
    """
    before = requirements_utils._MODULES_TO_PACKAGES
    requirements_utils._MODULES_TO_PACKAGES = {}  # type: ignore[assignment]
    try:
        yield
    finally:
        requirements_utils._MODULES_TO_PACKAGES = before


def find_model(run_id: str) -> str | None:
    """Return the id of the run's complete model, or None where the run has none."""
    return next((model.model_id for model in _models(run_id) if model.status == LoggedModelStatus.READY), None)


def delete_incomplete_models(run_id: str) -> None:
    """Delete the models of the run whose upload a killed process did not finish."""
    for model in _models(run_id):
        if model.status != LoggedModelStatus.READY:
            MlflowClient().delete_logged_model(model.model_id)


def ensure_model(run_id: str, folder: Path) -> None:
    """Record the model in a run that has none, as of a model that was pulled; status and end of the run stay."""
    if find_model(run_id):
        return
    delete_incomplete_models(run_id)
    info = MlflowClient().get_run(run_id).info
    with mlflow.start_run(run_id=run_id, log_system_metrics=False):
        log_model(folder)
    MlflowClient().set_terminated(run_id, info.status, info.end_time)


def _models(run_id: str) -> list[LoggedModel]:
    """Return the models of the run, complete or not."""
    client = MlflowClient()
    experiment = client.get_run(run_id).info.experiment_id
    return list(client.search_logged_models([experiment], filter_string=f"source_run_id = '{run_id}'"))


def fetch_model(uri: str, *, target: Path | None = None) -> Path:
    """Download a recorded model, into `target` if it is given; return the folder with its weights and configuration.

    `uri` is `runs:/<run id>/model`, `models:/<name>/<version>` or `models:/<name>@<alias>`. No code from the model is
    run. Raises UserError where there is no such model.
    """
    connect()
    try:
        folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(target) if target else None))
    except (MlflowException, OSError) as error:
        raise UserError(
            f"--model {uri}: MLflow cannot provide it ({first_line(error)}); `make ui` shows the runs and their models"
        ) from None
    return next((path.parent for path in sorted(folder.rglob("model.json"))), folder)


def recorded_model_md5(run_id: str) -> str | None:
    """Return the MD5 of the weights of the model recorded with the run, or None where there is none."""
    with tempfile.TemporaryDirectory() as target:
        try:
            folder = mlflow.artifacts.download_artifacts(f"runs:/{run_id}/model", dst_path=target)
        except (MlflowException, OSError):
            return None
        return next((file_md5(path) for path in sorted(Path(folder).rglob(BEST_WEIGHTS))), None)
