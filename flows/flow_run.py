"""The parts of a flow run around its four tasks: open a workspace, reproduce a stage, save, report, summarize."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import Task, get_client, get_run_logger, runtime
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Completed
from prefect.utilities.urls import url_for

from flows import PROJECT
from flows.doctor import fix_leftovers, register_process
from flows.dvc_client import StepError
from flows.form import Overrides
from flows.git import Snapshot, experiment_name, untracked_files
from flows.live_progress import LiveProgress, artifact_key
from flows.prefect_server import REQUEST_SECONDS, SERVER_ERRORS, brief_client
from flows.reports import render, report_path
from flows.run_log import log, shorten_logs, warn
from flows.seed_values import SEED_PARAM, seed_of_day, seeds_from, seeds_title
from flows.summary import Step, Summary, read_summary
from flows.summary_page import as_markdown, as_title
from flows.ui import mlflow_page
from flows.workspace import Keep, Workspace, open_workspace
from pipeline.artifacts import BEST_WEIGHTS, TRAIN
from pipeline.core.errors import EXIT_TEMPORARY, EXIT_USER, TemporaryError, UserError, redact_url
from pipeline.core.processes import call_at_parent_end
from pipeline.core.yaml import dump_yaml
from pipeline.recipes import compose
from pipeline.tracking.links import REPORT
from pipeline.tracking.run_title import RunSetup, read_setup

DEFAULT_RECIPE = "digits"

# errors that a user can act on: the flow run fails with the error's one line as its message
EXPECTED_ERRORS = (UserError, TemporaryError, StepError, OSError)
# labels of a flow run: its latest step, the page of its MLflow run, and why it ended where Prefect cannot know it
STEP_LABEL, MLFLOW_LABEL, REASON_LABEL = "pipeline.step", "pipeline.mlflow_run", "pipeline.reason"
# labels of the parent flow run of several seeds: its MLflow run, and the files with which all of them train
PARENT_LABEL, COMMIT_LABEL, HEAD_LABEL = "pipeline.seeds_run", "pipeline.seeds_commit", "pipeline.seeds_head"
# sqlite refuses a write at the same time as another: the server then answers with status 503
LABEL_RETRIES = 2
_CACHE_HIT_MESSAGES = {"restored": "restored from DVC's cache", "unchanged": "up to date"}


shorten_logs()


def is_temporary_failure(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Return whether a retry may help: by the stage's exit status, or because it was killed (as out of memory)."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, StepError) and error.status in (EXIT_TEMPORARY, -signal.SIGKILL, 128 + signal.SIGKILL)


def exit_status(error: object) -> int:
    """Return the exit status for the error of a failed flow run."""
    if isinstance(error, StepError) and error.status in (EXIT_USER, EXIT_TEMPORARY):
        return error.status
    if isinstance(error, UserError):
        return EXIT_USER
    return EXIT_TEMPORARY if isinstance(error, TemporaryError) else 1


def _label(flow_run_id: str, labels: dict[str, str]) -> None:
    """Add labels to a flow run, for the text of notifications; a server that does not answer must not end the run."""
    with suppress(*SERVER_ERRORS), brief_client(retries=LABEL_RETRIES) as client:
        client.update_flow_run_labels(UUID(flow_run_id), {**labels})


def _end_without_worker(flow_run_id: str) -> None:
    """End this flow run, since nobody can cancel it after its worker was killed."""
    reason = {REASON_LABEL: "its worker was killed, or ended without waiting for it"}
    labeling = threading.Thread(target=_label, args=(flow_run_id, reason), daemon=True)
    labeling.start()
    labeling.join(REQUEST_SECONDS)  # a server that hangs must not keep the run
    os.kill(os.getpid(), signal.SIGTERM)


def reproduce(stage: str, workspace: Workspace) -> State[Step]:
    """Bring a DVC stage up to date, and return the task's state: Completed, or Cached if its command did not run."""
    start = time.monotonic()
    run_id = str(runtime.flow_run.id)
    _label(run_id, {STEP_LABEL: stage, REASON_LABEL: ""})  # a retry may have another reason
    assert workspace.live
    try:
        with workspace.live.stage(stage) as shown:
            shown.outcome = outcome = workspace.reproduce(stage, on_line=log)
    finally:
        if workspace.mlflow_run_id:
            page = mlflow_page(workspace.mlflow_run_id, experiment_id=workspace.mlflow_experiment_id)
            _label(run_id, {MLFLOW_LABEL: page})
    step = Step(stage, outcome, time.monotonic() - start)
    if outcome == "ran":
        return Completed(data=step)
    return Completed(name="Cached", message=_CACHE_HIT_MESSAGES[outcome], data=step)


