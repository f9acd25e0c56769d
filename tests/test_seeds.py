"""Several seeds are trained below one flow run, resumed after a kill, and summarized; the stages take no time."""

import math
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from prefect import get_client
from prefect.client.schemas.objects import State
from prefect.states import Completed, Scheduled

from flows import command_line, flow_run, seeds, seeds_plan, seeds_pool, train_classifier
from flows.form import Overrides
from flows.git import Snapshot
from flows.reproduce import find
from flows.seed_values import parse_seeds, seed_of_day, seeds_from
from flows.seeds_results import SeedResult, best_on_validation, charted, spreads
from flows.seeds_summary import SeedsSummary, as_markdown, as_text, record_row
from flows.workspace_folders import FOLDER
from pipeline.core.errors import UserError
from pipeline.core.settings import get_settings
from pipeline.tracking.search import Run, find_runs
from pipeline.tracking.seeds import SeedsRun, children, seeds_run
from pipeline.tracking.store import connect
from tests.conftest import params
from tests.test_flows import dvc, make_project, ran, run, start_run
from tests.test_provenance import training

FAIL_IN_SEED_0 = """
if stage == "train" and "seed: 0\\n" in Path("params.yaml").read_text().partition("train:")[2]:
    if (control / "fail").exists():
        sys.exit("error: out of memory")
"""


def result(seed: int, accuracy: float, *, validation: float = 0.9, loss: float = 0.3) -> SeedResult:
    metrics = {"loss": loss, "accuracy": accuracy, "accuracy_low": 0.1, "test_images": 100, "test_duplicates": 0}
    return SeedResult(
        seed,
        f"digits-{seed}",
        1,
        metrics=metrics,
        validation={"accuracy": validation, "loss": loss},
        data_md5="0",
        model_md5=f"{seed}",
    )


