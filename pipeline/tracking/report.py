"""Read from MLflow what the report states about the run that made a model, and keep the report with that run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient

from pipeline.core.errors import UserError
from pipeline.core.network import is_server
from pipeline.core.project import project_folder
from pipeline.core.settings import get_settings
from pipeline.core.sqlite import sqlite_path
from pipeline.tracking.provenance import COMMIT, HARDWARE
from pipeline.tracking.search import Run, find_runs_of_model
from pipeline.tracking.store import connect, store_errors
from pipeline.tracking.store_uri import tracking_uri


@dataclass(frozen=True)
class RecordedRun:
    """The run that made a model, as MLflow has it.

    What is unknown is empty or, for `seconds`, from the start to the end of the run, None. `link` is its page on an
    MLflow server; a store without a server has none.
    """

    run_id: str
    name: str
    commit: str
    is_dirty: str  # `true`, `false` or `unknown`
    seconds: float | None
    hardware: Mapping[str, str]
    link: str


def find_recorded_run(model_md5: str) -> RecordedRun | None:
    """Return the newest run that made the model of this hash, or None; a missing database is not created.

    Raises UserError or TemporaryError where the store cannot be reached.
    """
    uri = tracking_uri(project_folder())
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        raise UserError(f"{path}: no such file")
    connect(uri)
    runs = find_runs_of_model(model_md5, reproduces=get_settings().reproduces)
    if not runs:
        return None
    run = runs[0]
    with store_errors():
        info = MlflowClient().get_run(run.run_id).info
    return RecordedRun(
        run.run_id,
        run.name,
        commit=run.tags.get(COMMIT, ""),
        is_dirty=run.tags.get("git.dirty", ""),
        seconds=(info.end_time - info.start_time) / 1000 if info.end_time else None,
        hardware=_hardware(run),
        link=f"{uri.rstrip('/')}/#/experiments/{info.experiment_id}/runs/{run.run_id}?workflowType=machine_learning"
        if is_server(uri) and "@" not in uri
        else "",
    )


def _hardware(run: Run) -> dict[str, str]:
    """Return the hardware of the training by part, such as `cpu` and `gpu`."""
    return {name.removeprefix(HARDWARE): value for name, value in run.tags.items() if name.startswith(HARDWARE)}


def log_report(run_id: str, path: Path) -> None:
    """Record the report with the run, as `report.html` in its artifacts; it replaces an earlier one.

    Raises UserError or TemporaryError where the store cannot be reached.
    """
    with store_errors():
        MlflowClient().log_text(run_id, path.read_text(encoding="utf-8"), "report.html")
