"""Find runs in MLflow, and read what was recorded with them; call `store.connect` first."""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException

from pipeline.core.processes import HOST, PID, ProcessState, process_state
from pipeline.tracking.experiments import NOT_FOUND_CODES
from pipeline.tracking.provenance import HIDDEN, REPRODUCES, tag_name
from pipeline.tracking.store import store_errors


@dataclass(frozen=True)
class Run:
    """A run as it is in MLflow; `started` and `ended` are in milliseconds since 1970.

    `tags` has hidden tags under the names that they have in `provenance.json`.
    """

    run_id: str
    name: str
    status: str
    started: int
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    experiment_id: str = ""
    ended: int | None = None

    @property
    def process_state(self) -> ProcessState:
        """Return whether the process that makes the run is alive or dead, as far as that can be known here."""
        return process_state(self.tags)

    @property
    def is_free(self) -> bool:
        """Return whether another process may write to the run: it has ended, or its process is dead."""
        return self.status != "RUNNING" or self.process_state == "dead"


def find_runs(tags: Mapping[str, str], *, status: str | None = None, with_deleted: bool = False) -> list[Run]:
    """Return the runs with all of these tags and this status, newest first; `%` in a tag matches any text.

    `with_deleted` includes the runs that are marked as deleted, which MLflow keeps until they are removed for good.
    """
    found: dict[str, Run] = {}
    # an earlier version did not hide tags: its runs have them under other names
    for named in {frozenset(tags.items()), frozenset((tag_name(name), value) for name, value in tags.items())}:
        conditions = [f"tags.`{name}` {'LIKE' if '%' in value else '='} {_quoted(value)}" for name, value in named]
        if status:
            conditions.append(f"attributes.status = '{status}'")
        found |= {run.run_id: run for run in _search(*conditions, with_deleted=with_deleted)}
    return sorted(found.values(), key=lambda run: run.started, reverse=True)


def find_runs_by_name(name: str) -> list[Run]:
    """Return the runs of this name, newest first; the name must not have both kinds of quotation marks."""
    return _search(f"attributes.run_name = {_quoted(name)}")


def _quoted(text: str) -> str:
    """Return text as a string in a query to MLflow, as of a folder `Bob's photos`."""
    return f'"{text}"' if "'" in text else f"'{text}'"


def find_runs_by_prefix(prefix: str) -> list[Run]:
    """Return the runs whose id starts with these hexadecimal digits, newest first."""
    return _search(f"attributes.run_id LIKE '{prefix}%'")


def _search(*conditions: str, with_deleted: bool = False) -> list[Run]:
    """Return the runs of all MLflow experiments that meet the conditions, newest first."""
    with store_errors():
        runs = mlflow.search_runs(
            search_all_experiments=True,
            filter_string=" and ".join(conditions),
            run_view_type=ViewType.ALL if with_deleted else ViewType.ACTIVE_ONLY,
            order_by=["attributes.start_time DESC"],
            output_format="list",
        )
    return [_as_run(run) for run in runs]


def find_run(run_id: str) -> Run | None:
    """Return the run with this id, or None."""
    with store_errors():
        try:
            return _as_run(MlflowClient().get_run(run_id))
        except MlflowException as error:
            if error.error_code in NOT_FOUND_CODES:
                return None
            raise


def _as_run(run: mlflow.entities.Run) -> Run:
    """Return the project's record of a run, made from the object that the MLflow client returns."""
    info, data = run.info, run.data
    hidden = {name.removeprefix(HIDDEN): value for name, value in data.tags.items() if name.startswith(HIDDEN)}
    return Run(
        info.run_id,
        info.run_name,
        info.status,
        info.start_time,
        {name: value for name, value in data.tags.items() if not name.startswith(HIDDEN)} | hidden,
        dict(data.params),
        dict(data.metrics),
        info.experiment_id,
        info.end_time,
    )


def find_runs_of_model(model_md5: str, *, reproduces: str | None = None) -> list[Run]:
    """Return the runs that made the model of this hash, newest first.

    Without `reproduces`, reproductions are left out; with it, only the reproductions of that run are returned.
    """
    return [run for run in find_runs({"model.md5": model_md5}) if run.tags.get(REPRODUCES) == reproduces]


def find_running() -> list[Run]:
    """Return the runs with status RUNNING whose tags name the process that makes them."""
    return find_runs({HOST: "%"}, status="RUNNING")


def mark_killed(run: Run) -> bool:
    """Set a run whose process is dead to KILLED, with the reason as a tag; return False where it has already ended."""
    reason = (
        f"process {run.tags[PID]} on {run.tags[HOST]} ended without ending the run; found at {time.strftime('%F %T%z')}"
    )
    with store_errors():
        client = MlflowClient()
        if client.get_run(run.run_id).info.status != "RUNNING":
            return False
        client.set_tag(run.run_id, "killed.reason", reason)
        client.set_terminated(run.run_id, "KILLED")
    return True


def read_file(run: Run, name: str) -> bytes | None:
    """Return the content of a file recorded with the run, or None where the run has no file of this name."""
    with store_errors():
        return read_artifact(run.run_id, name)


def read_artifact(run_id: str, name: str) -> bytes | None:
    """Return the content of an artifact, or None where the run has none of this name; raises MLflow's errors."""
    folder, _, _ = name.rpartition("/")
    if name not in {file.path for file in MlflowClient().list_artifacts(run_id, folder or None)}:
        return None
    with tempfile.TemporaryDirectory() as target:
        return Path(mlflow.artifacts.download_artifacts(f"runs:/{run_id}/{name}", dst_path=target)).read_bytes()
