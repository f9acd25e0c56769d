"""The flow `train-classifier`: one Prefect task for each DVC stage, in a clone of the checkout, saved as an experiment.

`python -m flows.train_classifier --recipe digits --set train.epochs=3`; `make run` calls it.
"""

import argparse
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from prefect import Task, flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings
from prefect.states import Cancelled, Completed, Failed
from prefect.utilities.urls import url_for

from flows import FLOW_NAME, PROJECT
from flows.checks import check_inputs
from flows.doctor import fix_quietly, register
from flows.form import Overrides, Recipe
from flows.gpu import gpu_slot
from flows.prefect_server import ensure_server
from flows.settings import PrefectServer
from flows.summary import Step, Summary, as_markdown, as_text, changed_params, read_summary
from flows.ui import mlflow_page
from flows.workspace import (
    KEPT,
    Keep,
    StepError,
    Workspace,
    check_checkout,
    check_local_files,
    experiment_name,
    open_workspace,
    untracked_files,
)
from pipeline.artifacts import TRAIN, expand, file_md5
from pipeline.core.errors import (
    EXIT_INTERRUPTED,
    EXIT_TEMPORARY,
    EXIT_USER,
    TemporaryError,
    UserError,
    report_errors,
    shown,
)
from pipeline.core.yaml import dump_yaml, read_yaml
from pipeline.params import compose, parse_override
from pipeline.tracking.store_uri import check_connection, check_recording, tracking_uri

HOUR = 3600.0
FOLDER_PARAM = "download.folder"
_CACHED = {"restored": "its files came from DVC's cache", "unchanged": "nothing to do"}