def summary(*accuracies: float) -> SeedsSummary:
    results = [result(seed, accuracy) for seed, accuracy in enumerate(accuracies)]
    return SeedsSummary(
        title="digits seeds=0-2",
        recipe="digits",
        seeds=[0, 1, 2],
        select_by="accuracy",
        command="make run RECIPE=digits SEEDS=3",
        flow_run_id="f",
        mlflow_run_id="m",
        results=results,
        errors={2: "train: out of memory"},
        train_seconds=[7.0, 9.0, 8.0],
    )


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow_store: Path) -> Path:
    monkeypatch.setenv("TOY", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = make_project(tmp_path)
    shutil.copy(mlflow_store / "mlflow.db", folder)
    return folder


@pytest.fixture
def run_here(project: Path, api_url: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that runs the flow for two seeds in this process, and returns its state."""
    for module in (flow_run, seeds, seeds_plan):
        monkeypatch.setattr(module, "PROJECT", project)
    return lambda: train_classifier.train_classifier("digits", {}, seeds=2, return_state=True)


def parents(project: Path) -> list[Run]:
    connect(f"sqlite:///{project}/mlflow.db")
    return find_runs({"seeds": "%"})


def experiments(project: Path) -> list[str]:
    return sorted(dvc(project, "exp", "list", "--name-only").split())


def test_a_seed_that_fails_leaves_the_others_and_the_same_command_resumes(
    project: Path, run_here: Callable[[], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    text = (project / "toy.py").read_text()
    (project / "toy.py").write_text(text.replace('print(f"{stage} begins")', FAIL_IN_SEED_0))
    (project.parent / "fail").touch()
    assert command_line.report(run_here(), recipe="digits") == 1
    error = capsys.readouterr().err
    assert "1 of 2 seeds have no result: seed 0: train: " in error
    assert "the same command resumes with the missing ones" in error
    [finished] = experiments(project)
    (project.parent / "fail").unlink()
    state = run_here()
    assert command_line.report(state, recipe="digits") == 0
    names = [one.experiment for one in state.result().results]
    assert names[1] == finished
    assert experiments(project) == sorted(names)
    assert [name.rpartition("-")[0] for name in names] == ["digits", "digits-seed-1"]
    assert f".venv/bin/dvc exp apply {names[0]}" in capsys.readouterr().out
    [parent] = parents(project)
    assert (parent.name, parent.status, parent.tags["seeds"]) == ("digits seeds=0-1", "FINISHED", "[0, 1]")
    assert (parent.metrics["test/accuracy"], parent.metrics["sd/accuracy"]) == (0.983, 0.0)
    assert [(child.seed, child.experiment) for child in children(parent.run_id)] == list(enumerate(names))
    assert "**Test accuracy 98.30% ± 0.00%**" in parent.tags["mlflow.note.content"]
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(state.state_details.flow_run_id).name == parent.name


def test_a_killed_parent_resumes_and_its_seeds_have_the_files_of_their_start(project: Path, api_url: str) -> None:
    process = start_run(project, "--seeds", "2", api_url=api_url)
    assert process.stdout
    next(line for line in process.stdout if "1 of 2 are done" in line)
    (project.parent / "train.wait").touch()
    text = (project / "toy.py").read_text()
    (project / "toy.py").write_text(text + "# edited while the seeds are trained\n")
    next(line for line in process.stdout if "train begins" in line)
    process.send_signal(signal.SIGKILL)
    process.wait()
    [clone] = (project / FOLDER).glob("*/clone/toy.py")
    assert clone.read_text() == text
    (project / "toy.py").write_text(text)
    [finished] = experiments(project)
    (project.parent / "train.wait").unlink()
    status, text = run(project, "--seeds", "2", api_url=api_url)
    assert status == 0, text
    assert f"seed 0 is finished: {finished}" in text
    assert len(experiments(project)) == 2
    assert ran(project).count("evaluate") == 2
    [parent] = parents(project)
    assert (parent.status, children(parent.run_id)[0].experiment) == ("FINISHED", finished)


@pytest.mark.parametrize(
    ("dataset", "data_md5", "trained"),
    [("imagefolder", "0", [1]), ("imagefolder", "changed", [1, 0, 2]), ("digits", "changed", [])],
)
def test_a_parent_whose_seeds_are_all_finished_checks_whether_the_images_have_changed(
    dataset: str, data_md5: str, trained: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = {seed: replace(result(seed, 0.9), created=created) for seed, created in ((0, 1), (1, 3), (2, 2))}
    found: list[int] = []

    def train(_flow: Any, _plan: Any, chosen: list[int], **_options: Any) -> Iterator[tuple[int, State[Any]]]:
        for seed in chosen:
            found.append(seed)
            stored[seed] = replace(stored[seed], created=4, data_md5=data_md5)
            yield seed, Completed()

    monkeypatch.setattr(seeds, "train_all", train)
    monkeypatch.setattr(seeds, "find_result", lambda _project, *, seed, **_options: stored[seed])
    monkeypatch.setattr(seeds.Parent, "_record", lambda _self: None)
    for name in ("log", "warn"):
        monkeypatch.setattr(seeds, name, print)
    values = {seed: {"download": {"dataset": dataset}} for seed in stored}
    plan = seeds_plan.Plan("my_images", "my_images seeds=0-2", {}, values, Snapshot("c", "h"))
    run: Any = SimpleNamespace(run_id="m", started=0.0, resumed=True)
    parent = seeds.Parent(plan, run, select_by="accuracy")
    parent.train_missing(train_classifier.train_classifier, keep_workspace=False)
    assert found == trained
    assert {one.data_md5 for one in parent._results.values()} == {data_md5 if trained else "0"}


def test_a_retried_parent_trains_a_seed_although_prefect_answers_with_a_child_of_an_earlier_attempt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    earlier: State[Any] = Completed()
    new: State[Any] = Completed(timestamp=datetime(2020, 1, 1, tzinfo=UTC))  # by the clock of a remote server
    monkeypatch.setattr(seeds, "child_states", lambda: {earlier.id})
    answers = iter([earlier, new])
    flow: Any = lambda *_arguments, **_options: next(answers)  # noqa: E731
    plan: Any = SimpleNamespace(recipe="digits", overrides={})
    assert seeds._train(flow, plan, 0, keep_workspace=False) is new


def open_parent(command_md5: str) -> AbstractContextManager[SeedsRun]:
    return seeds_run(
        data_params=params().download,
        title="digits seeds=0-1",
        seeds=[0, 1],
        command_md5=command_md5,
        params={"train.epochs": 3},
        values={"recipe": "digits"},
    )


def interrupt(command_md5: str) -> str:
    with suppress(KeyboardInterrupt), open_parent(command_md5) as parent:
        raise KeyboardInterrupt
    return parent.run_id


def test_an_interrupted_parent_is_resumed_by_the_same_command_and_a_finished_one_is_not(workspace: Path) -> None:
    interrupted = interrupt("a")
    assert [run.status for run in find_runs({"seeds": "%"})] == ["KILLED"]
    assert interrupt("b") != interrupted
    with open_parent("a") as parent:
        assert (parent.run_id, parent.resumed) == (interrupted, True)
    with open_parent("a") as another:
        assert (another.run_id == interrupted, another.resumed) == (False, False)


def test_a_seed_is_below_its_parent_and_one_from_the_cache_is_only_listed(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with training() as run:
        run.record({"model.md5": "c" * 32})
    cached = run.run_id
    with open_parent("a") as parent:
        monkeypatch.setenv("PIPELINE_PARENT_RUN", parent.run_id)
        get_settings.cache_clear()
        with training(training="own") as run:
            run.record({"model.md5": "d" * 32})
        models: list[str | None] = ["c" * 32, "d" * 32, None]
        rows = [{"seed": seed, "model_md5": md5, "experiment": f"digits-{seed}"} for seed, md5 in enumerate(models)]
        figures = {"test_accuracy": 0.9, "validation_accuracy": 0.8}
        parent.record_children([{**row, **figures} for row in rows])
    assert [child.run_id for child in children(parent.run_id)] == [cached, run.run_id, None]
    assert [found.run_id for found in find_runs({"mlflow.parentRunId": parent.run_id})] == [run.run_id]
    note = find_runs({"seeds": "%"})[0].tags["mlflow.note.content"]
    assert f"/runs/{cached}?" in note
    with pytest.raises(UserError, match="found a run of one seed; allowed: the run over the seeds"):
        children(cached)


def test_a_parent_is_no_model_that_could_be_reproduced(workspace: Path) -> None:
    parent = interrupt("a")
    with pytest.raises(UserError, match="found a run over several seeds; allowed: that of one seed: none, as none is"):
        find(workspace, parent)


def test_mean_and_sample_deviation_are_those_of_each_test_metric() -> None:
    results = [result(0, 0.9), result(1, 0.8, loss=0.5), result(2, 1.0, loss=0.4)]
    found = spreads(results)
    assert list(found) == ["accuracy", "loss"]
    assert found["accuracy"].mean == pytest.approx(0.9)
    assert found["accuracy"].deviation == pytest.approx(0.1)  # sqrt((0 + 0.01 + 0.01) / 2)
    assert found["loss"].deviation == pytest.approx(0.1)
    assert next(iter(charted(results))) == "test/accuracy"
    assert math.isclose(charted(results)["selected/validation_accuracy"], 0.9)


@pytest.mark.parametrize(("select_by", "best"), [("accuracy", 2), ("loss", 0)])
def test_the_best_seed_is_that_of_the_validation_split(select_by: str, best: int) -> None:
    results = [
        result(0, 0.9, validation=0.90, loss=0.1),
        result(1, 1.0, validation=0.95, loss=0.3),
        result(2, 0.8, validation=0.95, loss=0.2),
    ]
    assert best_on_validation(results, select_by=select_by).seed == best


def test_the_row_for_the_records_is_one_of_the_readme() -> None:
    row = "| `digits` | 90.0 % ± 10.0 | there are none | 8 s | `make run RECIPE=digits SEEDS=3` |"
    assert record_row(summary(0.9, 0.8, 1.0)) == row
    assert f"  {row}" in as_text(summary(0.9, 0.8, 1.0)).splitlines()


def test_the_page_of_an_unfinished_parent_names_the_missing_seed_and_the_reason() -> None:
    text = as_markdown(summary(0.9, 0.8), mlflow_link="http://127.0.0.1:5000")
    assert "2 of 3 seeds are finished" in text
    assert "- seed 2: train\\: out of memory" in text
    assert "resumes with them: `make run RECIPE=digits SEEDS=3`" in text
    assert "±" not in text


def test_seeds_of_two_days_differ_and_a_day_begins_at_midnight_utc() -> None:
    night = datetime(2026, 1, 2, 2, 30, tzinfo=UTC)
    assert seed_of_day(night) == 20455
    assert seed_of_day(night.astimezone(timezone(timedelta(hours=-8)))) == 20455
    tomorrow = seed_of_day(night + timedelta(days=1), seeds=5)
    assert set(seeds_from(seed_of_day(night, seeds=5), 5)).isdisjoint(seeds_from(tomorrow, 5))


@pytest.mark.parametrize("text", ["0", "-1", "2.5", "five", "", "1 2", "9999999999"])
def test_a_number_of_seeds_that_is_not_allowed_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"^--seeds: found .*; allowed: a whole number of 1 or more"):
        parse_seeds(text)
    with pytest.raises(UserError, match="allowed: seeds below 4294967296"):
        seeds_from(2**32 - 1, 2)


class FullPool:
    """A Prefect client whose flow runs wait for a place in the work pool until they are canceled."""

    def __init__(self) -> None:
        self.canceled: list[UUID] = []

    def read_flow_run(self, run_id: UUID) -> Any:
        return SimpleNamespace(id=run_id, state=Scheduled())

    def set_flow_run_state(self, run_id: UUID, state: State[Any]) -> Any:
        self.canceled.append(run_id)
        return SimpleNamespace(state=state)


def test_a_parent_trains_seeds_itself_where_the_pool_starts_none(monkeypatch: pytest.MonkeyPatch) -> None:
    client, waiting = FullPool(), {3: UUID(int=3), 4: UUID(int=4)}
    monkeypatch.setattr(seeds_pool, "brief_client", lambda **_options: nullcontext(client))
    monkeypatch.setattr(seeds_pool, "STALLED_SECONDS", -1.0)
    monkeypatch.setattr(seeds_pool, "POLL_SECONDS", 0.0)
    assert list(seeds_pool._wait(waiting)) == [(3, None), (4, None)]
    assert client.canceled == [UUID(int=3), UUID(int=4)]
    assert waiting == {}


def test_a_seed_of_the_day_and_one_among_the_overrides_contradict_each_other() -> None:
    overrides = Overrides.model_validate({"train.seed": 3})
    assert flow_run.choose_overrides(overrides, seeds=1, vary_seed=False) == {"train.seed": 3}
    with pytest.raises(UserError, match=r"vary_seed: found true, and train.seed=3 among the overrides; allowed"):
        flow_run.choose_overrides(overrides, seeds=1, vary_seed=True)
