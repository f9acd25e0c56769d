"""Train seeds side by side: as runs of the parent's own deployment, in the work pool of the parent.

The limit of the work pool states how many runs its machines can take. A pool without a limit, as `make worker` creates
it, may be one machine of which a training uses all cores: there the seeds are trained one after another. A parent
occupies one place of its pool. So that parents which have taken all places do not wait for each other, each of them
trains a seed itself when none of its seeds has been started for a while.
"""

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any
from uuid import UUID

from prefect import Flow, runtime
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment
from prefect.states import Cancelled, Cancelling

from flows.prefect_server import SERVER_ERRORS, brief_client
from flows.run_log import log
from flows.seed_values import SEED_PARAM
from flows.seeds_plan import Plan

MIN_LIMIT = 3  # of a work pool: the parent and two seeds
POLL_SECONDS = 2.0
STALLED_SECONDS = 60.0  # without any of the seeds being started, after which the parent trains one itself
READ_RETRIES = 5
IN_CHECKOUT = "prefect.deployments.steps.set_working_directory"  # the only step of a run in this checkout


def deployment_with_room() -> UUID | None:
    """Return the deployment that runs the current flow run if its work pool takes several runs, else None.

    A deployment that clones its code for each run counts as none: its experiments are not in this checkout.
    """
    deployment_id = runtime.deployment.id
    if deployment_id is None:
        return None
    with brief_client(retries=READ_RETRIES) as client:
        deployment = client.read_deployment(UUID(str(deployment_id)))
        steps = {name for step in deployment.pull_steps or [] for name in step}
        if deployment.work_pool_name is None or steps - {IN_CHECKOUT}:
            return None
        limit = client.read_work_pool(deployment.work_pool_name).concurrency_limit
    return deployment.id if limit is not None and limit >= MIN_LIMIT else None


def train_side_by_side(
    train_one: Flow[..., State[Any]], plan: Plan, seeds: Sequence[int], *, deployment: UUID, keep_workspace: bool
) -> Generator[tuple[int, State[Any] | None]]:
    """Start a run of the deployment for each seed, and yield each seed with its final state when it has ended.

    The state is None where the pool has not started any seed for a while: the caller is to train that one. When the
    caller is interrupted, all runs are canceled.
    """
    defaults = {name: one["default"] for name, one in train_one.parameters.properties.items() if "default" in one}
    own = {"recipe": plan.recipe, "keep_workspace": keep_workspace, "seeds": 1, "vary_seed": False, "promote": False}
    waiting: dict[int, UUID] = {}
    try:
        for seed in seeds:
            overrides = {**plan.overrides, SEED_PARAM: seed}
            # the deployment's own values are for its parents: a child gets the flow's defaults instead
            values = {**defaults, **own, "overrides": overrides}
            started: Any = run_deployment(deployment, parameters=values, timeout=0)
            waiting[seed] = started.id
        log(f"seeds {', '.join(map(str, seeds))} are scheduled in the work pool")
        yield from _wait(waiting)
    except BaseException:
        _cancel(waiting.values())
        raise


def _wait(waiting: dict[int, UUID]) -> Iterator[tuple[int, State[Any] | None]]:
    """Yield each seed when its run has ended, or is taken out of the pool; ended ones are removed from `waiting`."""
    last_started = time.monotonic()
    while waiting:
        ended: dict[int, State[Any] | None] = {}
        with suppress(*SERVER_ERRORS), brief_client(retries=READ_RETRIES) as client:
            runs = {seed: client.read_flow_run(run_id) for seed, run_id in waiting.items()}
            ended = {seed: run.state for seed, run in runs.items() if run.state and run.state.is_final()}
            if ended or any(_is_started(run) for run in runs.values()):
                last_started = time.monotonic()
            elif time.monotonic() - last_started > STALLED_SECONDS:
                ended = {seed: None for seed in list(runs)[:1] if _take_back(runs[seed], client)}
        for seed, state in ended.items():
            del waiting[seed]
            yield seed, state
            last_started = time.monotonic()
        time.sleep(POLL_SECONDS if waiting else 0)


def _is_started(run: FlowRun) -> bool:
    """Return whether a worker has taken the flow run."""
    return run.state is not None and (run.state.is_pending() or run.state.is_running())


def _take_back(run: FlowRun, client: SyncPrefectClient) -> bool:
    """Cancel a flow run that no worker has taken, and return whether Prefect accepted that."""
    state: State[Any] = Cancelled(message="no worker had room for it: its parent trains this seed")
    result = client.set_flow_run_state(run.id, state)
    return result.state is not None and result.state.is_cancelled()


def _cancel(run_ids: Iterable[UUID]) -> None:
    """Cancel the flow runs that have not ended; their worker ends those that are running."""
    for run_id in run_ids:
        with suppress(*SERVER_ERRORS), brief_client() as client:
            state = client.read_flow_run(run_id).state
            if state and not state.is_final():
                is_started = state.is_pending() or state.is_running()
                client.set_flow_run_state(run_id, Cancelling() if is_started else Cancelled())
