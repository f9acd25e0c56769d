"""MLflow, which nothing else imports: runs, live metrics, the data set, the model, and who made what.

The store is `mlflow.db` in the project unless MLFLOW_TRACKING_URI says otherwise. A run ends FINISHED, FAILED (an
exception) or KILLED (SIGTERM, Ctrl-C); of a run that could not end itself (SIGKILL), the next training sets it KILLED.
"""

import atexit
import fcntl
import importlib.metadata
import json
import logging
import os
import shlex
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import requests
from mlflow import MlflowClient
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.dataset_source import DatasetSource
from mlflow.data.dataset_source_registry import resolve_dataset_source
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import LoggedModelStatus, Metric, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.store.db import utils as db_utils
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.types import ColSpec, Schema
from mlflow.types.schema import DataType
from mlflow.utils.credentials import get_default_host_creds

from pipeline.artifacts import (
    CHECKSUMS,
    DOWNLOAD,
    HISTORY,
    KEPT,
    NORMALIZE,
    TRAIN,
    bytes_md5,
    file_md5,
    kept_folder,
    read_csv,
    read_json,
    write_json,
)
from pipeline.core.errors import TemporaryError, UserError, first_line, shown
from pipeline.core.git import UNKNOWN, CodeState, code_state
from pipeline.core.processes import HOST, PID, Life, life, this_process
from pipeline.core.project import artifact_folder, project_folder
from pipeline.core.settings import (
    check_recording,
    is_server,
    keep_loopback_off_proxies,
    missing_package,
    tracking_uri,
    unreachable,
)
from pipeline.core.sqlite import sqlite_path, sqlite_uri
from pipeline.core.stage_code import code_md5
from pipeline.core.yaml import read_yaml
from pipeline.params import PARAMS_FILE
from pipeline.tracking import sqlite_store
from pipeline.tracking.model_code import packaged
from pipeline.tracking.relocation import base_folder, relocate

SERVED_PACKAGES = ("torch", "torchvision", "numpy", "pandas", "pydantic", "ruamel.yaml", "safetensors")
"""What a served model imports; its requirements name the versions it was trained with."""
CONNECT_SECONDS = 5.0
FLUSH_SECONDS = 1.0
MAX_PAUSE_SECONDS = 60.0
MAX_METRICS = 500
"""In one request."""
COMMIT = "mlflow.source.git.commit"
REPRODUCES = "reproduces"
"""Tag of a run that re-makes another one: the other one's id. It is no new result."""
FLOW_RUN = "flow_run."
"""Tag `flow_run.<id>` = experiment, for each flow run that made the model or had it from DVC's cache."""
HARDWARE = "hardware."
"""Tags `hardware.<part>`: what the last bits of a model depend on."""
STALE = ("killed.reason", "dvc.experiment", "prefect.flow_run_id", "prefect.flow_run_name", "mlflow.note.content")
"""Tags that say how a run was ended, and for whom it was begun: not true of one that is taken up by another."""
TRAINING = "training"
"""Tag of a training's fingerprint."""
LOCK_FILE = Path("dvc.lock")


@dataclass(frozen=True)
class Record:
    """A run as MLflow has it; `started` is in milliseconds since the epoch."""

    run_id: str
    name: str
    status: str
    started: int
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]