def name_flow_run() -> str:
    """Return the name of the current flow run, as in `digits lr=0.03 epochs=6`, which is that of its MLflow run too.

    Prefect calls this at the start of each run, also of a scheduled one. Where the title cannot be made, as for a value
    that is not allowed, the run keeps its name: the flow then fails with the reason.
    """
    values = runtime.flow_run.parameters
    recipe, seeds = values.get("recipe", DEFAULT_RECIPE), values.get("seeds", 1)
    try:
        overrides = choose_overrides(values.get("overrides"), seeds=seeds, vary_seed=values.get("vary_seed", False))
        params, setup = compose_run(recipe, overrides)
        return setup.title if seeds == 1 else seeds_title(setup, seeds_from(params["train"]["seed"], seeds))
    except (UserError, OSError):
        return str(runtime.flow_run.name)


def choose_overrides(overrides: Overrides | None, *, seeds: int, vary_seed: bool) -> dict[str, Any]:
    """Return the values that replace the recipe's in the current flow run, with the seed of its day for `vary_seed`.

    Raises UserError where both would set the seed.
    """
    values = overrides.flat() if overrides else {}
    if not vary_seed:
        return values
    if SEED_PARAM in values:
        raise UserError(
            f"vary_seed: found true, and {SEED_PARAM}={values[SEED_PARAM]} among the overrides; allowed: one of both; "
            "leave the other out"
        )
    return values | {SEED_PARAM: seed_of_day(runtime.flow_run.scheduled_start_time, seeds=seeds)}


def compose_run(recipe: str, overrides: Mapping[str, Any]) -> tuple[Mapping[str, Any], RunSetup]:
    """Return the parameters of a run, and what differs from the recipe; raises UserError where one is not allowed."""
    with chdir(PROJECT):
        params = compose(recipe, overrides)
        return params, read_setup(recipe=recipe, params=params)


@contextmanager
def open_flow_run(recipe: str, overrides: Mapping[str, Any], *, keep: Keep) -> Iterator[Workspace]:
    """Compose the parameters, register this process in Prefect, fix what killed runs left, and yield the workspace."""
    params, setup = compose_run(recipe, overrides)
    run_id, run_name = str(runtime.flow_run.id), str(runtime.flow_run.name)
    experiment = experiment_name(PROJECT, setup.title, flow_run_id=run_id)
    begin(experiment)
    parent = read_parent()
    link = redact_url(url_for("flow-run", obj_id=run_id) or "")
    open_clone = open_workspace(
        PROJECT,
        params=params,
        params_text=dump_yaml(params),
        experiment=experiment,
        flow_run_id=run_id,
        variables={
            "PIPELINE_FLOW_RUN_NAME": run_name,
            "PIPELINE_FLOW_RUN_LINK": link,
            "PIPELINE_RECIPE": recipe,
            "PIPELINE_PARENT_RUN": parent.mlflow_run_id if parent else "",
        },
        keep=keep,
        snapshot=parent.snapshot if parent else None,
    )
    with (
        open_clone as workspace,
        LiveProgress(workspace.progress_file, recipe=recipe, flow_run_id=run_id) as workspace.live,
    ):
        yield workspace


def begin(experiment: str = "") -> None:
    """Register this process in Prefect, end it with its worker, and fix what killed flow runs left."""
    run_id = str(runtime.flow_run.id)
    if "PREFECT__FLOW_RUN_ID" in os.environ:  # Prefect's worker sets it
        call_at_parent_end(lambda: _end_without_worker(run_id))
    register_process(run_id, run_count=runtime.flow_run.run_count, project=PROJECT, experiment=experiment)
    for line in fix_leftovers(PROJECT):
        log(line)
    _warn_of_untracked_files()


@dataclass(frozen=True)
class ParentRun:
    """What the flow runs of several seeds share: the MLflow run over all of them, and the files of the checkout."""

    mlflow_run_id: str
    snapshot: Snapshot


def register_parent(parent: ParentRun) -> None:
    """Record in Prefect that the current flow run is a parent, where its children read that."""
    labels = {
        PARENT_LABEL: parent.mlflow_run_id,
        COMMIT_LABEL: parent.snapshot.commit,
        HEAD_LABEL: parent.snapshot.head,
    }
    with get_client(sync_client=True) as client:
        client.update_flow_run_labels(UUID(str(runtime.flow_run.id)), {**labels})


