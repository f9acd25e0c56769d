"""The outbox: queue on disk what MLflow did not receive when a run ended; the next training or evaluation sends it.

`.cache/mlflow/<run id>/` has `run.json`, with the run's pending metrics, status and end. If MLflow did not receive the
finished training, a copy of it is there too.
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
    """Send the queued runs to MLflow, after `connect`; return whether the outbox is empty afterwards.

    A run that another process is sending at this moment is skipped.
    """
    for path in queued_runs():
        with warn_on_failure(f"{path.parent} stays queued"), path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _flush_run(path)
    return not queued_runs()


def _flush_run(path: Path) -> None:
    """Send a queued run to MLflow, and delete the run's folder in the outbox.

    The folder is deleted without sending where MLflow no longer has the run, or a live process has resumed the run. The
    folder stays where the run is in another store, or it is unknown whether the run's process is alive.
    """
    queued = _read_queued_run(path)
    run_id = queued["run_id"]
    found = find_run(run_id)
    if found is None and queued["store"] != store_md5():
        return  # the run is in another store (a moved project's store has another address, but has the run)
    if found is None:
        print(f"MLflow no longer has the run {run_id}: what was queued for it is removed", flush=True)
    elif found.is_free:
        _send(path.parent / TRAIN.name, queued)
        print(f"MLflow run {run_id}: what was queued for it is sent", flush=True)
    elif found.process_state != "alive":
        return  # it is unknown whether the run's process is alive; a later flush decides
    # Now the run is sent, or it is gone, or an alive process has resumed it with the metrics of its checkpoint. Without
    # run.json the folder no longer counts as queued, even if this process is killed before it deletes the rest.
    path.unlink()
    shutil.rmtree(path.parent)


def _read_queued_run(path: Path) -> dict[str, Any]:
    """Return the content of a `run.json`; raise OSError where it is damaged, so that only this run is skipped."""
    try:
        content = read_json(path)
        queued = {name: content[name] for name in ("store", "run_id", "status", "ended")}
        return {**queued, "pending": pending_metrics(content)}
    except (UserError, KeyError, TypeError) as error:
        raise OSError(
            f"{path} is damaged ({first_line(error)}); remove its folder, unless you want to repair it"
        ) from None


def _send(folder: Path, queued: Mapping[str, Any]) -> None:
    """Send the metrics, the finished training in `folder` if there is one, and the status and end of the run."""
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
