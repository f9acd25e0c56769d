"""Remove runs for good, with their models, files and registered versions; `store.connect` comes first.

MLflow's own deletion only marks a run. `mlflow gc`, which removes for good, also removes every experiment that anyone
has marked as deleted, so the store's functions that it calls are called here.
"""

import functools
import shutil
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LifecycleStage
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.utils.file_utils import local_file_uri_to_path

from pipeline.core.network import is_server
from pipeline.core.processes import HOST
from pipeline.core.project import artifact_folder
from pipeline.core.sqlite import sqlite_path
from pipeline.tracking.outbox import queued_runs
from pipeline.tracking.provenance import PROJECT
from pipeline.tracking.search import Run
from pipeline.tracking.store import store_errors

KEEP = "keep"  # a tag, of any value, of a run or a registered version that is never to be removed
STAGES_IN_USE = ("Staging", "Production")
PAGE_SIZE = 1000


@dataclass(frozen=True)
class Version:
    """A version of a registered model; `use` is why it is in use, as "has the alias champion", or empty."""

    name: str
    version: str
    run_id: str
    source: str
    use: str

    def __str__(self) -> str:
        return f"{self.name} version {self.version}"


@dataclass(frozen=True)
class StoredRun:
    """A run with all that goes with it: registered versions, and models by id.

    `folders` has the artifacts of the run and of its models; it is empty where a server keeps them.
    """

    run: Run
    versions: tuple[Version, ...]
    model_ids: tuple[str, ...]
    folders: tuple[Path, ...]


def registered_versions() -> list[Version]:
    """Return the versions of all registered models."""
    client, found = MlflowClient(), []
    with store_errors():
        aliases = dict(_aliases(client))
        token = None
        while True:
            page = client.search_model_versions(max_results=PAGE_SIZE, page_token=token)
            for one in page:
                named = sorted({*aliases.get((one.name, str(one.version)), []), *(one.aliases or [])})
                use = f"has the alias {', '.join(named)}" if named else ""
                use = use or ("has the tag keep" if KEEP in one.tags else "")
                use = use or (f"is in {one.current_stage}" if one.current_stage in STAGES_IN_USE else "")
                found.append(Version(one.name, str(one.version), one.run_id or "", one.source or "", use))
            token = page.token
            if not token:
                return found


def _aliases(client: MlflowClient) -> Iterator[tuple[tuple[str, str], list[str]]]:
    """Yield (name, version) of each registered version that has aliases, and its aliases."""
    token = None
    while True:
        page = client.search_registered_models(max_results=PAGE_SIZE, page_token=token)
        for model in page:
            for version in set(map(str, model.aliases.values())):
                yield (model.name, version), [name for name, of in model.aliases.items() if str(of) == version]
        token = page.token
        if not token:
            return


def read_stored_run(run: Run, *, versions: Sequence[Version]) -> StoredRun:
    """Return the run with all that goes with it, what is marked as deleted included."""
    with store_errors():
        info = MlflowClient().get_run(run.run_id).info
        models = dict(_models(run.run_id, info.experiment_id))
    ids = (run.run_id, *models)
    own = tuple(one for one in versions if one.run_id == run.run_id or any(name in one.source for name in ids))
    locations = {} if is_server(mlflow.get_tracking_uri()) else {run.run_id: info.artifact_uri, **models}
    return StoredRun(run, own, tuple(models), tuple(_folder(place, owner) for owner, place in locations.items()))


def _models(run_id: str, experiment_id: str) -> Iterator[tuple[str, str]]:
    """Yield id and artifact URI of each model that the run has logged.

    In a database this includes the models that are marked as deleted; an MLflow server does not list these.
    """
    condition, token = f"source_run_id = '{run_id}'", None
    while True:
        page = MlflowClient().search_logged_models([experiment_id], filter_string=condition, page_token=token)
        yield from ((model.model_id, model.artifact_location) for model in page)
        token = page.token
        if not token:
            break
    if not is_server(mlflow.get_tracking_uri()):
        store = _database()
        for model_id in store._get_deleted_logged_models():  # type: ignore[no-untyped-call]
            model = store.get_logged_model(model_id, allow_deleted=True)
            if model.source_run_id == run_id:
                yield model_id, model.artifact_location


def _folder(location: str, owner: str) -> Path:
    """Return the local folder of the run or model `owner`; a relative path where it has no such folder."""
    if location.startswith(("file:", "/")):
        folder = Path(local_file_uri_to_path(location)).parent  # type: ignore[no-untyped-call]  # …/<id>/artifacts
        if folder.name == owner:
            return folder
    return Path(location)


def reason_in_use(stored: StoredRun) -> str:
    """Return the reason why the run is in use and all that belongs to it must stay, or an empty text."""
    used = next((f"its model is {one}, which {one.use}" for one in stored.versions if one.use), "")
    if not used and KEEP in stored.run.tags:
        used = "it has the tag keep"
    if not used and not stored.run.is_free:
        used = "it is RUNNING"
    if not used and stored.run.run_id in {path.parent.name for path in queued_runs()}:
        used = "it has results that MLflow has not received (`python -m flows.doctor --fix`)"
    return used


def reason_not_ours(stored: StoredRun, project: Path, *, is_orphan: bool) -> str:
    """Return the reason why the run, or its files, may belong to another project, or an empty text.

    Tags with another host or project are a reason in every store: other machines write into this one through a server.
    A run without these tags is of this project only in its own sqlite file, and where `is_orphan`, that its experiment
    is not known here, is False.
    """
    project, uri, tags = project.resolve(), mlflow.get_tracking_uri(), stored.run.tags
    here = {HOST: socket.gethostname(), PROJECT: str(project)}
    path = sqlite_path(uri)
    is_own_store = path is not None and path.resolve().is_relative_to(project)
    untagged = here if is_own_store and not is_orphan else {}
    if any(tags.get(name, untagged.get(name)) != value for name, value in here.items()):
        recorder = ":".join(tags.get(name, "not recorded") for name in here)
        return f"it is not certain that this project made it, since it was recorded by {recorder}"
    if is_server(uri):
        return ""
    root = artifact_folder(project).resolve()
    outside = [folder for folder in stored.folders if not folder.resolve().is_relative_to(root)]
    return f"its files are in {outside[0]}, not in {root.name} here" if outside else ""


def remove_run(stored: StoredRun) -> None:
    """Remove the run with its versions, models and files; on a server, mark it as deleted.

    If this process is killed, the run stays marked as deleted, since its row is deleted last; a second call completes
    the removal.
    """
    client, run_id = MlflowClient(), stored.run.run_id
    with store_errors():
        for version in stored.versions:
            client.delete_model_version(version.name, version.version)
        experiment_id = client.get_run(run_id).info.experiment_id
        for model in client.search_logged_models([experiment_id], filter_string=f"source_run_id = '{run_id}'"):
            client.delete_logged_model(model.model_id)
        if client.get_run(run_id).info.lifecycle_stage == LifecycleStage.ACTIVE:
            client.delete_run(run_id)
        if is_server(mlflow.get_tracking_uri()):
            return
        store = _database()
        for folder in stored.folders:
            if folder.exists():
                shutil.rmtree(folder)
        for model_id in stored.model_ids:
            store._hard_delete_logged_model(model_id)  # type: ignore[no-untyped-call]
        store._hard_delete_run(run_id)  # type: ignore[no-untyped-call]


def _database() -> SqlAlchemyStore:
    return _open(mlflow.get_tracking_uri())


@functools.cache
def _open(uri: str) -> SqlAlchemyStore:
    return SqlAlchemyStore(uri, "")  # type: ignore[no-untyped-call]