class Run:
    """An MLflow run that takes metrics as they come; within `training_run`, a thread sends them about once a second.

    A training taken up again logs some steps once more: what the run has already is left out. While MLflow does not
    answer, metrics wait.
    """

    def __init__(self, run_id: str, *, has: Collection[tuple[str, int]] = (), waiting: Sequence[Metric] = ()) -> None:
        self.run_id = run_id
        self.taken_up = False
        self.unrecorded: Path | None = None
        """The folder of the training that MLflow should have, but did not take."""
        self._client = MlflowClient()
        self._has, self._waiting = set(has), list(waiting)
        self._lock, self._sending = threading.Lock(), threading.Lock()
        self._away = False

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        now = int(time.time() * 1000)
        new = [Metric(name, value, now, step) for name, value in metrics.items() if (name, step) not in self._has]
        with self._lock:
            self._waiting += new

    def flush(self) -> bool:
        """Send what waits; False where MLflow does not answer, or the thread is still waiting for its answer."""
        if not self._sending.acquire(timeout=1):
            return False
        try:
            while batch := self._waiting[:MAX_METRICS]:
                try:
                    self._client.log_batch(self.run_id, metrics=batch)
                except (MlflowException, OSError) as error:
                    self._say_away(error)
                    return False
                with self._lock:
                    del self._waiting[: len(batch)]
                if self._away:
                    self._away = False
                    print("MLflow answers again: it has all metrics now", flush=True)
            return True
        finally:
            self._sending.release()

    def _say_away(self, error: Exception) -> None:
        if not self._away:
            print(f"warning: metrics wait for MLflow, which does not answer: {_reason(error)}", flush=True)
        self._away = True

    def notes(self) -> dict[str, Any]:
        """What a checkpoint keeps, to take the run up again: its id, and the metrics that it does not have yet."""
        with self._lock:
            return {"run_id": self.run_id, "waiting": [[m.key, m.value, m.timestamp, m.step] for m in self._waiting]}

    def tag(self, tags: Mapping[str, str], *, once: bool = False) -> None:
        """Set the tags; `once`: but for those that the run has already."""
        if once:
            tags = {name: tags[name] for name in tags.keys() - self._client.get_run(self.run_id).data.tags.keys()}
        self._client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def forget(self, names: Sequence[str]) -> None:
        """Remove those of these tags that the run has."""
        for name in self._client.get_run(self.run_id).data.tags.keys() & set(names):
            self._client.delete_tag(self.run_id, name)

    def rename(self, name: str) -> None:
        """Give the run another name; an empty one leaves it as it is."""
        if name:
            self._client.update_run(self.run_id, name=name)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Set those that the run does not have: MLflow lets none be changed, not even one of another step."""
        known = self._client.get_run(self.run_id).data.params
        new = [Param(name, str(value)) for name, value in params.items() if name not in known]
        self._client.log_batch(self.run_id, params=new)

    def log_file(self, path: Path, *, folder: str | None = None) -> None:
        self._client.log_artifact(self.run_id, str(path), folder)

    def record(self, folder: Path) -> None:
        """Give MLflow the finished training in `folder`: hashes, curves and model; once more does no harm."""
        try:
            self.tag({"model.md5": file_md5(folder / "best.safetensors"), **outputs_tag(folder), **_kept_epoch(folder)})
            self.log_file(folder / "curves.png", folder="plots")
            if not self._has_model():
                log_model(folder)
        except (MlflowException, OSError) as error:
            self._say_away(error)
            self.unrecorded = folder

    def _has_model(self) -> bool:
        """Whether the run has its model; what a killed process left of one is deleted."""
        experiment = self._client.get_run(self.run_id).info.experiment_id
        models = self._client.search_logged_models([experiment], filter_string=f"source_run_id = '{self.run_id}'")
        for model in models:
            if model.status != LoggedModelStatus.READY:
                self._client.delete_logged_model(model.model_id)
        return any(model.status == LoggedModelStatus.READY for model in models)

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Send what waits about once a second, and less often while MLflow does not answer."""
        stop = threading.Event()

        def send() -> None:
            pause = FLUSH_SECONDS
            while not stop.wait(pause):
                pause = FLUSH_SECONDS if self.flush() else min(2 * pause, MAX_PAUSE_SECONDS)

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(timeout=2)


@contextmanager
def training_run(
    *,
    experiment: str,
    params: Mapping[str, Any],
    dataset: MetaDataset,
    training: str,
    hardware: Mapping[str, str] = {},
    earlier: Mapping[str, Any] | None = None,
) -> Iterator[Run]:
    """A run with its parameters, data set, origin, hardware and system metrics.

    It is a new one, unless the training of this fingerprint has one that it did not finish, or `earlier`, the notes in
    its checkpoint, names one. Raises UserError or TemporaryError where the store cannot be reached.
    """
    connect()
    check_recording(mlflow.get_tracking_uri())
    deliver()
    code = _code_state()
    with store_errors():
        run = _take_up(training, earlier=earlier) or _create_run(experiment, training=training)
        for dead in running():
            if dead.run_id != run.run_id and dead.life == "dead" and mark_killed(dead):
                print(f"MLflow run {dead.run_id} was left RUNNING by a dead process: marked KILLED", flush=True)
    status = "FAILED"
    try:
        with store_errors():
            mlflow.start_run(run_id=run.run_id, log_system_metrics=True)
            run.log_params(params)
            _log_dataset(dataset)
            if run.taken_up:
                run.forget(STALE)
                run.rename(_experiment_name())
            run.tag(
                {
                    **_origin(code),
                    "data.md5": dataset.digest,
                    **_inputs(params),
                    **{f"{HARDWARE}{name}": value for name, value in hardware.items()},
                }
            )
            _log_surroundings(run, code.difference or b"")
        with run.sending():
            yield run
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "2"  # who sent SIGTERM sends SIGKILL soon
        raise
    finally:
        _close(run, status)


