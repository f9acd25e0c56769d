"""The MLflow run over several seeds of one recipe, below which MLflow shows the runs of the seeds: its children.

Such a run made no model: it has the tag `seeds` and no `model.md5`. Its `provenance.json` lists the finished children,
also one whose model came from DVC's cache, with the earlier MLflow run that made that model. MLflow shows only the runs
that were trained for it below it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mlflow import MlflowClient

from pipeline.core.errors import UserError
from pipeline.core.git import code_state
from pipeline.core.processes import this_process
from pipeline.core.project import project_folder
from pipeline.params import PARAMS_FILE, DownloadParams
from pipeline.tracking.experiments import experiment_id, experiment_name
from pipeline.tracking.logger import RunLogger
from pipeline.tracking.provenance import (
    CHILDREN,
    COMMAND_MD5,
    EXPERIMENT,
    PROJECT,
    SEEDS,
    TAGS_OF_ONE_PROCESS,
    TRAINING,
    Values,
    source_tags,
    tags_of,
)
from pipeline.tracking.provenance_file import read_provenance
from pipeline.tracking.search import Run, find_run, find_runs, find_runs_of_model
from pipeline.tracking.store import connect, store_errors, warn_on_failure
from pipeline.tracking.store_uri import check_recording, tracking_uri
from pipeline.tracking.views import ensure_results_view

PROGRAM = "flows.train_classifier"


@dataclass(frozen=True)
class Child:
    """A finished seed: the MLflow run and the DVC experiment of its model, and the MD5 of the model's weights.

    `run_id` is None where MLflow has no run that made the model, `model_md5` where the experiment has no model.
    """

    seed: int
    run_id: str | None
    experiment: str
    model_md5: str | None


def is_parent(run: Run) -> bool:
    """Return whether the run is one over several seeds, which made no model itself."""
    return SEEDS in run.tags


def children(run_id: str) -> list[Child]:
    """Return the finished children of a run over several seeds, in the order of the seeds.

    Raises UserError where MLflow has no such run, or the run is none over several seeds.
    """
    run = find_run(run_id)
    if run is None or not is_parent(run):
        found = "a run of one seed" if run else "no such run"
        raise UserError(f"MLflow run {run_id}: found {found}; allowed: the run over the seeds of SEEDS=…; name another")
    with store_errors():
        rows = read_provenance(run_id).get(CHILDREN, [])
    return [Child(*(row[name] for name in ("seed", "run_id", "experiment", "model_md5"))) for row in rows]


def best_experiment(run_id: str) -> str | None:
    """Return the DVC experiment of the seed that is best on validation, None where a seed has not finished yet."""
    with store_errors():
        name: str | None = read_provenance(run_id).get("best.experiment")
    return name


def find_maker(*, experiment: str, model_md5: str | None) -> Run | None:
    """Return the run that trained for a DVC experiment, else the newest run that made its model, or None."""
    found = find_runs({EXPERIMENT: experiment})
    found = found or (find_runs_of_model(model_md5) if model_md5 else [])
    return next((run for run in found if not is_parent(run)), None)


class SeedsRun:
    """An open MLflow run over several seeds; `started` is when the first of its processes began it, in seconds (UTC).

    `resumed` is whether an earlier process began it.
    """

    def __init__(self, logger: RunLogger, *, started: float, resumed: bool) -> None:
        self.run_id, self.experiment_id = logger.run_id, logger.experiment_id
        self.started, self.resumed = started, resumed
        self._logger = logger

    def start(self, params: Mapping[str, Any], *, values: Values) -> None:
        """Log the parameters that all seeds share, and record code, seeds and flow run."""
        with store_errors():
            self._logger.log_params(params)
            self._logger.record(values)

    def record_children(self, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """Record the finished seeds, and return the seconds of their trainings as far as MLflow knows them.

        A row has seed, experiment, model_md5 and, for the description, test_accuracy and validation_accuracy.
        """
        with store_errors():
            makers = [find_maker(experiment=row["experiment"], model_md5=row["model_md5"]) for row in rows]
            found = [{**row, "run_id": run.run_id if run else None} for row, run in zip(rows, makers, strict=True)]
            self._logger.record({CHILDREN: found})
        return [(run.ended - run.started) / 1000 for run in makers if run and run.ended and TRAINING in run.tags]

    def finish(self, metrics: Mapping[str, float], *, values: Values) -> None:
        """Log the metrics over all children, and record values of the description."""
        with store_errors():
            self._logger.log(metrics, step=0)
            self._logger.flush()
            self._logger.record(values)


@contextmanager
def seeds_run(
    *,
    data_params: DownloadParams,
    title: str,
    seeds: Sequence[int],
    command_md5: str,
    params: Mapping[str, Any],
    values: Values,
) -> Iterator[SeedsRun]:
    """Open the MLflow run over several seeds, and end it: as FINISHED, FAILED, or KILLED after an interruption.

    It is in the MLflow experiment of the data set that `data_params` name. The unfinished run of the same command, by
    `command_md5`, is resumed; else the run is new, named `title`. Raises UserError or TemporaryError where the store
    cannot be reached.
    """
    project = project_folder()
    connect(tracking_uri(project))
    check_recording(tracking_uri(project))
    code = code_state(project, tracked=str(PARAMS_FILE))
    own = {SEEDS: list(seeds), COMMAND_MD5: command_md5, PROJECT: str(project), "git.dirty": code.dirty, **values}
    tags = source_tags(code, program=PROGRAM) | tags_of({**own, **this_process()})
    experiment = experiment_name(data_params.dataset, folder=data_params.folder)
    with store_errors():
        run = _resume(command_md5, project=str(project), tags=tags) or _create(experiment, title=title, tags=tags)
        ensure_results_view(run.run_id)
        status = "FAILED"
    try:
        run.start(params, values=own)
        yield run
        status = "FINISHED"
    except BaseException as error:
        if not isinstance(error, Exception):  # Ctrl-C, SIGTERM, or a cancellation in Prefect
            status = "KILLED"
        raise
    finally:
        with warn_on_failure(f"MLflow run {run.run_id} could not be ended"):
            MlflowClient().set_terminated(run.run_id, status)


def _resume(command_md5: str, *, project: str, tags: Mapping[str, str]) -> SeedsRun | None:
    """Return the newest unfinished run of the command that no living process has, or None; it is RUNNING again."""
    found = find_runs({COMMAND_MD5: command_md5, PROJECT: project})
    run = next((run for run in found if run.status != "FINISHED" and run.is_free), None)
    if run is None:
        return None
    MlflowClient().update_run(run.run_id, status="RUNNING")
    logger = RunLogger(run.run_id, experiment_id=run.experiment_id)
    logger.delete_tags(TAGS_OF_ONE_PROCESS)
    logger.set_tags(tags)
    return SeedsRun(logger, started=run.started / 1000, resumed=True)


def _create(experiment: str, *, title: str, tags: Mapping[str, str]) -> SeedsRun:
    """Return a new run."""
    info = MlflowClient().create_run(experiment_id(experiment), run_name=title, tags=dict(tags)).info
    return SeedsRun(
        RunLogger(info.run_id, experiment_id=info.experiment_id), started=info.start_time / 1000, resumed=False
    )
