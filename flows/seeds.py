"""A flow run over several seeds: the parent of one flow run for each seed, and of their MLflow runs.

Each seed is a DVC experiment of its own. All of them train with the files that the checkout had when the parent began.
A seed that fails does not end the others. The same command resumes an unfinished parent: it finds the experiments that
were saved since that parent began, and trains only the seeds that are missing.
"""

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import chdir, closing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect import Flow, get_client, runtime
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import PrefectException
from prefect.utilities.urls import url_for

from flows import PROJECT
from flows.dvc_client import StepError
from flows.flow_run import ParentRun, begin, exit_status, register_parent
from flows.form import Overrides
from flows.live_progress import artifact_key
from flows.prefect_server import SERVER_ERRORS, brief_client
from flows.run_log import log, warn
from flows.seed_values import SEED_PARAM
from flows.seeds_plan import Plan, make_plan
from flows.seeds_pool import deployment_with_room, train_side_by_side
from flows.seeds_results import ACCURACY, SeedResult, charted, find_result, spreads
from flows.seeds_summary import SeedsSummary, as_markdown, as_title, format_figure, format_spread, record_row
from flows.ui import mlflow_page
from flows.workspace import KEPT_CLONES
from pipeline.core.errors import first_line, redact_url
from pipeline.params import check_params

if TYPE_CHECKING:
    from pipeline.tracking.seeds import SeedsRun

KIND = "seeds"
TrainOne = Flow[..., State[Any]]


def run_seeds(
    train_one: TrainOne, recipe: str, overrides: Mapping[str, Any], *, seeds: int, keep_workspace: bool
) -> SeedsSummary:
    """Train each seed by a flow run of `train_one` below the current one, and return the summary of all.

    Raises StepError where a seed has no result, after all others were trained.
    """
    # MLflow takes 2 s to import, and a flow run of one seed starts without it
    from pipeline.tracking.seeds import seeds_run  # noqa: PLC0415  # see above

    start = time.monotonic()
    with chdir(PROJECT):
        plan = make_plan(recipe, overrides, seeds=seeds)
        begin()
        params = check_params(plan.params[plan.seeds[0]], origin=recipe)
        shared = {name: value for name, value in params.flat().items() if name != SEED_PARAM}
        with seeds_run(
            data_params=params.download,
            title=plan.title,
            seeds=plan.seeds,
            command_md5=plan.md5,
            params=shared,
            values={"recipe": recipe, **_flow_run_values()},
        ) as run:
            register_parent(ParentRun(run.run_id, plan.snapshot))
            parent = Parent(plan, run, select_by=params.train.select_by)
            parent.train_missing(train_one, keep_workspace=keep_workspace)
            return parent.finish(seconds=time.monotonic() - start)


def _flow_run_values() -> dict[str, str]:
    """Return id, name and page of the current flow run, as MLflow's runs have them."""
    run_id = str(runtime.flow_run.id)
    return {
        "prefect.flow_run_id": run_id,
        "prefect.flow_run_name": str(runtime.flow_run.name),
        "prefect.flow_run_link": redact_url(url_for("flow-run", obj_id=run_id) or ""),
    }