def _take_up(training: str, *, earlier: Mapping[str, Any] | None) -> Run | None:
    """The run that the training began and did not finish, with what it has."""
    found = find_runs({TRAINING: training})
    if earlier:
        found = [run for run in found if run.run_id == earlier["run_id"]]
    else:
        found = [run for run in found if run.status != "FINISHED" and _is_free(run)]
    found = [run for run in found[:1] if _has_place(run.run_id)]
    if not found:
        return None
    client, run_id = MlflowClient(), found[0].run_id
    names = [name for name in found[0].metrics if not name.startswith("system/")]
    has = {(name, point.step) for name in names for point in client.get_metric_history(run_id, name)}
    run = Run(run_id, has=has, waiting=[Metric(*values) for values in earlier["waiting"]] if earlier else [])
    run.taken_up = True
    return run


def _is_free(run: Record) -> bool:
    return run.status != "RUNNING" or life(run.tags) == "dead"


def _create_run(experiment: str, *, training: str) -> Run:
    original = os.environ.get("PIPELINE_REPRODUCES")
    name = _experiment_name() or (f"reproduces-{original[:8]}" if original else None)
    tags = {TRAINING: training, **this_process()}  # by which the next process finds it, should this one be killed now
    return Run(MlflowClient().create_run(_experiment_id(experiment), run_name=name, tags=tags).info.run_id)


def _close(run: Run, status: str) -> None:
    """End the run; where MLflow does not answer, put aside what it is to have, for `deliver`."""
    sent = ended = False
    try:
        sent = run.flush()
    finally:  # else MLflow, at the end of the process, would set FINISHED
        with told(f"MLflow run {run.run_id} could not be ended"):
            mlflow.end_run(status)
            ended = True
    if sent and ended and run.unrecorded is None:
        return
    with told(f"MLflow run {run.run_id} was not closed"):
        folder = _outbox() / run.run_id
        folder.mkdir(parents=True, exist_ok=True)
        if run.unrecorded:
            shutil.copytree(run.unrecorded, folder / run.unrecorded.name, dirs_exist_ok=True)
        now = int(time.time() * 1000)
        write_json(folder / "run.json", {"store": _store_md5(), "status": status, "ended": now, **run.notes()})
        print(f"MLflow does not answer: {folder} keeps what it is to have, for the next training or evaluation")


def _outbox() -> Path:
    return kept_folder("mlflow")


def _store_md5() -> str:
    """Which store, without the password that its address may hold."""
    return bytes_md5(mlflow.get_tracking_uri().encode())


def put_aside() -> list[Path]:
    """The notes of the runs for which something is kept that MLflow should have."""
    return sorted(_outbox().glob("*/run.json"))


def deliver() -> bool:
    """Give MLflow what was put aside while it did not answer; whether nothing is left. `connect` comes first.

    One process at a time: another one that is at it is left to it.
    """
    for path in put_aside():
        with told(f"{path.parent} waits on"), path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _deliver(path)
    return not put_aside()


def _deliver(path: Path) -> None:
    notes = _read_notes(path)
    found = find_run(notes["run_id"])
    if found is None and notes["store"] != _store_md5():
        return  # it is of another store; a moved project's store has another address, but the run
    if found is None:
        print(f"MLflow no longer has the run {notes['run_id']}: what was kept for it is removed", flush=True)
    elif found.status != "RUNNING" or _is_free(found):  # else it goes on already
        _give(path.parent / TRAIN.name, notes)
        print(f"MLflow run {notes['run_id']} has now what was kept for it", flush=True)
    elif life(found.tags) != "alive":
        return  # nobody knows what became of its process; it may still want this
    path.unlink()  # first: without it, what a process killed here leaves is not delivered in part again
    shutil.rmtree(path.parent)


