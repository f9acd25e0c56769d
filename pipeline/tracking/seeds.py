"""The MLflow run over several seeds of one recipe, below which MLflow shows the runs of the seeds: its children.

Such a run made no model: it has the tag `seeds` and no `model.md5`. Its `provenance.json` lists the finished children,
also one whose model came from DVC's cache, with the earlier MLflow run that made that model. MLflow shows only the runs
that were trained for it below it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from mlflow import MlflowClient

from pipeline.core.errors import UserError
from pipeline.core.git import code_state
from pipeline.core.processes import this_process
from pipeline.core.project import project_folder
from pipeline.params import PARAMS_FILE
from pipeline.tracking.experiments import experiment_id
from pipeline.tracking.logger import RunLogger
from pipeline.tracking.provenance import (
    CHILDREN,
    COMMAND_MD5,
    EXPERIMENT,
    PROJECT,
    SEEDS,
    TAGS_OF_ONE_PROCESS,
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
        raise UserError(
            f"MLflow run {run_id}: found {'a run without the tag seeds' if run else 'no such run'}; allowed: the run of "
            "a command with SEEDS; name another run"
        )
    with store_errors():
        rows = read_provenance(run_id).get(CHILDREN, [])
    return [Child(*(row[name] for name in ("seed", "run_id", "experiment", "model_md5"))) for row in rows]


def find_maker(*, experiment: str, model_md5: str | None) -> Run | None:
    """Return the run that trained for a DVC experiment, else the newest run that made its model, or None."""
    found = find_runs({EXPERIMENT: experiment})
    found = found or (find_runs_of_model(model_md5) if model_md5 else [])
    return next((run for run in found if not is_parent(run)), None)


class SeedsRun:
    """An open MLflow run over several seeds; `started` is when the first of its processes began it, in seconds (UTC).

    `resumed` is whether an earlier process began it.
    """

    def __init__(self, run: RunLogger, *, started: float, resumed: bool) -> None:
        self.run_id, self.experiment_id = run.run_id, run.experiment_id
        self.started, self.resumed = started, resumed
        self._run = run

    def record_children(self, found: Sequence[tuple[Child, Mapping[str, Any]]]) -> None:
        """Record the finished children, each with values for the description, such as its test accuracy."""
        with store_errors():
            self._run.record({CHILDREN: [{**asdict(child), **values} for child, values in found]})

    def finish(self, metrics: Mapping[str, float], *, values: Values) -> None:
        """Log the metrics over all children, and record values of the description."""
        with store_errors():
            self._run.log(metrics, step=0)
            self._run.flush()
            self._run.record(values)


@contextmanager
def seeds_run(
    *, experiment: str, title: str, seeds: Sequence[int], command_md5: str, params: Mapping[str, Any], values: Values
) -> Iterator[SeedsRun]:
    """Open the MLflow run over several seeds, and end it: as FINISHED, FAILED, or KILLED after an interruption.

    The unfinished run of the same command, by `command_md5`, is resumed; else the run is new, named `title`. Raises
    UserError or TemporaryError where the store cannot be reached.
    """
    project = project_folder()
    connect(tracking_uri(project))
    check_recording(tracking_uri(project))
    code = code_state(project, tracked=str(PARAMS_FILE))
    own = {SEEDS: list(seeds), COMMAND_MD5: command_md5, PROJECT: str(project), "git.dirty": code.dirty, **values}
    tags = source_tags(code, program=PROGRAM) | tags_of({**own, **this_process()})
    with store_errors():
        run = _resume(command_md5, project=str(project), tags=tags) or _create(experiment, title=title, tags=tags)
        ensure_results_view(run.run_id)
        status = "FAILED"
    try:
        with store_errors():
            run._run.log_params(params)
            run._run.record(own)
        yield run
        status = "FINISHED"
    except Exception:
        raise
    except BaseException:  # Ctrl-C, SIGTERM, or a cancellation in Prefect
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
