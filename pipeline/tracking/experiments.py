"""Find or create the MLflow experiment of a new run, and check the folder of its artifacts."""

import shlex
from pathlib import Path
from typing import get_args

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Experiment, ViewType
from mlflow.exceptions import MlflowException

from pipeline.core.errors import UserError, redact_url
from pipeline.core.network import is_server
from pipeline.core.project import artifact_folder, project_folder
from pipeline.core.settings import get_settings
from pipeline.params import Dataset
from pipeline.tracking.relocation import base_folder
from pipeline.tracking.run_title import images_name

# MLflow's error codes for an id that does not exist, and for one that cannot exist
NOT_FOUND_CODES = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}


def experiment_name(dataset: str, *, folder: str) -> str:
    """Return the name of the experiment for a data set: that of the folder for the user's own images.

    A folder that is named like a built-in data set gives a name such as `digits (images)`, and a folder without a name
    gives that of the data set.
    """
    name = images_name(folder) if dataset == "imagefolder" else ""
    return f"{name} (images)" if name in get_args(Dataset) else name or dataset


def experiment_id(name: str) -> str:
    """Return the id of the experiment `name`, which is created where it does not exist.

    MLFLOW_EXPERIMENT_NAME or MLFLOW_EXPERIMENT_ID replaces `name`. In a local store, a new experiment has its artifacts
    in the project. Raises UserError where the two variables contradict each other, the experiment is deleted, or the
    folder of its artifacts is missing.
    """
    settings = get_settings()
    chosen, chosen_id = settings.mlflow_experiment_name, settings.mlflow_experiment_id
    name = chosen or name
    found = _experiment_of_id(chosen_id) if chosen_id else MlflowClient().get_experiment_by_name(name)
    if found is None:
        return _create_experiment(name)
    if chosen and found.name != chosen:
        raise UserError(
            f"MLFLOW_EXPERIMENT_ID: found {chosen_id}, the experiment {found.name}, but MLFLOW_EXPERIMENT_NAME is "
            f"{chosen}; allowed: one of the two, or both of one experiment; unset one"
        )
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"MLflow's experiment {found.name} is deleted; `mlflow experiments restore -x {found.experiment_id}` "
            "restores it, MLFLOW_EXPERIMENT_NAME=… records into another experiment"
        )
    _check_artifact_folder(found)
    return str(found.experiment_id)


def _experiment_of_id(wanted: str) -> Experiment:
    """Return the experiment of this id; raise UserError where there is none."""
    try:
        return MlflowClient().get_experiment(wanted)
    except MlflowException as error:
        if error.error_code not in NOT_FOUND_CODES:
            raise
        raise UserError(
            f"MLFLOW_EXPERIMENT_ID: found {wanted!r}; allowed: the id of an experiment in "
            f"{redact_url(mlflow.get_tracking_uri())}, as `mlflow experiments search` lists them; correct or unset it"
        ) from None


def _create_experiment(name: str) -> str:
    """Create the experiment, unless another process has just done so; return its id."""
    client = MlflowClient()
    location = None if is_server(mlflow.get_tracking_uri()) else artifact_folder(project_folder()).as_uri()
    try:
        return client.create_experiment(name, artifact_location=location)
    except MlflowException:
        if found := client.get_experiment_by_name(name):  # another process has just created it
            return str(found.experiment_id)
        raise


def _check_artifact_folder(experiment: Experiment) -> None:
    """Raise UserError where the experiment has runs, but its folder of artifacts no longer exists.

    That is the case after a project was moved whose store is outside it: `relocate` does not correct such a store,
    since it does not know which of the paths in it belong to the project.
    """
    folder = _missing_folder(experiment.artifact_location)
    if folder is None or not MlflowClient().search_runs([experiment.experiment_id], "", ViewType.ALL, max_results=1):
        return
    remedy = f"`mkdir -p {shlex.quote(str(folder))}` makes it again"
    own_folder = artifact_folder(project_folder())
    if folder.name == own_folder.name:
        parent, target, link = (shlex.quote(str(path)) for path in (folder.parent, own_folder, folder))
        remedy = f"`mkdir -p {parent} && ln -s {target} {link}` links it to this project, old runs included"
    raise UserError(
        f"MLflow's experiment {experiment.name} keeps its artifacts in {folder}, which no longer exists; was the "
        f"project moved? {remedy}; MLFLOW_EXPERIMENT_NAME=… records into another experiment"
    )


def has_artifact_folder(run_id: str) -> bool:
    """Return whether the folder exists that has the artifacts of the run's experiment."""
    location = MlflowClient().get_run(run_id).info.artifact_uri  # …/<run id>/artifacts
    return _missing_folder(location.rstrip("/").rsplit("/", 2)[0]) is None


def _missing_folder(location: str) -> Path | None:
    """Return the local folder of a location of artifacts if that folder does not exist, else None."""
    folder = None if is_server(mlflow.get_tracking_uri()) else base_folder(location)
    return None if folder is None or folder.exists() else folder