def _read_notes(path: Path) -> dict[str, Any]:
    """Raises OSError where they are damaged: the other runs get what was kept for them all the same."""
    try:
        notes = read_json(path)
        kept = {name: notes[name] for name in ("store", "run_id", "status", "ended")}
        return {**kept, "waiting": [Metric(*values) for values in notes["waiting"]]}
    except (UserError, KeyError, TypeError) as error:
        raise OSError(
            f"{path} is damaged ({first_line(error)}); remove its folder if nothing in it is of use"
        ) from None


def _give(folder: Path, notes: Mapping[str, Any]) -> None:
    """Metrics, the finished training in `folder` where there is one, and how the run ended."""
    if folder.exists() and not _has_place(notes["run_id"]):
        raise OSError(f"the folder of artifacts of MLflow run {notes['run_id']} no longer exists")
    run = Run(notes["run_id"], waiting=notes["waiting"])
    done = run.flush()
    if folder.exists():
        with mlflow.start_run(run_id=run.run_id):
            run.record(folder)
    MlflowClient().set_terminated(run.run_id, notes["status"], notes["ended"])
    if not done or run.unrecorded:
        raise OSError("MLflow stopped answering again")


@contextmanager
def told(what: str) -> Iterator[None]:
    """Let a training go on where MLflow fails in its midst: a line says what is missing there."""
    try:
        yield
    except (MlflowException, OSError) as error:
        print(f"warning: {what}: {_reason(error)}", flush=True)


def _reason(error: Exception) -> str:
    """What MLflow says, without the password that the address of its store may hold."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "mlflow.db"
    return first_line(error).replace(uri, shown(uri))


def run_of_model(model_md5: str, *, experiment: str) -> tuple[Run, bool]:
    """The newest run that made the model of this hash, and whether it had to be made here because there was none.

    A flow run that takes the model from DVC's cache leaves its id with it. In a reproduction, only its own runs count.
    Raises UserError where the store cannot be reached.
    """
    connect()
    check_recording(mlflow.get_tracking_uri())
    deliver()
    found = makers(model_md5, reproduces=os.environ.get("PIPELINE_REPRODUCES"))
    with store_errors():
        client = MlflowClient()
        found = [run for run in found[:1] if _has_place(run.run_id)]
        if found:
            run = Run(found[0].run_id)
            run.tag(_flow_run())
            return run, False
        tags = _origin(_code_state()) | {"model.md5": model_md5}
        made = client.create_run(_experiment_id(experiment), tags=tags)
        client.set_terminated(made.info.run_id)
        return Run(made.info.run_id), True


def find_runs(tags: Mapping[str, str]) -> list[Record]:
    """The runs with all of these tags (`%` stands for anything), newest first; `connect` comes first."""
    conditions = [f"tags.`{name}` {'LIKE' if '%' in value else '='} '{value}'" for name, value in tags.items()]
    with store_errors():
        runs = mlflow.search_runs(
            search_all_experiments=True,
            filter_string=" and ".join(conditions),
            order_by=["attributes.start_time DESC"],
            output_format="list",
        )
    return [_as_record(run) for run in runs]


def makers(model_md5: str, *, reproduces: str | None = None) -> list[Record]:
    """The runs that made the model of this hash, newest first: no reproductions, or only those of that run."""
    return [run for run in find_runs({"model.md5": model_md5}) if run.tags.get(REPRODUCES) == reproduces]


def find_run(run_id: str) -> Record | None:
    """The run of this id, if there is one."""
    with store_errors():
        try:
            return _as_record(MlflowClient().get_run(run_id))
        except MlflowException as error:
            if error.error_code in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
                return None
            raise


def _as_record(run: mlflow.entities.Run) -> Record:
    info, data = run.info, run.data
    return Record(
        info.run_id,
        info.run_name,
        info.status,
        info.start_time,
        dict(data.tags),
        dict(data.params),
        dict(data.metrics),
    )


def read_file(run: Record, name: str) -> bytes | None:
    """A file recorded with the run, or None where there is none of this name."""
    with store_errors():
        folder, _, _ = name.rpartition("/")
        if name not in {file.path for file in MlflowClient().list_artifacts(run.run_id, folder or None)}:
            return None
        with tempfile.TemporaryDirectory() as target:
            return Path(mlflow.artifacts.download_artifacts(f"runs:/{run.run_id}/{name}", dst_path=target)).read_bytes()


def recorded_model(run: Record) -> str | None:
    """MD5 of the weights that MLflow keeps of the run's model, or None where it keeps none."""
    with tempfile.TemporaryDirectory() as target:
        try:
            folder = mlflow.artifacts.download_artifacts(f"runs:/{run.run_id}/model", dst_path=target)
        except (MlflowException, OSError):
            return None
        return next((file_md5(path) for path in sorted(Path(folder).rglob("best.safetensors"))), None)


