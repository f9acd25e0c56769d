"""Start, resume and end the MLflow run of a training; find or create the run that an evaluation is recorded in.

A run ends as FINISHED, FAILED (after an exception) or KILLED (after SIGTERM or Ctrl-C). Where SIGKILL ended the
process, the next training sets its run to KILLED.
"""

import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.dataset_source import DatasetSource
from mlflow.data.dataset_source_registry import resolve_dataset_source
from mlflow.data.meta_dataset import MetaDataset
from mlflow.exceptions import MlflowException

from pipeline.core.processes import this_process
from pipeline.core.project import project_folder
from pipeline.core.settings import get_settings
from pipeline.tracking.experiments import experiment_id, has_artifact_folder
from pipeline.tracking.logger import RunLogger, pending_metrics
from pipeline.tracking.outbox import flush_outbox, queue_run
from pipeline.tracking.provenance import (
    PROJECT,
    TAGS_OF_ONE_PROCESS,
    TRAINING,
    environment_files,
    find_code_state,
    flow_run_tags,
    hardware_values,
    inputs,
    origin,
    parent_tags,
    source_tags,
    tags_of,
)
from pipeline.tracking.provenance_file import start_provenance
from pipeline.tracking.run_title import RunSetup
from pipeline.tracking.search import find_running, find_runs, find_runs_of_model, mark_killed
from pipeline.tracking.store import connect, shorten_timeout, store_errors, warn_on_failure
from pipeline.tracking.store_uri import check_recording
from pipeline.tracking.views import ensure_results_view


@contextmanager
def training_run(
    *,
    experiment: str,
    params: Mapping[str, Any],
    dataset: MetaDataset,
    training: str,
    setup: RunSetup | None = None,
    hardware: Mapping[str, str] = {},
    checkpointed: Mapping[str, Any] | None = None,
) -> Iterator[RunLogger]:
    """Log a training to an MLflow run, with its parameters, data set, origin, hardware and system metrics.

    The run is resumed where `checkpointed`, the `RunLogger.state` in the training's checkpoint, names one, or where the
    training with the fingerprint `training` has an unfinished one; else it is new, and named after `setup`. Raises
    UserError or TemporaryError where the store cannot be reached.
    """
    _connect_to_record()
    code = find_code_state()
    with store_errors():
        run = _resume_run(training, checkpointed=checkpointed) or create_run(experiment, training=training, setup=setup)
        _mark_dead_runs(except_id=run.run_id)
        ensure_results_view(run.run_id)
    status = "FAILED"
    try:
        with store_errors():
            mlflow.start_run(run_id=run.run_id, log_system_metrics=False)  # `start_system_metrics` starts it later
            run.log_params(params)
            _log_dataset(dataset)
            values = {
                TRAINING: training,
                **origin(code, setup=setup),
                "data.md5": dataset.digest,
                **inputs(params),
                **hardware_values(hardware),
            }
            if run.resumed:
                run.delete_tags({*TAGS_OF_ONE_PROCESS, *values})  # an earlier version had all values as tags
            start_provenance(run.run_id, values)
            run.set_tags(source_tags(code) | tags_of(values) | flow_run_tags() | parent_tags())
            run.describe()
            _log_environment(run, code.difference or b"")
        with run.sending():
            yield run
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        shorten_timeout()
        raise
    finally:
        _end_run(run, status)


def find_or_create_run(model_md5: str, *, experiment: str, setup: RunSetup | None = None) -> tuple[RunLogger, bool]:
    """Return the newest run that made the model of this hash, and whether it was created because there was none.

    A new run is named after `setup`. A flow run that has a cache hit for the model adds its own id to the run as a tag.
    A reproduction finds only runs of the same reproduction. Raises UserError or TemporaryError where the store cannot
    be reached.
    """
    _connect_to_record()
    found = find_runs_of_model(model_md5, reproduces=get_settings().reproduces)
    with store_errors():
        if found and has_artifact_folder(found[0].run_id):
            run = RunLogger(found[0].run_id, experiment_id=found[0].experiment_id)
            run.set_tags(flow_run_tags())
            return run, False
        code = find_code_state()
        values = origin(code, setup=setup) | {"model.md5": model_md5}
        tags = source_tags(code) | tags_of(values) | flow_run_tags()
        run = _new_run(experiment, setup=setup, tags=tags)
        MlflowClient().set_terminated(run.run_id)
        run.record(values)
        return run, True


