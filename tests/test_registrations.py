"""A model that was evaluated is registered, at once or when MLflow answers again."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows.doctor import mlflow_runs
from pipeline.artifacts import write_json
from pipeline.core.errors import TemporaryError
from pipeline.tracking import registrations, registry
from pipeline.tracking.provenance_file import add_provenance
from pipeline.tracking.registrations import pending_registrations, register_evaluation, register_pending
from pipeline.tracking.store import connect, store_md5
from tests import test_outage
from tests.test_outage import Server
from tests.test_registry import make_run, register

mlflow_server = test_outage.mlflow_server  # a fixture


def evaluated(run_id: str, *, test: str = "b") -> None:
    metrics = {"accuracy": 0.98765, "loss": 0.1}
    md5 = {"model_md5": "a" * 32, "test_md5": test * 32, "data_md5": "d"}
    register_evaluation(run_id, experiment="digits", **md5, metrics=metrics)


def test_a_version_has_what_its_run_recorded_and_all_metrics(workspace: Path) -> None:
    connect()
    run_id = make_run()
    MlflowClient().update_run(run_id, name="digits lr=0.03")
    add_provenance(run_id, {"git.commit": "c0ffee", "dvc.experiment": "digits-lr", "hardware.cpu": "x"})
    evaluated(run_id)
    [version] = registry.find_versions("digits")
    assert version.run_id == run_id
    assert (version.tags["accuracy"], version.tags["title"]) == ("0.9877", "digits lr=0.03")
    assert json.loads(version.tags["metrics"]) == {"accuracy": 0.98765, "loss": 0.1}
    assert {name: version.tags[name] for name in ("git.commit", "dvc.experiment", "data.md5")} == {
        "git.commit": "c0ffee", "dvc.experiment": "digits-lr", "data.md5": "d",
    }  # fmt: skip
    assert "hardware.cpu" not in version.tags


def test_what_could_not_be_registered_is_registered_at_the_next_evaluation(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    connect()
    run_id = make_run()
    with monkeypatch.context() as patch:
        patch.setattr(registrations, "register_version", fail)
        evaluated(run_id)
    assert "stays queued for the next evaluation or promotion: does not answer" in capsys.readouterr().out
    [finding] = [one for one in mlflow_runs(workspace) if "registry" in one.what]
    assert finding.fix
    evaluated(run_id, test="c")
    assert not pending_registrations()
    assert len(registry.find_versions("digits")) == 2
    assert finding.fix()


def fail(**_: object) -> None:
    raise TemporaryError("does not answer")


def test_a_registration_of_a_removed_run_is_dropped_and_one_for_another_store_stays(workspace: Path) -> None:
    connect()
    for store in (store_md5(), "another"):
        identity = {"name": "digits", "run_id": "0" * 32, "model_md5": "a", "test_md5": store}
        values = {**identity, "store": store, "data.md5": "d", "metrics": {}}
        write_json(workspace / f".cache/registry/{store}.json", values)
    assert register_pending() == []
    assert [path.stem for path in pending_registrations()] == ["another"]


@pytest.mark.slow
def test_a_server_registers_each_model_once_also_after_an_outage(
    mlflow_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "exclusive", nullcontext)  # as from several machines
    connect()
    run_id = make_run()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda test: register(run_id, test=test), "bbbbcc"))
    assert {one.test_md5[0] for one in registry.find_versions("digits")} == {"b", "c"}
    assert len(registry.find_versions("digits")) == 2
    registry.set_alias("digits", "champion", registry.find_versions("digits")[0].number)
    registry.set_tag("digits", "promote.pending", "x" * registry.MAX_TAG_LENGTH)
    mlflow_server.kill()
    with pytest.raises(TemporaryError):
        registry.find_versions("digits")
    evaluated(run_id, test="d")
    mlflow_server.start()
    register_pending()
    champion = registry.version_of_alias("digits", "champion")
    assert champion
    assert champion.test_md5 == "c" * 32
    assert len(registry.find_versions("digits")) == 3