@dataclass(frozen=True)
class Running:
    """A run of ours that MLflow holds to be running, and what became of its process."""

    run_id: str
    name: str
    host: str
    pid: str
    life: Life


def running() -> list[Running]:
    """The RUNNING runs that say which process makes them; `connect` comes first."""
    query = f"attributes.status = 'RUNNING' and tags.`{HOST}` LIKE '%'"
    with store_errors():
        runs = mlflow.search_runs(search_all_experiments=True, filter_string=query, output_format="list")
    return [
        Running(run.info.run_id, run.info.run_name, run.data.tags[HOST], run.data.tags[PID], life(run.data.tags))
        for run in runs
    ]


def mark_killed(run: Running) -> bool:
    """End a run whose process is dead, with a tag that says so; False where it has ended meanwhile."""
    reason = f"process {run.pid} on {run.host} ended without ending the run; found at {time.strftime('%F %T%z')}"
    with store_errors():
        client = MlflowClient()
        if client.get_run(run.run_id).info.status != "RUNNING":
            return False
        client.set_tag(run.run_id, "killed.reason", reason)
        client.set_terminated(run.run_id, "KILLED")
    return True


def connect() -> None:
    """Point MLflow to its store; raises TemporaryError where a server, UserError where a file cannot be reached."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # of a server that went away: the defaults, 7 retries and 120 s each, take minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ["MLFLOW_ENABLE_ASYNC_LOGGING"] = "false"  # `Run` sends in a thread of its own, and needs the errors
    keep_loopback_off_proxies()
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    project = project_folder()
    uri = tracking_uri(project)
    if line := relocate(uri, project):
        print(line, file=sys.stderr, flush=True)
    if shown(uri) != uri:
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # it would print the password too
    with store_errors():
        if is_server(uri):
            _ask_server(uri)
        else:
            _make_store(uri)
    mlflow.set_tracking_uri(uri)
    mlflow.set_system_metrics_sampling_interval(2)  # type: ignore[no-untyped-call]
    mlflow.set_system_metrics_samples_before_logging(1)  # type: ignore[no-untyped-call]


def _ask_server(uri: str) -> None:
    """Raise TemporaryError where no MLflow server answers, UserError where its address cannot be one."""
    creds = get_default_host_creds(uri)  # type: ignore[no-untyped-call]
    try:
        response = requests.get(
            f"{uri.rstrip('/')}/health",
            timeout=CONNECT_SECONDS,
            # as MLflow's own client has them, from MLFLOW_TRACKING_…
            auth=(creds.username, creds.password) if creds.username and creds.password else None,
            headers={"Authorization": f"Bearer {creds.token}"} if creds.token and not creds.username else {},
            verify=creds.verify,
            cert=creds.client_cert_path,
        )
        if response.status_code not in (401, 403):  # which the health check alone may be, under another login
            response.raise_for_status()
    except requests.exceptions.InvalidURL as error:
        raise UserError(unreachable(uri, type(error).__name__)) from None
    except requests.RequestException as error:
        raise TemporaryError(unreachable(uri, type(error).__name__)) from None


def _make_store(uri: str) -> None:
    """Make the tables of a database, with artifacts in the project; MLflow would put them below the current folder.

    One process at a time, since MLflow fails where two make them at once.
    """
    folder = artifact_folder(project_folder())
    folder.mkdir(parents=True, exist_ok=True)
    _link_migrations()
    if path := sqlite_path(uri):
        sqlite_store.ensure_store(path, tool=sqlite_store.MLFLOW, migrate=_migrate)
        return
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        SqlAlchemyStore(uri, folder.as_uri())  # type: ignore[no-untyped-call]


def _migrate(copy: Path, _lock: int) -> None:
    """Bring a database, or an empty file, to the schema of the installed MLflow."""
    uri = sqlite_uri(copy)
    engine = db_utils.create_sqlalchemy_engine(uri)  # type: ignore[no-untyped-call]
    if not db_utils._is_empty_database(engine):  # type: ignore[no-untyped-call]
        db_utils._upgrade_db(engine)  # type: ignore[no-untyped-call]
    engine.dispose()
    store = SqlAlchemyStore(uri, artifact_folder(project_folder()).as_uri())  # type: ignore[no-untyped-call]
    store.engine.dispose()


def _link_migrations() -> None:
    """Let MLflow find its migrations by a link where its path has a `%`."""
    package = Path(db_utils._get_package_dir())  # type: ignore[no-untyped-call]
    if "%" in str(package):
        for_life = ExitStack()
        atexit.register(for_life.close)
        plain = for_life.enter_context(sqlite_store.without_percent(package))
        db_utils._get_package_dir = lambda: str(plain)


@contextmanager
def store_errors() -> Iterator[None]:
    """Tell MLflow's failures in one line: TemporaryError for a server, UserError for a file or a database."""
    try:
        yield
    except (MlflowException, OSError, ValueError, ImportError) as error:
        if isinstance(error, UserError):
            raise
        uri = os.environ.get("MLFLOW_TRACKING_URI") or "mlflow.db"
        if isinstance(error, ImportError):
            raise UserError(missing_package(uri, error.name)) from None
        kind = TemporaryError if is_server(uri) else UserError
        raise kind(unreachable(uri, _reason(error))) from None