def describe_dataset(name: str, *, source: str | None, digest: str) -> MetaDataset:
    """Return the data set as MLflow records it; `source` is a URL or a folder, None for data from a package."""
    with warnings.catch_warnings():  # MLflow finds two names for the same kind of folder
        warnings.simplefilter("ignore", UserWarning)
        origin: DatasetSource = CodeDatasetSource(tags={}) if source is None else resolve_dataset_source(source)
    return MetaDataset(origin, name=name, digest=digest)  # type: ignore[abstract]


def _connect_to_record() -> None:
    """Connect to the store, check that runs can be recorded there, and send what is queued for it."""
    connect()
    check_recording(mlflow.get_tracking_uri())
    flush_outbox()


def _resume_run(training: str, *, checkpointed: Mapping[str, Any] | None) -> RunLogger | None:
    """Return the run to resume, or None; it knows which metrics MLflow has, and which are pending."""
    found = find_runs({TRAINING: training})
    if checkpointed:
        found = [run for run in found if run.run_id == checkpointed["run_id"]]
    else:
        found = [run for run in found if run.status != "FINISHED" and run.is_free]
    if not found or not has_artifact_folder(found[0].run_id):
        return None
    client, run_id = MlflowClient(), found[0].run_id
    names = [name for name in found[0].metrics if not name.startswith("system/")]
    logged = {(name, point.step) for name in names for point in client.get_metric_history(run_id, name)}
    pending = pending_metrics(checkpointed) if checkpointed else []
    return RunLogger(run_id, experiment_id=found[0].experiment_id, logged=logged, pending=pending, resumed=True)


def create_run(experiment: str, *, training: str, setup: RunSetup | None = None) -> RunLogger:
    """Create the run of a training, with tags by which the next process finds it if this one is killed at once."""
    tags = tags_of({TRAINING: training, PROJECT: str(project_folder()), **this_process()})
    return _new_run(experiment, setup=setup, tags=tags)


def _new_run(experiment: str, *, setup: RunSetup | None, tags: Mapping[str, str]) -> RunLogger:
    """Create a run, named after the setup, or as the reproduction that it is; without both, MLflow invents a name."""
    original = get_settings().reproduces
    name = f"reproduces-{original[:8]}" if original else setup.title.strip() if setup else ""
    tags = dict(tags) | parent_tags()
    info = MlflowClient().create_run(experiment_id(experiment), run_name=name or None, tags=tags).info
    return RunLogger(info.run_id, experiment_id=info.experiment_id)


def _mark_dead_runs(*, except_id: str) -> None:
    """Set all runs to KILLED whose process died without ending them, except the run `except_id`."""
    for run in find_running():
        if run.run_id != except_id and run.process_state == "dead" and mark_killed(run):
            print(f"MLflow run {run.run_id} was left RUNNING by a dead process: marked KILLED", flush=True)


def _log_dataset(dataset: MetaDataset) -> None:
    """Record the data set as an input of the active run."""
    try:
        mlflow.log_input(dataset, context="training")
    except MlflowException:  # another run has just added this data set to the store; a second call finds it
        mlflow.log_input(dataset, context="training")


def _log_environment(run: RunLogger, difference: bytes) -> None:
    """Record the difference to the commit and the installed packages as files of the run."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in environment_files(difference).items():
            path = Path(folder, name)
            path.write_bytes(content)
            run.log_file(path)


def _end_run(run: RunLogger, status: str) -> None:
    """End the run with this status; where MLflow does not answer, queue what it has not received."""
    sent = ended = False
    try:
        sent = run.flush()
    finally:  # in any case, since MLflow would set the run to FINISHED at the end of the process
        with warn_on_failure(f"MLflow run {run.run_id} could not be ended"):
            mlflow.end_run(status)
            ended = True
    if sent and ended and run.unrecorded is None:
        return
    with warn_on_failure(f"MLflow run {run.run_id} was not queued"):
        queue_run(run, status=status)
