"""Every id of a real flow run leads to the same trace."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import lineage, server
from flows.lineage import trace
from flows.lineage_records import Trace
from flows.trace import as_json, as_text
from pipeline.core.errors import UserError
from pipeline.core.settings import get_settings
from pipeline.tracking.search import find_run
from pipeline.tracking.store import connect
from tests.conftest import flow_run


@pytest.fixture
def project(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{recorded}/mlflow.db")
    running = server.running(recorded)
    assert running
    with temporary_settings({PREFECT_API_URL: running.api_url}):
        yield recorded


@pytest.fixture
def only_trace(project: Path) -> Trace:
    [found], messages = trace(project, "HEAD")
    assert messages == []
    return found


def test_every_id_leads_to_the_same_trace(project: Path, only_trace: Trace) -> None:
    [experiment, *_], [own, *_] = only_trace.experiments, only_trace.flow_runs
    assert only_trace.run
    ids = [
        only_trace.commit,
        experiment.name,
        experiment.commit,
        only_trace.run.run_id,
        own.run_id,
        own.name,
        only_trace.run.name,
        only_trace.model_md5,
    ]
    assert all(ids)
    ids += [own.run_id.upper(), str(only_trace.model_md5).upper()]
    for wanted in ids:
        assert trace(project, str(wanted))[0] == [only_trace], wanted
    [weights] = [file for file in only_trace.files if file.path == "artifacts/train/best.safetensors"]
    assert trace(project, "path", file=Path(str(weights.cached)))[0] == [only_trace]


def test_the_first_digits_of_a_commit_or_run_are_enough(project: Path, only_trace: Trace) -> None:
    assert only_trace.run
    for full in (str(only_trace.commit), only_trace.run.run_id):
        for short in (full[:7], full[:12].upper(), full[:31]):
            assert trace(project, short)[0] == [only_trace], short
    with pytest.raises(UserError, match="no training belongs to it"):
        trace(project, only_trace.run.run_id[:6])


def test_a_short_id_of_several_is_refused_with_the_candidates(
    project: Path, only_trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert only_trace.run
    same_beginning = replace(only_trace.run, run_id=f"{str(only_trace.commit)[:7]}{'0' * 25}", name="other")
    monkeypatch.setattr(lineage, "find_runs_by_prefix", lambda _prefix: [same_beginning])
    candidates = (
        f"commit {only_trace.commit}, MLflow run {same_beginning.run_id} \\(other\\); allowed: the beginning of one"
    )
    with pytest.raises(UserError, match=candidates):
        trace(project, str(only_trace.commit)[:7])


def test_only_overridden_parameters_are_no_uncommitted_changes(only_trace: Trace) -> None:
    code = as_text(only_trace).splitlines()[0]
    assert (
        code == f"code        commit {only_trace.commit}, parameters overridden (below), no other uncommitted changes"
    )
    locked = replace(only_trace, uncommitted=("dvc.lock", "params.yaml"))
    assert as_text(locked).splitlines()[0] == code
    text = as_text(replace(only_trace, dirty=True, uncommitted=("params.yaml", "pipeline/train.py")))
    assert "with uncommitted changes\n            not committed: params.yaml, pipeline/train.py" in text


@pytest.mark.parametrize("changed", [{}, {"train.epochs": ("20", "1")}])
def test_changed_texts_are_listed_but_are_no_changed_code(changed: dict[str, tuple[str, str]]) -> None:
    found = Trace(dirty=False, uncommitted=("README.md", "params.yaml"), changed=changed)
    lines = "no uncommitted changes of code\n            not committed: README.md, params.yaml\n"
    assert as_text(found).startswith(f"code        commit not known, {lines}")


def test_a_link_that_no_server_serves_says_how_to_open_it(only_trace: Trace) -> None:
    assert f"no server runs: `make ui`, then {only_trace.run_link}" in as_text(only_trace)
    assert f"            {only_trace.run_link}\n" in as_text(replace(only_trace, run_link_served=True))


def test_a_trace_has_code_data_parameters_and_files(only_trace: Trace) -> None:
    assert (only_trace.dirty, only_trace.uncommitted) == (False, ("params.yaml",))
    assert only_trace.changed == {"train.epochs": ("20", "1"), "evaluate.top_k": ("5", "3")}
    assert only_trace.data_set == "digits"
    paths = {file.path for file in only_trace.files if file.cached and Path(file.cached).is_file()}
    assert {"artifacts/download", "artifacts/normalize", "artifacts/train/best.safetensors"} <= paths
    own = only_trace.flow_runs[0]
    assert (own.state, own.experiment) == ("Completed", only_trace.experiments[0].name)
    assert own.link
    assert own.link.endswith(own.run_id)
    assert only_trace.run
    text = as_text(only_trace)
    assert f"dvc exp apply {own.experiment}" in text
    assert f"test/accuracy {only_trace.run.metrics['test/accuracy']:.6g}" in text
    assert json.loads(as_json([only_trace], []))["traces"][0]["run"]["tags"]["model.md5"] == only_trace.model_md5


def test_a_fully_cached_run_leads_to_the_run_that_made_the_model(project: Path, only_trace: Trace) -> None:
    text = flow_run(project, "--set", "train.epochs=1")
    assert "train cached, evaluate cached" in " ".join(text.split())
    assert only_trace.run
    assert only_trace.run.run_id in text
    [name] = [line.split()[1] for line in text.splitlines() if line.startswith("experiment ")]
    [found], _ = trace(project, name)
    assert found.run
    assert found.run.run_id == only_trace.run.run_id
    [own] = [run for run in found.flow_runs if run.experiment == name]
    assert trace(project, own.run_id)[0] == trace(project, str(only_trace.model_md5))[0] == [found]


def test_the_reference_that_dvc_exp_apply_leaves_is_ignored(recorded: Path, only_trace: Trace) -> None:
    ref = "refs/exps/apply/ORIG_HEAD"  # `dvc exp apply` leaves this reference
    subprocess.run(["git", "update-ref", ref, str(only_trace.commit)], cwd=recorded, check=True)
    assert trace(recorded, str(only_trace.model_md5))[0] == [only_trace]
    subprocess.run(["git", "update-ref", "-d", ref], cwd=recorded, check=True)


def test_a_trace_without_a_prefect_server_has_the_rest(
    project: Path, only_trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "running", lambda project: None)
    with temporary_settings(restore_defaults=[PREFECT_API_URL]):
        [found], [message] = trace(project, only_trace.flow_runs[0].run_id)
    assert "Prefect was not searched" in message
    assert (found.run, found.flow_runs[0].name) == (only_trace.run, only_trace.flow_runs[0].name)


def test_a_trace_without_mlflow_has_the_experiment(
    project: Path, only_trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/none.db")
    get_settings.cache_clear()
    [found], messages = trace(project, only_trace.experiments[0].name)
    assert "MLflow has no runs yet" in messages[0]
    assert not (project / "none.db").exists()
    assert (found.commit, found.model_md5, found.data_md5) == (
        only_trace.commit,
        only_trace.model_md5,
        only_trace.data_md5,
    )
    assert found.changed == only_trace.changed


@pytest.mark.parametrize("wanted", ["nonsense", "it's", "0" * 32, "--", "00000000-0000-4000-8000-000000000000"])
def test_an_unknown_id_is_refused_with_the_places_that_were_searched(project: Path, wanted: str) -> None:
    with pytest.raises(UserError, match=r"no training belongs to it; searched: commits .* MLflow .* Prefect") as error:
        lineage.trace(project, wanted)
    assert "\n" not in str(error.value)


def test_a_closed_pipe_causes_no_traceback(project: Path) -> None:
    command = f"{sys.executable} -m flows.trace HEAD | head -c 1"
    done = subprocess.run(["sh", "-c", command], cwd=project, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("c", "")


def test_an_unknown_id_ends_with_status_2(project: Path) -> None:
    command = [sys.executable, "-m", "flows.trace", "nonsense"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr


def test_the_metrics_of_a_run_of_an_earlier_version_are_printed(workspace: Path) -> None:
    connect()
    client = mlflow.MlflowClient()
    run_id = client.create_run("0").info.run_id
    for name, value in {"loss": 0.9, "validation_accuracy": 0.75, "test_accuracy": 0.5, "selected_epoch": 2.0}.items():
        client.log_metric(run_id, name, value)
    lines = [line.strip() for line in as_text(Trace(run=find_run(run_id))).splitlines()]
    assert {"validation_accuracy 0.75", "test_accuracy 0.5", "selected_epoch 2"} <= set(lines)
    assert "loss 0.9" not in lines