def _experiment_id(name: str) -> str:
    """The experiment's id; it is made where it does not exist, its artifacts in the project for a local store.

    MLFLOW_EXPERIMENT_NAME or MLFLOW_EXPERIMENT_ID choose another one than `name`.
    """
    client = MlflowClient()
    chosen, chosen_id = (os.environ.get(f"MLFLOW_EXPERIMENT_{part}") for part in ("NAME", "ID"))
    name = chosen or name
    found = _experiment_of_id(chosen_id) if chosen_id else client.get_experiment_by_name(name)
    if found is None:
        return _create_experiment(name)
    if chosen and found.name != chosen:
        raise UserError(
            f"MLFLOW_EXPERIMENT_ID: found {chosen_id}, the experiment {found.name}, but MLFLOW_EXPERIMENT_NAME is "
            f"{chosen}; allowed: one of the two, or both of one experiment; unset one"
        )
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"MLflow's experiment {found.name} is deleted; `mlflow experiments restore -x {found.experiment_id}` "
            "brings it back, MLFLOW_EXPERIMENT_NAME=… takes another"
        )
    _check_place(found)
    return str(found.experiment_id)


def _check_place(experiment: mlflow.entities.Experiment) -> None:
    """Raise UserError where the experiment's artifacts would be written to a folder that has to be made again.

    So it is after a project was moved, in a store outside it: which of the paths there were its own, nobody knows.
    """
    folder = _missing_place(experiment.artifact_location)
    if folder is None or not MlflowClient().search_runs([experiment.experiment_id], "", ViewType.ALL, max_results=1):
        return
    here = artifact_folder(project_folder())
    remedy = f"`mkdir -p {shlex.quote(str(folder))}` makes it again"
    if folder.name == here.name:
        parent, *link = (shlex.quote(str(path)) for path in (folder.parent, here, folder))
        remedy = f"`mkdir -p {parent} && ln -s {' '.join(link)}` lets it lead to this project, old runs included"
    raise UserError(
        f"MLflow's experiment {experiment.name} keeps its artifacts in {folder}, which no longer exists; was the "
        f"project moved? {remedy}; MLFLOW_EXPERIMENT_NAME=… takes another experiment"
    )