class _OneLine(logging.Filter):
    """Errors that are told in one line are logged as that line, without a traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, (StepError, UserError, TemporaryError)):
            record.msg, record.args, record.exc_info = str(error), (), None
        return True


for _name in ("prefect.task_runs", "prefect.flow_runs"):
    logging.getLogger(_name).addFilter(_OneLine())


def may_pass(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Whether trying again may help: a stage said so by its exit status, or was killed (by a full memory, an admin)."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, StepError) and error.status in (EXIT_TEMPORARY, -signal.SIGKILL, 128 + signal.SIGKILL)


def _task(stage: str, *, timeout_hours: float, retry_delays: list[float] | None = None) -> Task[[Workspace], Any]:
    """The Prefect task that reproduces one DVC stage; it returns a state that says whether DVC had to run it."""

    def reproduce(workspace: Workspace) -> State[Step]:
        start = time.monotonic()
        slot = partial(gpu_slot, workspace.folder) if stage == "train" else nullcontext
        outcome = workspace.reproduce(stage, on_line=get_run_logger().info, slot=slot)
        step = Step(stage, outcome, time.monotonic() - start)
        if outcome == "ran":
            return Completed(data=step)
        return Completed(name="Cached", message=_CACHED[outcome], data=step)

    return Task(
        reproduce,
        name=stage,
        task_run_name=stage,
        description=f"Bring the DVC stage {stage} up to date.",
        retries=len(retry_delays or []),
        retry_delay_seconds=retry_delays or 0.0,
        retry_condition_fn=may_pass,
        timeout_seconds=timeout_hours * HOUR,
        cache_policy=NO_CACHE,
        persist_result=False,
    )


download = _task("download", timeout_hours=6, retry_delays=[5.0, 20.0, 60.0])
normalize = _task("normalize", timeout_hours=6)
# a training goes on from its checkpoint
train = _task("train", timeout_hours=7 * 24, retry_delays=[10.0, 30.0, 120.0])
evaluate = _task("evaluate", timeout_hours=6, retry_delays=[5.0, 30.0, 120.0])


@flow(name=FLOW_NAME, persist_result=False)
def train_classifier(
    recipe: Recipe = "digits",
    overrides: Overrides = Overrides(),  # noqa: B008  (it is frozen)
    keep_workspace: bool = False,
) -> State[Summary]:
    """Train and evaluate a classifier in a clone of the checkout, and save it as a DVC experiment.

    Args:
        recipe: a name from recipes/: one file, one way to train.
        overrides: values over the recipe's, as {"train.epochs": 3}.
        keep_workspace: where the run fails, keep its clone, in .dvc/tmp/kept/.
    """
    try:
        return Completed(data=_make_experiment(recipe, overrides.flat(), keep="failed" if keep_workspace else "never"))
    except (UserError, TemporaryError, StepError, OSError) as error:
        return Failed(message=str(error), data=error)
    except KeyboardInterrupt:
        return Cancelled(message="interrupted with Ctrl-C")


def _make_experiment(recipe: str, overrides: Mapping[str, Any], *, keep: Keep) -> Summary:
    start = time.monotonic()
    with chdir(PROJECT):
        params = compose(recipe, overrides)
    run_id, run_name = str(flow_run.id), str(flow_run.name)
    name = experiment_name(PROJECT, f"{recipe}-{run_name}", f"{recipe}-{run_name}-{run_id[:8]}")
    if "PREFECT__FLOW_RUN_ID" in os.environ:  # which Prefect's worker sets
        threading.Thread(target=_end_with_worker, args=[os.getppid()], daemon=True).start()
    register(run_id, run_count=flow_run.run_count, project=PROJECT, experiment=name)
    for line in fix_quietly(PROJECT):
        get_run_logger().info(line)
    _mention_untracked()
    link = shown(url_for("flow-run", obj_id=run_id) or "")
    with open_workspace(
        PROJECT,
        params=params,
        params_text=dump_yaml(params),
        experiment=name,
        flow_run_id=run_id,
        variables={"PIPELINE_FLOW_RUN_NAME": run_name, "PIPELINE_FLOW_RUN_LINK": link},
        keep=keep,
    ) as workspace:
        states: list[State[Step]] = []
        for task in (download, normalize, train):
            states.append(_run(task, workspace, after=states))
        with _maker(workspace, run_id):
            states.append(_run(evaluate, workspace, after=states))
            workspace.save(on_line=get_run_logger().info)
        steps = [state.result() for state in states]
        seconds = time.monotonic() - start
        summary = read_summary(
            workspace.folder, experiment=name, steps=steps, seconds=seconds, mlflow_run_id=workspace.mlflow_run_id
        )
        changes = changed_params(read_yaml(workspace.committed_params), params)
    page = mlflow_page(summary.mlflow_run_id) if summary.mlflow_run_id else None
    text = as_markdown(summary, changes=changes, flow_run_id=run_id, mlflow_link=page)
    create_markdown_artifact(text, key="summary", description=name)
    return summary


@contextmanager
def _maker(workspace: Workspace, flow_run_id: str) -> Iterator[None]:
    """Where the model came from the cache, look for the MLflow run that made it while the block runs."""
    model = workspace.folder / TRAIN / "best.safetensors"
    if workspace.mlflow_run_id or not model.exists():
        yield
        return
    command = [sys.executable, "-m", "flows.trace", file_md5(model), "--used-by", flow_run_id, workspace.experiment]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        yield
        output, errors = process.communicate()
    workspace.mlflow_run_id = workspace.mlflow_run_id or output.strip() or None
    if process.returncode:
        get_run_logger().warning("the MLflow run that made the model is not known: %s", errors.strip())


def _end_with_worker(worker: int) -> None:
    """A flow run whose worker was killed could be neither cancelled nor seen: it ends too."""
    while os.getppid() == worker:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _run(task: Task[[Workspace], Any], workspace: Workspace, *, after: list[State[Step]]) -> State[Step]:
    """The state of the task, run after the last of `after`; raises what the task raised."""
    state: State[Step] = task(workspace, wait_for=after[-1:], return_state=True)
    state.result()
    return state


def _mention_untracked() -> None:
    if files := untracked_files(PROJECT):
        first = ", ".join(files[:3]) + (", …" if len(files) > 3 else "")
        get_run_logger().warning("git does not track %s: left out of this run; `git add` what it needs", first)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flows.train_classifier",
        description="Run download, normalize, train, evaluate in a clone of this checkout; save a DVC experiment.",
        epilog="Exit status: 0 done, 2 a mistake to fix, 75 another try may help, 130 interrupted, 1 anything else.",
    )
    parser.add_argument("--recipe", help="a name from recipes/ (default: digits, or my_images with --images)")
    parser.add_argument(
        "--images",
        metavar="FOLDER",
        help="your images, <class>/… or <split>/<class>/…; relative to the project",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        dest="overrides",
        help="a value over the recipe's, as in --set train.epochs=3; may be given again",
    )
    parser.add_argument("--keep-workspace", action="store_true", help=f"keep the clone of a run that fails, in {KEPT}/")
    values = parser.parse_args(arguments)
    values.recipe = values.recipe or ("my_images" if values.images else "digits")
    return values


def read_overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """The values of `--set` and `--images`; the current folder is the project's.

    Raises UserError where they, the recipe or the checkout do not allow a run: before any server is started.
    """
    overrides = dict(parse_override(text) for text in arguments.overrides)
    if arguments.images:
        if FOLDER_PARAM in overrides:
            raise UserError(f"--set {FOLDER_PARAM} and --images: found both; allowed: one of them")
        overrides[FOLDER_PARAM] = _folder_of_images(arguments.images)
    params = compose(arguments.recipe, overrides)
    if arguments.images and params["download"]["dataset"] != "imagefolder":
        raise UserError(
            f"--images: recipe {arguments.recipe} has download.dataset {params['download']['dataset']}; "
            "allowed: a recipe for imagefolder, such as my_images; name one, or leave --images out"
        )
    check_checkout(PROJECT)
    check_local_files(PROJECT, params)
    check_inputs(params)
    return overrides


def _folder_of_images(text: str) -> str:
    """The folder relative to the project where it lies in it, so that each clone gets a link to it; else absolute."""
    path = Path(os.path.normpath(PROJECT / expand(text)))
    return str(path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path)


def main() -> None:
    """Check the parameters, ensure a server, run the flow, print what came out."""
    arguments = parse_arguments()
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # a closed terminal is to end a run as tidily as SIGTERM
        signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with report_errors(), chdir(PROJECT):
        overrides = read_overrides(arguments)
        check_recording(tracking_uri(PROJECT))
        check_connection(tracking_uri(PROJECT))
        state = _run_on_server(ensure_server(), arguments.recipe, overrides, keep_workspace=arguments.keep_workspace)
        status = _report(state, recipe=arguments.recipe)
        kept = KEPT / str(state.state_details.flow_run_id)
        if kept.is_dir():
            print(f"kept the clone: {kept}", file=sys.stderr)
    sys.exit(status)


def _run_on_server(used: PrefectServer, recipe: str, overrides: dict[str, Any], *, keep_workspace: bool) -> State[Any]:
    settings = {PREFECT_API_URL: used.api_url}
    if used.source is None or shown(used.api_url) != used.api_url:  # Prefect logs the page of the run
        settings[PREFECT_UI_URL] = used.page
    with temporary_settings(settings):
        values = Overrides.model_validate(overrides)
        return train_classifier(recipe, values, keep_workspace, return_state=True)


def _report(state: State[Any], *, recipe: str) -> int:
    """Print the summary, or the one line that says why there is none; returns the exit status."""
    if state.is_completed():
        print(as_text(state.result(), recipe=recipe))
        return 0
    if state.is_cancelled():
        print("interrupted; the same command resumes, a training from its last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED
    error = state.result(raise_on_failure=False)
    print(f"error: {error or state.message}", file=sys.stderr)
    return _exit_status(error)


def _exit_status(error: object) -> int:
    if isinstance(error, UserError) or (isinstance(error, StepError) and error.status == EXIT_USER):
        return EXIT_USER
    if isinstance(error, TemporaryError) or (isinstance(error, StepError) and error.status == EXIT_TEMPORARY):
        return EXIT_TEMPORARY
    return 1


if __name__ == "__main__":
    main()
