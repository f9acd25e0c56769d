"""MLflow experiments: which one a new run is in, and the folder where its artifacts are."""

import shlex
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Experiment, ViewType
from mlflow.exceptions import MlflowException

from pipeline.core.errors import UserError, redact_url
from pipeline.core.network import is_server
from pipeline.core.project import artifact_folder, project_folder
from pipeline.core.settings import get_settings
from pipeline.tracking.relocation import base_folder

NOT_FOUND = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}
"""MLflow's error codes for an id that does not exist, and for one that cannot exist."""


def experiment_id(name: str) -> str:
    """Return the id of the experiment `name`, or of the one that MLFLOW_EXPERIMENT_NAME or MLFLOW_EXPERIMENT_ID name.

    It is created where it does not exist, with its artifacts in the project if the store is local. Raises UserError
    where the two variables contradict each other, the experiment is deleted or its folder of artifacts is missing.
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
            "restores it, MLFLOW_EXPERIMENT_NAME=… takes another"
        )
    _check_artifact_folder(found)
    return str(found.experiment_id)


def _experiment_of_id(wanted: str) -> Experiment:
    try:
        return MlflowClient().get_experiment(wanted)
    except MlflowException as error:
        if error.error_code not in NOT_FOUND:
            raise
        raise UserError(
            f"MLFLOW_EXPERIMENT_ID: found {wanted!r}; allowed: the id of an experiment in "
            f"{redact_url(mlflow.get_tracking_uri())}, as `mlflow experiments search` lists them; correct or unset it"
        ) from None


def _create_experiment(name: str) -> str:
    client = MlflowClient()
    location = None if is_server(mlflow.get_tracking_uri()) else artifact_folder(project_folder()).as_uri()
    try:
        return client.create_experiment(name, artifact_location=location)
    except MlflowException:
        if found := client.get_experiment_by_name(name):  # another process has created it meanwhile
            return str(found.experiment_id)
        raise


def _check_artifact_folder(experiment: Experiment) -> None:
    """Raise UserError where the experiment has runs, but its folder of artifacts no longer exists.

    So it is after a project was moved, with a store outside it: it is unknown which of the paths there were its own.
    """
    folder = _missing_folder(experiment.artifact_location)
    if folder is None or not MlflowClient().search_runs([experiment.experiment_id], "", ViewType.ALL, max_results=1):
        return
    here = artifact_folder(project_folder())
    remedy = f"`mkdir -p {shlex.quote(str(folder))}` makes it again"
    if folder.name == here.name:
        parent, *link = (shlex.quote(str(path)) for path in (folder.parent, here, folder))
        remedy = f"`mkdir -p {parent} && ln -s {' '.join(link)}` links it to this project, old runs included"
    raise UserError(
        f"MLflow's experiment {experiment.name} keeps its artifacts in {folder}, which no longer exists; was the "
        f"project moved? {remedy}; MLFLOW_EXPERIMENT_NAME=… takes another experiment"
    )


def has_artifact_folder(run_id: str) -> bool:
    """Return whether the folder exists in which the run's experiment keeps its artifacts."""
    location = MlflowClient().get_run(run_id).info.artifact_uri  # …/<run id>/artifacts
    return _missing_folder(location.rstrip("/").rsplit("/", 2)[0]) is None


def _missing_folder(location: str) -> Path | None:
    """Return the local folder that a location of artifacts is in, where it does not exist, else None."""
    folder = None if is_server(mlflow.get_tracking_uri()) else base_folder(location)
    return None if folder is None or folder.exists() else folder
