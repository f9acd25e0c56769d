"""What was kept while MLflow did not answer is delivered once, whatever is killed."""

import shutil
from pathlib import Path

import mlflow
import pytest

from pipeline.artifacts import write_json
from pipeline.tracking import runs as tracking


def test_what_a_killed_removal_left_is_not_delivered_again(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking.connect()
    client = mlflow.MlflowClient()
    run_id = client.create_run("0").info.run_id
    client.set_terminated(run_id, "KILLED")
    folder = workspace / ".cache" / "mlflow" / run_id
    notes = {"run_id": run_id, "waiting": [["loss", 0.5, 1, 1]], "status": "FAILED", "ended": 2}
    write_json(folder / "run.json", {"store": tracking._store_md5(), **notes})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", interrupt)
        tracking.deliver()
    assert folder.exists()
    assert tracking.deliver()
    found = tracking.find_run(run_id)
    assert found
    assert (found.status, found.metrics) == ("FAILED", {"loss": 0.5})


def interrupt(folder: Path) -> None:
    (folder / "train").mkdir()  # whose files are removed already
    raise KeyboardInterrupt
