"""The flow `train-classifier`: one Prefect task for each DVC stage, in a clone of the checkout, saved as an experiment.

`make run` calls `python -m flows.train_classifier --recipe digits --set train.epochs=3` (`flows.command_line`).
"""

import time

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed, Failed

from flows import FLOW_NAME, command_line
from flows.flow_run import (
    DEFAULT_RECIPE,
    EXPECTED_ERRORS,
    choose_overrides,
    is_temporary_failure,
    make_report,
    name_flow_run,
    open_flow_run,
    reproduce,
    save,
    summarize,
)
from flows.form import NumSeeds, Overrides, Recipe
from flows.promotion_step import promote_experiment
from flows.seeds import run_seeds
from flows.seeds_summary import SeedsSummary
from flows.summary import Step, Summary
from flows.workspace import Workspace

HOUR = 3600

# NO_CACHE: DVC alone decides whether a stage must run, so Prefect must not cache


@task(
    task_run_name="download",
    retries=3,
    retry_delay_seconds=[5, 20, 60],
    retry_condition_fn=is_temporary_failure,
    timeout_seconds=6 * HOUR,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def download(workspace: Workspace) -> State[Step]:
    """Download the raw data, or read it from this machine."""
    return reproduce("download", workspace)


@task(task_run_name="normalize", timeout_seconds=6 * HOUR, cache_policy=NO_CACHE, persist_result=False)
def normalize(workspace: Workspace) -> State[Step]:
    """Convert the raw data to arrays of one image size, and split them."""
    return reproduce("normalize", workspace)


@task(
    task_run_name="train",
    retries=3,
    retry_delay_seconds=[10, 30, 120],
    retry_condition_fn=is_temporary_failure,
    timeout_seconds=7 * 24 * HOUR,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def train(workspace: Workspace) -> State[Step]:
    """Train the network; a retry resumes from the last checkpoint."""
    return reproduce("train", workspace)


@task(
    task_run_name="evaluate",
    retries=3,
    retry_delay_seconds=[5, 30, 120],
    retry_condition_fn=is_temporary_failure,
    timeout_seconds=6 * HOUR,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def evaluate(workspace: Workspace) -> State[Step]:
    """Evaluate the model on the test split."""
    return reproduce("evaluate", workspace)


@flow(name=FLOW_NAME, flow_run_name=name_flow_run, persist_result=False)
def train_classifier(
    recipe: Recipe = DEFAULT_RECIPE,
    overrides: Overrides = Overrides(),  # noqa: B008  (it is frozen)
    *,
    keep_workspace: bool = False,
    seeds: NumSeeds = 1,
    vary_seed: bool = False,
    promote: bool = False,
) -> State[Summary | SeedsSummary]:
    """Train and evaluate a classifier in a clone of the checkout, and save it as a DVC experiment.

    Args:
        recipe: a name from recipes/; each file there is one way to train.
        overrides: values that replace the recipe's, as {"train.epochs": 3}.
        keep_workspace: keep the clone of a failed run in .dvc/tmp/kept/.
        seeds: how many times to train, from train.seed on: each a flow run and an experiment of its own.
        vary_seed: set train.seed by the day (UTC) of the scheduled start, so that each night trains another model.
        promote: let the model become the champion, if it is better (python -m flows.promote).
    """
    start = time.monotonic()
    try:
        values = choose_overrides(overrides, seeds=seeds, vary_seed=vary_seed)
        if seeds > 1:
            several = run_seeds(train_classifier, recipe, values, seeds=seeds, keep_workspace=keep_workspace)
            message = promote_experiment(several.best.experiment) if promote else None
            return Completed(data=several, message=message)
        with open_flow_run(recipe, values, keep="failed" if keep_workspace else "never") as workspace:
            # each task returns a state; wait_for draws the arrows in Prefect's graph
            downloaded = download(workspace)
            normalized = normalize(workspace, wait_for=[downloaded])
            trained = train(workspace, wait_for=[normalized])
            evaluated = evaluate(workspace, wait_for=[trained])
            steps = [state.result() for state in (downloaded, normalized, trained, evaluated)]
            mlflow_run_id = save(workspace, steps)
            report = make_report(workspace, steps)
            summary = summarize(workspace, steps, mlflow_run_id=mlflow_run_id, report=report, start=start)
        return Completed(data=summary, message=promote_experiment(summary.experiment) if promote else None)
    except EXPECTED_ERRORS as error:
        return Failed(message=str(error), data=error)
    except KeyboardInterrupt:
        return Cancelled(message="interrupted with Ctrl-C")


if __name__ == "__main__":
    command_line.main(train_classifier)
