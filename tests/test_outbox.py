"""Metrics that are queued while MLflow does not answer are sent exactly once, also after kills."""

import shutil
from pathlib import Path

import mlflow
import pytest

from pipeline.artifacts import write_json
from pipeline.tracking.outbox import flush_outbox
from pipeline.tracking.search import find_run
from pipeline.tracking.store import connect, store_md5


def test_a_queue_whose_removal_was_killed_is_not_sent_again(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect()
    client = mlflow.MlflowClient()
    run_id = client.create_run("0").info.run_id
    client.set_terminated(run_id, "KILLED")
    folder = workspace / ".cache" / "mlflow" / run_id
    record = {"run_id": run_id, "waiting": [["loss", 0.5, 1, 1]], "status": "FAILED", "ended": 2}
    write_json(folder / "run.json", {"store": store_md5(), **record})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", interrupt)
        flush_outbox()
    assert folder.exists()
    assert flush_outbox()
    found = find_run(run_id)
    assert found
    assert (found.status, found.metrics) == ("FAILED", {"loss": 0.5})


def interrupt(folder: Path) -> None:
    (folder / "train").mkdir()  # its files are removed already, when rmtree is interrupted
    raise KeyboardInterrupt