def _missing_place(location: str) -> Path | None:
    """The folder of artifacts that a location is in, where that is a local one that does not exist."""
    folder = None if is_server(mlflow.get_tracking_uri()) else base_folder(location)
    return None if folder is None or folder.exists() else folder


def _has_place(run_id: str) -> bool:
    """Whether the folder exists in which the run's experiment keeps, or kept, its artifacts."""
    location = MlflowClient().get_run(run_id).info.artifact_uri  # …/<run id>/artifacts
    return _missing_place(location.rstrip("/").rsplit("/", 2)[0]) is None


def _create_experiment(name: str) -> str:
    client = MlflowClient()
    location = None if is_server(mlflow.get_tracking_uri()) else artifact_folder(project_folder()).as_uri()
    try:
        return client.create_experiment(name, artifact_location=location)
    except MlflowException:
        if found := client.get_experiment_by_name(name):  # another process has made it meanwhile
            return str(found.experiment_id)
        raise


def _experiment_of_id(experiment_id: str) -> mlflow.entities.Experiment:
    try:
        return MlflowClient().get_experiment(experiment_id)
    except MlflowException as error:
        if error.error_code not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
            raise
        raise UserError(
            f"MLFLOW_EXPERIMENT_ID: found {experiment_id!r}; allowed: the id of an experiment in "
            f"{shown(mlflow.get_tracking_uri())}, as `mlflow experiments search` lists them; correct or unset it"
        ) from None


def _log_dataset(recorded: MetaDataset) -> None:
    try:
        mlflow.log_input(recorded, context="training")
    except MlflowException:  # of two runs that start at once, one adds the row of a new data set, which the other finds
        mlflow.log_input(recorded, context="training")


def dataset(name: str, *, source: str | None, digest: str) -> MetaDataset:
    """What MLflow shows of the data: `source` is a URL or a folder, None for data that a package brings."""
    with warnings.catch_warnings():  # MLflow finds two names for the same kind of folder
        warnings.simplefilter("ignore", UserWarning)
        origin: DatasetSource = CodeDatasetSource(tags={}) if source is None else resolve_dataset_source(source)
    return MetaDataset(origin, name=name, digest=digest)  # type: ignore[abstract]


def _code_state() -> CodeState:
    """The code of this project; a warning is printed where git cannot answer."""
    found = code_state(Path.cwd(), tracked=str(PARAMS_FILE))
    if found.problem:
        print(f"warning: the run is recorded with unknown code, and cannot be reproduced: {found.problem}", flush=True)
    return found


def _origin(code: CodeState) -> dict[str, str]:
    """Tags that lead from a run to its code, its experiment, its flow run and its process."""
    flow_run_id, link = (os.environ.get(f"PIPELINE_FLOW_RUN_{name}", "") for name in ("ID", "LINK"))
    tags = {
        "mlflow.source.name": "python -m pipeline.train",
        COMMIT: code.commit or UNKNOWN,
        "git.dirty": code.dirty,
        "code.md5": code_md5("train"),
        "dvc.experiment": _experiment_name(),
        "prefect.flow_run_id": flow_run_id,
        "prefect.flow_run_name": os.environ.get("PIPELINE_FLOW_RUN_NAME", ""),
        "mlflow.note.content": f"[Prefect flow run]({link})" if link else "",
        REPRODUCES: os.environ.get("PIPELINE_REPRODUCES", ""),
    }
    return {name: value for name, value in tags.items() if value} | _flow_run() | this_process()


def _experiment_name() -> str:
    """The DVC experiment that is being made, by a flow run or by `dvc exp run`; empty where none is."""
    if "PIPELINE_EXPERIMENT" in os.environ:
        return os.environ["PIPELINE_EXPERIMENT"]
    return os.environ.get("DVC_EXP_NAME", "")


def _flow_run() -> dict[str, str]:
    flow_run_id = os.environ.get("PIPELINE_FLOW_RUN_ID")
    return {f"{FLOW_RUN}{flow_run_id}": os.environ.get("PIPELINE_EXPERIMENT", "")} if flow_run_id else {}