def read_parent() -> ParentRun | None:
    """Return what the flow run that started the current one has registered, or None where it is no child."""
    parent_id = runtime.flow_run.parent_flow_run_id
    if parent_id is None:
        return None
    with get_client(sync_client=True) as client:
        labels = client.read_flow_run(UUID(parent_id)).labels
    if PARENT_LABEL not in labels:  # a flow of the user has started this one
        return None
    return ParentRun(str(labels[PARENT_LABEL]), Snapshot(str(labels[COMMIT_LABEL]), str(labels[HEAD_LABEL])))


def _warn_of_untracked_files() -> None:
    """Log a warning that names each untracked file of code, and some of the other untracked files."""
    code, others = split_untracked(untracked_files(PROJECT))
    if code:
        names = ", ".join(code)
        get_run_logger().warning("git does not track %s: this run is without that code; `git add` it first", names)
    if others:
        names = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
        get_run_logger().warning("git does not track %s: left out of this run; `git add` what it needs", names)


def split_untracked(files: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split untracked files into Python modules of pipeline/ and flows/, and all others."""
    code = [name for name in files if name.endswith(".py") and name.startswith(("pipeline/", "flows/"))]
    return code, [name for name in files if name not in code]


def save(workspace: Workspace, steps: Sequence[Step]) -> str | None:
    """Save the files as a DVC experiment, and return the id of the MLflow run that made the model, or None.

    The run is looked up in MLflow, and its model registered, where the evaluation came from DVC's cache, or where the
    stage's code is too old to report its run.
    """
    has_registered = any(step.stage == "evaluate" and step.outcome == "ran" for step in steps)
    if (workspace.mlflow_run_id and has_registered) or not (workspace.folder / TRAIN / BEST_WEIGHTS).exists():
        workspace.save(on_line=log)
        return workspace.mlflow_run_id
    # in a separate process, since MLflow's store is global to a process; it imports MLflow (2 s) while DVC saves
    command = [
        sys.executable,
        "-m",
        "flows.model_use",
        str(workspace.folder),
        str(runtime.flow_run.id),
        workspace.experiment,
    ]
    with subprocess.Popen(
        command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as lookup:
        try:
            workspace.save(on_line=log)
            ids, problem = lookup.communicate("saved\n")
        except BaseException:
            lookup.kill()
            raise
    if lookup.returncode or "warning: " in problem:
        reason = problem.strip() or f"the look-up ended with exit status {lookup.returncode}"
        get_run_logger().warning(
            "the MLflow run that made the model is unknown, not tagged or not registered: %s", reason
        )
    run_id, _, experiment_id = ids.strip().partition(" ")
    workspace.mlflow_experiment_id = experiment_id or workspace.mlflow_experiment_id
    return run_id or workspace.mlflow_run_id


def make_report(workspace: Workspace, steps: Sequence[Step]) -> Path | None:
    """Render the report of the experiment, and return its path; a failure is a warning, and the result None."""
    target = report_path(PROJECT, workspace.experiment)
    seconds = {step.stage: step.seconds for step in steps if step.outcome == "ran"}
    try:
        for line in render(workspace.folder, target, environment=workspace.environment, seconds=seconds):
            warn(line)
    except (UserError, OSError) as error:
        warn(f"the report was not made: {error}")
        return None
    log(f"report: {target.relative_to(PROJECT)}")
    return target


def summarize(
    workspace: Workspace, steps: Sequence[Step], *, mlflow_run_id: str | None, report: Path | None, start: float
) -> Summary:
    """Return the summary of a finished flow run, and publish it in Prefect; `start` is its `time.monotonic()`."""
    setup = read_setup(workspace.folder, recipe=workspace.environment["PIPELINE_RECIPE"])
    summary = read_summary(
        workspace.folder,
        experiment=workspace.experiment,
        flow_run_id=str(runtime.flow_run.id),
        setup=setup,
        steps=steps,
        seconds=time.monotonic() - start,
        mlflow_run_id=mlflow_run_id,
        report=report,
    )
    links = {"mlflow": "", "report": ""}
    if mlflow_run_id:
        page = partial(mlflow_page, mlflow_run_id, experiment_id=workspace.mlflow_experiment_id)
        links = {"mlflow": page(), "report": page(artifact=REPORT) if report else ""}
    text = as_markdown(
        summary,
        folder=workspace.folder,
        mlflow_link=links["mlflow"],
        report_link=links["report"],
        flow_run_link=workspace.environment["PIPELINE_FLOW_RUN_LINK"],
    )
    create_markdown_artifact(text, key=artifact_key(setup.recipe, "summary"), description=as_title(summary))
    return summary
