"""Record a comparison as an MLflow run of its own, which made no model and is no training."""

from collections.abc import Mapping
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric

from pipeline.core.processes import this_process
from pipeline.tracking.experiments import experiment_id
from pipeline.tracking.provenance import COMPARISON, NOTE, SEARCHED_BY_PROGRAMS, tag_name
from pipeline.tracking.store import connect, store_errors
from pipeline.tracking.store_uri import check_recording, tracking_uri
from pipeline.tracking.views import ensure_results_view

FILE, PAGE = "comparison.json", "comparison.html"
METRICS = "compare/"  # prefix
PROGRAM = "python -m flows.compare"


def record_comparison(
    project: Path,
    *,
    experiment: str,
    name: str,
    verdict: str,
    description: str,
    metrics: Mapping[str, float],
    json_text: str,
    page: Path | None,
) -> tuple[str, str]:
    """Record a comparison in the MLflow experiment of a data set; return the ids of the run and of that experiment.

    `verdict`, the tag by which comparisons are searched, is of a few words; `description` is Markdown. The run has
    neither a model's hash nor a training's fingerprint, by which programs find the runs that made a model. Raises
    UserError or TemporaryError where the store cannot be reached.
    """
    connect(tracking_uri(project))
    check_recording(tracking_uri(project))
    tags = {COMPARISON: verdict, NOTE: description, "mlflow.source.name": PROGRAM, **_process_tags()}
    with store_errors():
        client = MlflowClient()
        info = client.create_run(experiment_id(experiment), run_name=name, tags=tags).info
        ensure_results_view(info.run_id)
        now = info.start_time
        client.log_batch(info.run_id, metrics=[Metric(f"{METRICS}{key}", one, now, 0) for key, one in metrics.items()])
        client.log_text(info.run_id, json_text, FILE)
        if page is not None:
            client.log_text(info.run_id, page.read_text(encoding="utf-8"), PAGE)
        client.set_terminated(info.run_id)
        return info.run_id, info.experiment_id


def _process_tags() -> dict[str, str]:
    """Return the tags by which the next training finds the run if this process is killed."""
    return {tag_name(name): value for name, value in this_process().items() if name in SEARCHED_BY_PROGRAMS}
