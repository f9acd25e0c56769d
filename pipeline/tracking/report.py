"""Read from MLflow what the report states about the run that made a model, and keep the report with that run."""

from pathlib import Path

from mlflow import MlflowClient

from pipeline.core.errors import UserError
from pipeline.core.network import is_server
from pipeline.core.project import project_folder
from pipeline.core.settings import get_settings
from pipeline.core.sqlite import sqlite_path
from pipeline.tracking.description import REPORT_KEY
from pipeline.tracking.links import REPORT
from pipeline.tracking.logger import RunLogger
from pipeline.tracking.provenance_file import Provenance, provenance_of
from pipeline.tracking.search import find_runs_of_model
from pipeline.tracking.store import connect, store_errors
from pipeline.tracking.store_uri import tracking_uri


def find_recorded_run(model_md5: str) -> Provenance | None:
    """Return what MLflow knows of the newest run that made the model of this hash, or None.

    A missing database is not created. Raises UserError or TemporaryError where the store cannot be reached.
    """
    uri = tracking_uri(project_folder())
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        raise UserError(f"{path}: no such file")
    connect(uri)
    runs = find_runs_of_model(model_md5, reproduces=get_settings().reproduces)
    return provenance_of(runs[0]) if runs else None


def link_of(run: Provenance) -> str:
    """Return the address of the run's page on an MLflow server; empty where the store is a file, or has a password."""
    uri = tracking_uri(project_folder())
    return f"{uri.rstrip('/')}/{run.page}" if is_server(uri) and "@" not in uri else ""


def log_report(run_id: str, path: Path) -> None:
    """Record the report with the run, as `report.html` in its artifacts; the run's description then links it.

    It replaces an earlier one.

    Raises UserError or TemporaryError where the store cannot be reached.
    """
    with store_errors():
        MlflowClient().log_text(run_id, path.read_text(encoding="utf-8"), REPORT)
        RunLogger(run_id).record({REPORT_KEY: REPORT})