def _inputs(params: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of the parameters, of the file of weights they name, and of the data as DVC has them."""
    text = json.dumps(params, sort_keys=True, default=str)
    tags = {"params.md5": bytes_md5(text.encode())}
    if params.get("train.weights_md5"):
        tags["weights.md5"] = params["train.weights_md5"]
    names = {f"dvc.{folder.name}": str(folder) for folder in (DOWNLOAD, NORMALIZE)}
    try:
        stages = read_yaml(LOCK_FILE).get("stages", {}) if LOCK_FILE.exists() else {}
        made = {out["path"]: out.get("md5") for stage in stages.values() for out in stage.get("outs", [])}
    except (UserError, AttributeError, KeyError, TypeError) as error:
        print(f"warning: the run is recorded without DVC's hashes of the data: {first_line(error)}", flush=True)
        return tags | dict.fromkeys(names, UNKNOWN)
    return tags | {name: made[path] for name, path in names.items() if made.get(path)}


def outputs_tag(folder: Path, *, names: Sequence[str] = ()) -> dict[str, str]:
    """Tag `outputs.<step>`: the MD5 of each file that the step wrote, as JSON; all of the folder without `names`."""
    everything = (path for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS)
    files = [folder / name for name in names] or sorted(everything)
    return {f"outputs.{folder.name}": json.dumps({path.name: file_md5(path) for path in files})}


def _kept_epoch(folder: Path) -> dict[str, str]:
    """Tags `kept.epoch` and `kept.reason`: which epoch the recorded model is of, and why that one."""
    kept = [row for row in read_csv(folder / HISTORY) if row.get(KEPT)]
    return {"kept.epoch": kept[0]["epoch"], "kept.reason": kept[0][KEPT]} if kept else {}


def _log_surroundings(run: Run, difference: bytes) -> None:
    """Keep what differs from the commit, and the installed versions, beside the run."""
    with tempfile.TemporaryDirectory() as folder:
        if difference:
            path = Path(folder) / "uncommitted.diff"
            path.write_bytes(difference)
            run.log_file(path)
        path = Path(folder) / "packages.txt"
        path.write_text("".join(f"{line}\n" for line in _packages()), encoding="utf-8")
        run.log_file(path)


def _packages() -> list[str]:
    found = [(each.metadata["Name"], each.metadata["Version"]) for each in importlib.metadata.distributions()]
    return sorted({f"{name}=={version or UNKNOWN}" for name, version in found if name}, key=str.lower)


def log_model(folder: Path) -> None:
    """Record the model in the active run, for `mlflow.pyfunc.load_model` and `mlflow models serve`, without a pickle.

    Input: images (N, H, W, C) of whole numbers from 0 to 255. Output: a table with `predicted_class` and a column of
    probabilities for each class. The signature has no input: MLflow would cast to its type before the model sees that
    a value is a fraction, negative or too large.
    """
    values = read_json(folder / "model.json")
    size, channels = values["image_size"], values["channels"]
    probabilities = [ColSpec(DataType.double, name) for name in values["class_names"]]
    columns = [ColSpec(DataType.string, "predicted_class"), *probabilities]
    # MLflow asks for an example, which it would trace for half a minute
    with warnings.catch_warnings(), packaged() as code:
        warnings.simplefilter("ignore", UserWarning)
        mlflow.pyfunc.log_model(
            name="model",
            python_model=str(code.entry),
            artifacts={
                "weights": str(folder / "best.safetensors"),
                "config": str(folder / "model.json"),
                "checksums": str(folder / CHECKSUMS),  # for who fetches it
            },
            code_paths=[str(code.package)],
            signature=ModelSignature(outputs=Schema(list(columns))),
            metadata={"inputs": f"images (N, {size}, {size}, {channels}) of whole numbers from 0 to 255"},
            pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in (*SERVED_PACKAGES, "mlflow")],
        )


def fetch_model(uri: str) -> Path:
    """The folder with the weights of a recorded model, such as `runs:/<run id>/model` or `models:/<name>/<version>`.

    Only weights and configuration are used of it; no code that lies beside them is run. Raises UserError where there is
    no such model.
    """
    connect()
    try:
        folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri))
    except (MlflowException, OSError) as error:
        raise UserError(
            f"--model {uri}: not to be had from MLflow ({first_line(error)}); `make ui` shows the runs and their models"
        ) from None
    return next((path.parent for path in sorted(folder.rglob("model.json"))), folder)