class Parent:
    """The state of a parent: results and errors of its seeds, which are recorded in MLflow and shown in Prefect."""

    def __init__(self, plan: Plan, run: "SeedsRun", *, select_by: str) -> None:
        self._plan, self._run = plan, run
        self._results: dict[int, SeedResult] = {}
        self._failures: dict[int, tuple[str, int]] = {}  # by seed: reason and exit status
        self._artifact_id: UUID | None = None
        self._summary = SeedsSummary(
            title=plan.title,
            recipe=plan.recipe,
            seeds=plan.seeds,
            select_by=select_by,
            command=plan.command,
            flow_run_id=str(runtime.flow_run.id),
            mlflow_run_id=run.run_id,
        )

    def train_missing(self, train_one: TrainOne, *, keep_workspace: bool) -> None:
        """Train all seeds that have no result, then those whose data differ from those of the newest result.

        The newest result is one of this process where the data can have changed.
        """
        for seed in self._plan.seeds:
            if self._find(seed) and self._run.resumed:
                log(f"seed {seed} is finished: {self._results[seed].experiment}")
        self._record()
        for choose in (self._missing_or_unchecked, self._drop_outdated):
            with closing(train_all(train_one, self._plan, choose(), keep_workspace=keep_workspace)) as ended:
                for seed, state in ended:
                    self._add(seed, state)

    def finish(self, *, seconds: float) -> SeedsSummary:
        """Record the figures over all seeds, and return the summary; raises StepError where a seed has no result."""
        if missing := self._missing():
            reasons = "; ".join(f"seed {seed}: {self._failures[seed][0]}" for seed in missing)
            raise StepError(
                f"{len(missing)} of {len(self._plan.seeds)} seeds have no result: {reasons}; the others are finished, "
                "and the same command resumes with the missing ones",
                status=self._failures[missing[0]][1],
            )
        self._summary = replace(self._summary, seconds=seconds)
        best = self._summary.best
        self._run.finish(
            charted(self._summary.results),
            values={
                "best.seed": best.seed,
                "best.experiment": best.experiment,
                "result.spread": format_spread(ACCURACY, spreads(self._summary.results)[ACCURACY]),
                "result.record": record_row(self._summary),
            },
        )
        return self._summary

    def _missing(self) -> list[int]:
        """Return the seeds without a result."""
        return [seed for seed in self._plan.seeds if seed not in self._results]

    def _missing_or_unchecked(self) -> list[int]:
        """Return the seeds without a result; if all have one from an earlier process, drop one of the user's images.

        Its flow run shows whether the images have changed since: DVC compares them, and trains only if they have.
        """
        newest = max(self._results.values(), key=lambda one: one.created, default=None)
        if self._missing() or newest is None or not self._has_user_images():
            return self._missing()
        log(f"all seeds are finished; seed {newest.seed} runs again, to check whether the images have changed since")
        del self._results[newest.seed]
        return [newest.seed]

    def _has_user_images(self) -> bool:
        """Return whether the data are a folder of the user, which git does not track; others never change."""
        return any(params["download"]["dataset"] == "imagefolder" for params in self._plan.params.values())

    def _drop_outdated(self) -> list[int]:
        """Drop the results whose data differ from those of the newest one, and return their seeds.

        The data differ where the user's folder has changed between two seeds.
        """
        if not self._results:
            return []
        newest = max(self._results.values(), key=lambda one: one.created)
        found = [seed for seed, one in self._results.items() if one.data_md5 != newest.data_md5]
        for seed in found:
            del self._results[seed]
        if found:
            warn(f"the data have changed since seeds {', '.join(map(str, found))} were trained: they are trained again")
        return found

    def _find(self, seed: int) -> bool:
        """Look for the seed's result among the experiments; return whether there is one."""
        params = self._plan.params[seed]
        found = find_result(PROJECT, seed=seed, params=params, snapshot=self._plan.snapshot, since=self._run.started)
        if found:
            self._results[seed] = found
        return found is not None

    def _add(self, seed: int, state: State[Any]) -> None:
        """Take over the result of a seed's flow run, or the reason why it has none."""
        num_seeds = len(self._plan.seeds)
        if state.is_completed() and self._find(seed):
            one = self._results[seed]
            accuracy = format_figure(ACCURACY, one.metrics[ACCURACY])
            log(
                f"seed {seed}: test accuracy {accuracy}, {one.experiment}; {len(self._results)} of {num_seeds} are done"
            )
        else:
            error = _error_of(state)
            reason = "its experiment was removed, or is not in this checkout" if state.is_completed() else ""
            reason = reason or first_line(error or state.message or state.name)
            self._failures[seed] = reason, exit_status(error)
            warn(f"seed {seed} failed: {reason}")
            if (kept := KEPT_CLONES / str(state.state_details.flow_run_id)).is_dir():
                warn(f"kept the clone of seed {seed}: {kept}")
        self._record()

    def _record(self) -> None:
        """Record the finished seeds in MLflow, and show them on Prefect's page."""
        results = [self._results[seed] for seed in sorted(self._results)]
        seconds = self._run.record_children([_as_row(one) for one in results])
        self._summary = replace(
            self._summary,
            results=results,
            errors={seed: reason for seed, (reason, _) in self._failures.items() if seed not in self._results},
            train_seconds=seconds,
        )
        self._publish()

    def _publish(self) -> None:
        """Create or update the artifact on the page of the parent; where the server does not answer, skip that."""
        link = mlflow_page(self._run.run_id, experiment_id=self._run.experiment_id)
        text, title = as_markdown(self._summary, mlflow_link=link), as_title(self._summary)
        with suppress(*SERVER_ERRORS), brief_client() as client:
            if self._artifact_id:
                client.update_artifact(self._artifact_id, ArtifactUpdate(data=text, description=title))
                return
            artifact = ArtifactCreate(
                key=artifact_key(self._plan.recipe, KIND),
                type="markdown",
                description=title,
                data=text,
                flow_run_id=UUID(str(runtime.flow_run.id)),
            )
            self._artifact_id = client.create_artifact(artifact).id


