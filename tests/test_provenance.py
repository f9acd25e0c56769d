"""What a run records of its origin: few tags for people, one artifact with all, a name and a description."""

import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

from flows.lineage import trace
from pipeline.artifacts import write_bytes
from pipeline.core.errors import UserError
from pipeline.core.settings import get_settings
from pipeline.tracking import logger
from pipeline.tracking.description import describe, escape_markdown
from pipeline.tracking.experiments import experiment_name
from pipeline.tracking.logger import RunLogger
from pipeline.tracking.provenance import COMMIT, NOTE, Values, output_values, result_values
from pipeline.tracking.provenance_file import add_provenance, provenance_of, read_provenance, with_provenance
from pipeline.tracking.report import log_report
from pipeline.tracking.run_title import RunSetup
from pipeline.tracking.runs import describe_dataset, find_or_create_run, training_run
from pipeline.tracking.search import Run, find_run, find_running, find_runs
from pipeline.tracking.store import connect
from tests.conftest import start_repository

MODEL = "a" * 32
SETUP = RunSetup("digits", "", {"train.epochs": (20, 3)})
HARDWARE = {"cpu": "abacus", "gpu": "none"}


def visible_tags(run_id: str) -> set[str]:
    """Return the names of the tags that MLflow's pages show."""
    return {name for name in MlflowClient().get_run(run_id).data.tags if not name.startswith("mlflow.")}


@contextmanager
def training(**more: str) -> Iterator[RunLogger]:
    dataset = describe_dataset("digits", source=None, digest="0")
    with training_run(
        experiment="digits",
        params={"train.epochs": 3},
        dataset=dataset,
        training=more.get("training", "t"),
        setup=SETUP,
        hardware=HARDWARE,
    ) as run:
        yield run


def finished_training(name: str = "t") -> str:
    with training(training=name) as run:
        run.record({"model.md5": MODEL, "outputs.train": {"best.safetensors": MODEL}, "selected.reason": "best"})
    return run.run_id


def read(run_id: str) -> Run:
    found = find_run(run_id)
    assert found
    return found


