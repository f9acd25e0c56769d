"""Log to one MLflow run: metrics while they arise, tags, parameters, files, the finished training."""

import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking.fluent import run_id_to_system_metrics_monitor

from pipeline.artifacts import BEST_WEIGHTS, bytes_md5, file_md5
from pipeline.tracking.description import describe
from pipeline.tracking.models import delete_incomplete_models, find_model, log_model
from pipeline.tracking.provenance import (
    NOTE,
    NOTE_MD5,
    Values,
    output_values,
    selected_epoch_values,
    tag_name,
    tags_of,
)
from pipeline.tracking.provenance_file import add_provenance, exclusive, read_provenance
from pipeline.tracking.store import error_reason, warn_on_failure

FLUSH_SECONDS = 1.0  # between two requests
MAX_FLUSH_SECONDS = 60.0  # between two requests while MLflow does not answer
MAX_METRICS_PER_REQUEST = 500
MAX_STOP_SECONDS = 2  # how long the end of `sending` waits for the thread
MAX_REQUEST_SECONDS = 60  # more than a request takes, including its second try, until it fails


class RunLogger:
    """A logger to one MLflow run, which queues metrics; within `sending`, a thread sends them about once a second.

    A resumed training logs some steps a second time: metrics that the run already has (`logged`) are not queued again.
    While MLflow does not answer, metrics stay in the queue.
    """

    def __init__(
        self,
        run_id: str,
        *,
        experiment_id: str | None = None,
        logged: Collection[tuple[str, int]] = (),
        pending: Sequence[Metric] = (),
        resumed: bool = False,
    ) -> None:
        self.run_id, self.experiment_id = run_id, experiment_id
        self.resumed = resumed
        self.unrecorded: Path | None = None  # the folder of a finished training that could not be recorded
        self._client = MlflowClient()
        self._logged, self._pending = set(logged), list(pending)
        self._lock, self._sending = threading.Lock(), threading.Lock()
        self._unreachable = False

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Queue the metrics of a step, which is a training step or an epoch."""
        now = int(time.time() * 1000)
        new = [Metric(name, value, now, step) for name, value in metrics.items() if (name, step) not in self._logged]
        with self._lock:
            self._pending += new

    def flush(self, *, timeout: float = 1) -> bool:
        """Send the queued metrics; return False where MLflow does not answer, or another thread is still sending.

        Waits for another thread for at most `timeout` seconds.
        """
        if not self._sending.acquire(timeout=timeout):
            return False
        try:
            while batch := self._pending[:MAX_METRICS_PER_REQUEST]:
                try:
                    self._client.log_batch(self.run_id, metrics=batch)
                except (MlflowException, OSError) as error:
                    self._warn_unreachable(error)
                    return False
                with self._lock:
                    del self._pending[: len(batch)]
                if self._unreachable:
                    self._unreachable = False
                    print("MLflow answers again: the queued metrics are sent", flush=True)
            return True
        finally:
            self._sending.release()

    def _warn_unreachable(self, error: Exception) -> None:
        """Print a warning when MLflow stops answering, but only one until it answers again."""
        if not self._unreachable:
            print(f"warning: MLflow does not answer, metrics are queued: {error_reason(error)}", flush=True)
        self._unreachable = True

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Send the queued metrics about once a second during the block, less often while MLflow does not answer."""
        stop = threading.Event()

        def send() -> None:
            pause = FLUSH_SECONDS
            while not stop.wait(pause):
                pause = FLUSH_SECONDS if self.flush() else min(2 * pause, MAX_FLUSH_SECONDS)

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(timeout=MAX_STOP_SECONDS)

    def start_system_metrics(self) -> None:
        """Record the use of CPU, memory, disk, network and GPU until the active run ends.

        The queued metrics are sent first: MLflow's compare page opens on the metric that a run received first.
        """
        self.flush()
        with warn_on_failure("the use of CPU and memory is not recorded"):
            monitor = SystemMetricsMonitor(self.run_id, resume_logging=True)  # type: ignore[no-untyped-call]
            run_id_to_system_metrics_monitor[self.run_id] = monitor  # `mlflow.end_run` stops it
            monitor.start()  # type: ignore[no-untyped-call]

    def state(self) -> dict[str, Any]:
        """Return what is needed to resume the run: its id, and the metrics that MLflow does not have yet.

        It is written to checkpoints and to the outbox. Its keys must not be renamed: existing files have them.
        """
        with self._lock:
            pending = [[metric.key, metric.value, metric.timestamp, metric.step] for metric in self._pending]
        return {"run_id": self.run_id, "waiting": pending}

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set the tags."""
        self._client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def delete_tags(self, names: Iterable[str]) -> None:
        """Delete these tags, if the run has them."""
        for name in self._client.get_run(self.run_id).data.tags.keys() & set(names):
            self._client.delete_tag(self.run_id, name)

    def record(self, values: Values, *, overwrite: bool = True) -> None:
        """Add values to the run's `provenance.json`, then set their tags and the description that follows from them.

        Without `overwrite`, a value that the run already has, in the file or as a tag of an earlier version, is not
        changed. A run that is found by a tag has the value in its file too, since the file is written first.
        """
        tags = () if overwrite else self._client.get_run(self.run_id).data.tags.keys()
        values = {name: value for name, value in values.items() if name not in tags}
        known = add_provenance(self.run_id, values, overwrite=overwrite)
        self.describe()
        self.set_tags(tags_of({name: known[name] for name in values}))

    def describe(self) -> None:
        """Set the run's description for the values of its provenance, unless a user has edited the description.

        No other process of the project changes either meanwhile, so that no older text replaces a newer one.
        """
        with exclusive():
            run = self._client.get_run(self.run_id)
            written, found = run.data.tags.get(tag_name(NOTE_MD5)), run.data.tags.get(NOTE, "")
            if (bytes_md5(found.encode()) if found else None) == written:
                values = read_provenance(self.run_id)
                text = describe(values, run_id=self.run_id, experiment_id=run.info.experiment_id)
                # one request: a text without its MD5 would count as one that a user has edited
                self.set_tags({NOTE: text, tag_name(NOTE_MD5): bytes_md5(text.encode())})

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Set the parameters that the run does not have yet.

        MLflow refuses to change a parameter. In a resumed run only those of other steps can have changed.
        """
        known = self._client.get_run(self.run_id).data.params
        new = [Param(name, str(value)) for name, value in params.items() if name not in known]
        self._client.log_batch(self.run_id, params=new)

    def log_file(self, path: Path, *, folder: str | None = None) -> None:
        """Upload a file to the run's artifacts, into `folder` there."""
        self._client.log_artifact(self.run_id, str(path), folder)

    def log_training(self, folder: Path) -> None:
        """Record the finished training in `folder`: hashes, curves, model and its validation. It can be called again.

        Where MLflow does not answer, this sets `unrecorded` to the folder and prints a warning.
        """
        try:
            model = {"model.md5": file_md5(folder / BEST_WEIGHTS)}
            self.record({**model, **output_values(folder), **selected_epoch_values(folder)})
            self.log_file(folder / "curves.png", folder="plots")
            delete_incomplete_models(self.run_id)
            if not find_model(self.run_id):
                log_model(folder)
            if not self.flush(timeout=MAX_REQUEST_SECONDS):
                raise TimeoutError("the metrics of the model are not sent yet")
            self.link_validation()
        except (MlflowException, OSError) as error:
            self._warn_unreachable(error)
            self.unrecorded = folder

    def link_validation(self) -> None:
        """Link the validation of the selected epoch to the run's model, so that MLflow compares models by it."""
        epoch = self._client.get_run(self.run_id).data.metrics.get("selected/epoch")
        if epoch is not None:  # an earlier version named it otherwise
            self.link_to_model("validation/", step=int(epoch))

    def link_to_model(self, prefix: str, *, step: int) -> None:
        """Link the run's metrics of a step whose name starts with `prefix` to its model and its data set.

        MLflow's Models page then shows them. The metrics must have been sent; those of the run do not change. Does
        nothing where the run has no model.
        """
        run, model_id = self._client.get_run(self.run_id), find_model(self.run_id)
        if model_id is None:
            return
        datasets = [found.dataset for found in run.inputs.dataset_inputs] if run.inputs else []
        of = {"dataset_name": datasets[0].name, "dataset_digest": datasets[0].digest} if datasets else {}
        names = [name for name in run.data.metrics if name.startswith(prefix)]
        points = [point for name in names for point in self._client.get_metric_history(self.run_id, name)]
        # the newest of each name; MLflow does not store an equal point of a run twice
        found = {one.key: one for one in sorted(points, key=lambda one: one.timestamp) if one.step == step}
        linked = [Metric(one.key, one.value, one.timestamp, step, model_id, **of) for one in found.values()]
        self._client.log_batch(self.run_id, metrics=linked)


def pending_metrics(state: Mapping[str, Any]) -> list[Metric]:
    """Return the queued metrics that a `RunLogger.state` holds."""
    return [Metric(*values) for values in state["waiting"]]