def _error_of(state: State[Any]) -> object:
    """Return the error of a failed flow run; None where it ran in another process, which leaves only a message."""
    with suppress(PrefectException):
        return None if state.is_completed() else state.result(raise_on_failure=False)
    return None


def _as_row(one: SeedResult) -> dict[str, Any]:
    """Return a result as the MLflow run over the seeds lists it."""
    return {
        "seed": one.seed,
        "experiment": one.experiment,
        "model_md5": one.model_md5,
        "test_accuracy": one.metrics[ACCURACY],
        "validation_accuracy": one.validation[ACCURACY],
    }


def train_all(
    train_one: TrainOne, plan: Plan, seeds: Sequence[int], *, keep_workspace: bool
) -> Generator[tuple[int, State[Any]]]:
    """Train the seeds, and yield the final state of each seed's flow run.

    They are trained side by side where the parent's work pool has room, else one after another in this process. Raises
    KeyboardInterrupt where a flow run in this process was interrupted.
    """
    deployment = deployment_with_room() if len(seeds) > 1 else None
    pairs: Generator[tuple[int, State[Any] | None]] = ((seed, None) for seed in seeds)
    if deployment:
        pairs = train_side_by_side(train_one, plan, seeds, deployment=deployment, keep_workspace=keep_workspace)
    with closing(pairs):
        for seed, known in pairs:
            state = known or _train(train_one, plan, seed, keep_workspace=keep_workspace)
            if state.is_cancelled() and not known:
                raise KeyboardInterrupt
            yield seed, state


def _train(train_one: TrainOne, plan: Plan, seed: int, *, keep_workspace: bool) -> State[Any]:
    """Run the flow for one seed below the current flow run, and return its final state.

    In a retry of the parent, Prefect may answer a call with the child that an earlier attempt completed at this
    position: with a state that it had before the call.
    """
    values, earlier = Overrides.model_validate({**plan.overrides, SEED_PARAM: seed}), child_states()
    while True:
        state: State[Any] = train_one(plan.recipe, values, keep_workspace=keep_workspace, return_state=True)
        if state.id not in earlier:
            return state


def child_states() -> set[UUID | None]:
    """Return the id of the present state of each flow run below the current one, of all its attempts."""
    below = FlowRunFilter.model_validate({"parent_flow_run_id": {"any_": [str(runtime.flow_run.id)]}})
    found: list[FlowRun] = []
    with get_client(sync_client=True) as client:
        while page := client.read_flow_runs(flow_run_filter=below, sort=FlowRunSort.ID_DESC, offset=len(found)):
            found += page
    return {run.state_id for run in found}