def set_variables(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    get_settings.cache_clear()


def test_a_model_that_thirty_nights_take_from_the_cache_has_at_most_ten_tags(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = ""
    for night in range(31):
        names = {"ID": f"f-{night}", "NAME": "digits epochs=3", "LINK": f"http://127.0.0.1/{night}"}
        set_variables(monkeypatch, **{f"PIPELINE_FLOW_RUN_{name}": value for name, value in names.items()})
        set_variables(monkeypatch, PIPELINE_EXPERIMENT=f"night-{night}")
        run_id = run_id or finished_training()
        run, _ = find_or_create_run(MODEL, experiment="digits")
        run.record(result_values({"accuracy": 0.5}))
    wanted = {"recipe", "git.dirty", "dvc.experiment", "prefect.flow_run_id", "prefect.flow_run_name", "model.md5"}
    assert visible_tags(run_id) == wanted
    assert [run.run_id for run in find_runs({"flow_run.f-30": "%"})] == [run_id]
    assert read(run_id).tags["flow_run.f-30"] == "night-30"


def test_a_reproduction_has_at_most_ten_tags_and_a_name_that_says_so(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = finished_training()
    assert read(original).name == "digits epochs=3"
    set_variables(monkeypatch, PIPELINE_REPRODUCES=original, PIPELINE_EXPERIMENT="")
    copy = finished_training("again")
    RunLogger(copy).set_tags({"reproduction.result": "identical"})
    assert read(copy).name == f"reproduces-{original[:8]}"
    assert visible_tags(copy) == {"recipe", "git.dirty", "model.md5", "reproduces", "reproduction.result"}


def train_and_be_killed() -> None:
    with training():
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_run_of_a_killed_training_is_found_by_its_process_and_its_training(workspace: Path) -> None:
    connect()
    process = multiprocessing.get_context("spawn").Process(target=train_and_be_killed)
    process.start()
    process.join()
    [killed] = find_running()
    assert killed.process_state == "dead"
    assert visible_tags(killed.run_id) <= {"recipe", "git.dirty"}
    with training() as run:
        assert (run.run_id, run.resumed) == (killed.run_id, True)


def test_two_processes_that_add_values_at_once_lose_none(workspace: Path) -> None:
    run_id = finished_training()
    with ThreadPoolExecutor(4) as pool:  # each opens the lock itself, as a process does
        list(pool.map(lambda number: add_provenance(run_id, {f"result.{number}": number}), range(12)))
    values = read_provenance(run_id)
    assert [values[f"result.{number}"] for number in range(12)] == list(range(12))
    assert values["outputs.train"] == {"best.safetensors": MODEL}


def test_a_later_evaluation_does_not_change_the_hashes_of_the_first(workspace: Path) -> None:
    run = RunLogger(finished_training())
    for content in (b"first", b"second"):
        write_bytes(Path("evaluate/metrics.json"), content)
        run.record(output_values(Path("evaluate")), overwrite=False)
    assert read_provenance(run.run_id)["outputs.evaluate"] == {"metrics.json": "8b04d5e3775d298e78455efc5ca404d5"}


def test_the_file_of_a_resumed_training_has_the_values_of_the_new_process_only(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_variables(monkeypatch, PIPELINE_EXPERIMENT="first", PIPELINE_FLOW_RUN_ID="f-1")
    with pytest.raises(UserError), training() as run:
        raise UserError("stop")
    set_variables(monkeypatch, PIPELINE_EXPERIMENT="second", PIPELINE_FLOW_RUN_ID="")
    with training() as resumed:
        assert resumed.run_id == run.run_id
    values, tags = read_provenance(run.run_id), read(run.run_id).tags
    assert (values["dvc.experiment"], tags["dvc.experiment"]) == ("second", "second")
    assert "prefect.flow_run_id" not in {**values, **tags}
    assert values["hardware.cpu"] == "abacus"


def test_a_damaged_file_is_refused_kept_and_written_anew_from_the_tags(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = finished_training()
    [path] = Path("mlartifacts").rglob("provenance.json")
    path.write_text('{"git": ')
    before = read(run_id).tags
    with pytest.raises(UserError, match=f"MLflow run {run_id}: its artifact provenance.json is damaged"):
        with_provenance(read(run_id))
    RunLogger(run_id).record({"result.accuracy": 0.5})
    assert "warning: MLflow run" in capsys.readouterr().out
    assert path.with_name("provenance.damaged.json").read_text() == '{"git": '
    values = read_provenance(run_id)
    assert (values["result.accuracy"], values["outputs.train"]) == (0.5, {"best.safetensors": MODEL})
    assert values["git.changed"] == "unknown"  # so that a reproduction requires the differences
    assert {name: values[name] for name in ("training", "recipe", "model.md5", "git.dirty", "git.commit")} == {
        **{name: before[name] for name in ("training", "recipe", "model.md5", "git.dirty")},
        "git.commit": before[COMMIT],
    }
    assert "Recipe digits; the parameters that differ from it are unknown." in read(run_id).tags[NOTE]


def test_a_description_that_a_user_has_edited_stays(workspace: Path) -> None:
    run = RunLogger(finished_training())
    before = read(run.run_id).tags[NOTE]
    assert "| train&#46;epochs | 20 | 3 |" in before
    run.record({"result.accuracy": 0.5})
    assert read(run.run_id).tags[NOTE].startswith("**Test accuracy 50.00%**.")
    run.set_tags({NOTE: "the one for the paper"})
    run.record({"result.accuracy": 0.75})
    assert read(run.run_id).tags[NOTE] == "the one for the paper"


def test_an_older_description_does_not_replace_a_newer_one(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunLogger(finished_training())

    def add_and_be_overtaken(run_id: str, values: Values, *, overwrite: bool) -> dict[str, Any]:
        known = add_provenance(run_id, values, overwrite=overwrite)
        monkeypatch.setattr(logger, "add_provenance", add_provenance)
        RunLogger(run_id).record({"result.accuracy": 0.75})  # as another process does it
        return known

    monkeypatch.setattr(logger, "add_provenance", add_and_be_overtaken)
    run.record({"result.accuracy": 0.25})
    assert read_provenance(run.run_id)["result.accuracy"] == 0.75
    assert read(run.run_id).tags[NOTE].startswith("**Test accuracy 75.00%**")


def test_the_description_links_a_report_once_it_is_recorded(workspace: Path) -> None:
    run = RunLogger(finished_training())
    run.record({"result.accuracy": 0.5})
    assert "report" not in read(run.run_id).tags[NOTE]
    Path("page.html").write_text("page")
    log_report(run.run_id, Path("page.html"))
    assert f"/runs/{run.run_id}/artifacts/report.html?workflowType=" in read(run.run_id).tags[NOTE]
    assert [path.read_text() for path in Path("mlartifacts").rglob("report.html")] == ["page"]


def test_names_from_outside_are_no_markup_in_a_description() -> None:
    name = "a|b `c` [x](javascript:1) <img src=x> www.host.org _e_ 0.03\n# d"
    values = {
        "recipe": name,
        "parameters.different": {"train.weights": [None, name]},
        "prefect.flow_run_id": name,
        "prefect.flow_run_link": "javascript:alert(1)",
    }
    text = describe(values, run_id="r", experiment_id="1")
    plain = escape_markdown(name)
    assert not set("|`[]<>_\n.") & set(plain.replace("0.03", ""))
    assert text.splitlines() == [
        f"- Prefect: {plain}",
        "",
        f"| parameter | recipe {plain} | this run |",
        "| --- | --- | --- |",
        f"| train&#46;weights | null | {escape_markdown(name[:59] + '…')} |",
    ]


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("/photos/birds/", "birds"),
        ("data/birds/../cats", "cats"),
        (".", "garden"),
        ("..", "home"),
        ("x/digits", "digits (images)"),
        ("/", "imagefolder"),
        ("a\x1b[31m", "a\\x1b[31m"),
    ],
)
def test_the_experiment_of_own_images_is_named_after_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, name: str
) -> None:
    (tmp_path / "home/garden").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "home/garden")
    assert experiment_name("imagefolder", folder=folder) == name
    assert experiment_name("digits", folder=folder) == "digits"


@pytest.fixture
def old_run(workspace: Path) -> Run:
    """Make a run as an earlier version did: with all values as tags, and `true` where parameters alone differ."""
    (workspace / ".gitignore").write_text("mlflow.db*\nmlartifacts/\n")
    start_repository(workspace)
    connect()
    with mlflow.start_run(tags={"model.md5": MODEL}) as started:
        commit = os.popen("git rev-parse HEAD").read().strip()
        hashes = json.dumps({"best.safetensors": MODEL, "last.safetensors": "b" * 32})
        tags = {"mlflow.source.git.commit": commit, "git.dirty": "true", "outputs.train": hashes}
        tags |= {"process.host": "h", "process.pid": "1", "hardware.cpu": "abacus", "dvc.experiment": "old-name"}
        mlflow.set_tags({**tags, "flow_run.f-9": "cached-name"})
        mlflow.log_param("train.epochs", 3)
        mlflow.log_text("diff --git a/params.yaml b/params.yaml\n", "uncommitted.diff")
    return read(started.info.run_id)


@pytest.mark.parametrize("wanted", ["old-name", "f-9", MODEL, "b" * 32])
def test_a_run_of_an_earlier_version_is_traced_by_its_tags(workspace: Path, old_run: Run, wanted: str) -> None:
    [found], _ = trace(workspace, wanted)
    assert found.run
    assert found.run.run_id == old_run.run_id
    assert (found.dirty, found.uncommitted) == (False, ("params.yaml",))
    assert [file.md5 for file in found.files] == [MODEL, "b" * 32]
    assert provenance_of(old_run).hardware == {"cpu": "abacus"}


@pytest.mark.parametrize(("name", "dirty"), [("pipeline/a.py", True), ("README.md", False)])
def test_changed_code_of_an_earlier_version_is_known_also_in_a_folder_of_a_larger_repository(
    workspace: Path, old_run: Run, name: str, dirty: bool
) -> None:
    project = workspace / "ml"
    project.mkdir()
    MlflowClient().log_text(old_run.run_id, f"diff --git a/ml/{name} b/ml/{name}\n", "uncommitted.diff")
    [found], _ = trace(project, MODEL)
    assert (found.dirty, found.uncommitted) == (dirty, (name,))


def test_a_name_of_several_runs_leads_to_all_of_them_newest_first(workspace: Path) -> None:
    (workspace / ".gitignore").write_text("mlflow.db*\nmlartifacts/\n")
    start_repository(workspace)
    first = finished_training()
    time.sleep(0.01)
    second = finished_training("other")
    found, _ = trace(workspace, "digits epochs=3")
    assert [one.run.run_id for one in found if one.run] == [second, first]


@pytest.mark.parametrize("name", ["my_images Bob's 100% x", 'my_images "odd" 100%'])
def test_a_name_with_quotation_marks_leads_to_its_run(workspace: Path, name: str) -> None:
    run_id = finished_training()
    MlflowClient().update_run(run_id, name=name)
    start_repository(workspace)
    found, _ = trace(workspace, name)
    assert [one.run.run_id for one in found if one.run] == [run_id]


def test_a_percent_sign_in_a_name_stands_for_itself(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, PIPELINE_EXPERIMENT="digits-1", PIPELINE_FLOW_RUN_ID="f")
    finished_training()
    start_repository(workspace)
    with pytest.raises(UserError, match="digits%: no training belongs to it"):
        trace(workspace, "digits%")


def test_the_provenance_of_a_run_has_plain_values(workspace: Path) -> None:
    found = provenance_of(read(finished_training()))
    assert (found.name, found.hardware, found.is_dirty) == ("digits epochs=3", HARDWARE, "unknown")
    assert found.seconds
    assert found.seconds < 60
    assert re.fullmatch(r"#/experiments/\d+/runs/\w{32}\?workflowType=machine_learning", found.page)
