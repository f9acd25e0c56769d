"""The outbox: what MLflow did not receive when a run ended, queued on disk for the next training or evaluation to send.

`.cache/mlflow/<run id>/` has `run.json` (the run's pending metrics, status and end) and, if MLflow has not recorded the
finished training, a copy of that.
"""

import fcntl
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient

from pipeline.artifacts import TRAIN, cache_folder, read_json, write_json
from pipeline.core.errors import UserError, first_line
from pipeline.tracking.experiments import has_artifact_folder
from pipeline.tracking.logger import RunLogger, pending_metrics
from pipeline.tracking.search import find_run
from pipeline.tracking.store import store_md5, warn_on_failure


def outbox_folder() -> Path:
    """Return the folder with one subfolder for each queued run."""
    return cache_folder("mlflow")


def queue_run(run: RunLogger, *, status: str) -> None:
    """Write the run's pending metrics, its status and its unrecorded training to the outbox."""
    folder = outbox_folder() / run.run_id
    folder.mkdir(parents=True, exist_ok=True)
    if run.unrecorded:
        shutil.copytree(run.unrecorded, folder / run.unrecorded.name, dirs_exist_ok=True)
    now = int(time.time() * 1000)
    write_json(folder / "run.json", {"store": store_md5(), "status": status, "ended": now, **run.state()})
    print(f"MLflow does not answer: {folder} is queued for the next training or evaluation")


def queued_runs() -> list[Path]:
    """Return the `run.json` of each queued run."""
    return sorted(outbox_folder().glob("*/run.json"))


def flush_outbox() -> bool:
    """Send the queued runs to MLflow; return whether the outbox is empty then. `connect` comes first.

    One process at a time sends a run; a run that another process is sending is left to it.
    """
    for path in queued_runs():
        with warn_on_failure(f"{path.parent} stays queued"), path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _flush_run(path)
    return not queued_runs()


def _flush_run(path: Path) -> None:
    queued = _read(path)
    run_id = queued["run_id"]
    found = find_run(run_id)
    if found is None and queued["store"] != store_md5():
        return  # it is of another store; a moved project's store has another address, but the run
    if found is None:
        print(f"MLflow no longer has the run {run_id}: what was queued for it is removed", flush=True)
    elif found.is_free:
        _send(path.parent / TRAIN.name, queued)
        print(f"MLflow run {run_id}: what was queued for it is sent", flush=True)
    elif found.life != "alive":  # an alive process has resumed the run, and has the metrics from its checkpoint
        return  # it is unknown what became of the run's process; it may still need this
    path.unlink()  # first: without it, what a process killed here leaves is not sent in part again
    shutil.rmtree(path.parent)


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a `run.json`; raises OSError where it is damaged, so that the other runs are sent."""
    try:
        content = read_json(path)
        queued = {name: content[name] for name in ("store", "run_id", "status", "ended")}
        return {**queued, "pending": pending_metrics(content)}
    except (UserError, KeyError, TypeError) as error:
        raise OSError(
            f"{path} is damaged ({first_line(error)}); remove its folder if nothing in it is of use"
        ) from None


def _send(folder: Path, queued: Mapping[str, Any]) -> None:
    """Send metrics, the finished training in `folder` if that exists, and how the run ended."""
    if folder.exists() and not has_artifact_folder(queued["run_id"]):
        raise OSError(f"the folder of artifacts of MLflow run {queued['run_id']} no longer exists")
    run = RunLogger(queued["run_id"], pending=queued["pending"])
    sent = run.flush()
    if folder.exists():
        with mlflow.start_run(run_id=run.run_id):
            run.log_training(folder)
    MlflowClient().set_terminated(run.run_id, queued["status"], queued["ended"])
    if not sent or run.unrecorded:
        raise OSError("MLflow stopped answering again")
