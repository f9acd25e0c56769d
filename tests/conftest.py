"""Fixtures and helpers of all tests: small data sets, MLflow and Prefect stores, and copies of the project."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from xdist.scheduler import LoadFileScheduling

from flows import server
from flows.ports import free_port
from pipeline.artifacts import replace_folder
from pipeline.core.settings import get_settings
from pipeline.core.yaml import read_yaml
from pipeline.models.cpu_kernels import use_cpu_kernels
from pipeline.params import Params, TrainParams, check_params
from pipeline.parquet import files_path, write_files
from tests.forked import Process

server.START_SECONDS = 1200  # a start takes long on a busy machine; pytest's timeout ends a test that hangs
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads are slower: networks are small, and all cores are busy
# threads that spin while they wait slow parallel tests down many times
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

use_cpu_kernels("portable", field="tests")  # before the first operation of PyTorch in this process

PROJECT = Path(__file__).parents[1]
DEFAULTS = read_yaml(PROJECT / "params.yaml")
HOLD_FILE = ".hold"
# The expensive fixture of each of these test files: one worker creates it once for all files that use it.
FIXTURE_OF_FILE = {
    "test_reproduce": "recorded",
    "test_trace": "recorded",
    "test_flows": "api_url",
    "test_doctor": "api_url",
    "test_live_progress": "api_url",
}


class Scheduling(LoadFileScheduling):  # type: ignore[misc]  # it ships no types
    """A scheduler as for `--dist loadfile` that gives all files of an expensive fixture to the same worker."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return FIXTURE_OF_FILE.get(Path(file).stem, file)


# Tests that use one of these fixtures, which start servers or trainings, are marked as slow.
SLOW_FIXTURES = {
    "api_url",
    "recorded",
    "site",
    "reproduced",
    "trained",
    "mlflow_server",
    "uninterrupted",
    "tree",
    "exports",
}


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    for item in items:
        if SLOW_FIXTURES & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)  # quick files run last: all workers end together


@pytest.fixture(autouse=True)
def _fresh_settings() -> Iterator[None]:
    """Reset the cached settings and MLFLOW_TRACKING_URI, which `mlflow.set_tracking_uri` sets as well."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()
    if before is None:
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    else:
        os.environ["MLFLOW_TRACKING_URI"] = before


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    return Scheduling(config, log) if config.getoption("dist") == "loadfile" else None


def params(**changes: Any) -> Params:
    """Return the committed parameters with changes; `train__epochs=3` sets train.epochs."""
    values = json.loads(json.dumps(DEFAULTS))
    for name, value in changes.items():
        section, _, field = name.partition("__")
        values[section][field] = value
    return check_params(values, origin="test")


def train_params(**changes: Any) -> TrainParams:
    return params(**{f"train__{name}": value for name, value in changes.items()}).train


def colored_images(number: int, *, classes: int = 3, size: int = 32, channels: int = 3, seed: int = 0) -> Any:
    """Return noisy images (N, size, size, channels) uint8 with a bright stripe for the class, and labels (N,) int64."""
    generator = np.random.default_rng(seed)
    labels = np.arange(number, dtype=np.int64) % classes
    images = generator.integers(0, 120, (number, size, size, channels), dtype=np.uint8)
    width = size // classes
    for image, label in zip(images, labels, strict=True):
        image[:, label * width : (label + 1) * width] += 120
    return images, labels


def write_normalized(folder: Path, *, classes: int = 3, size: int = 32, channels: int = 3, train: int = 96) -> Path:
    """Write `artifacts/normalize/` below `folder` as the step normalize does, and return its path."""
    with replace_folder(folder / "artifacts" / "normalize") as target:
        _write_normalized(target, classes=classes, size=size, channels=channels, train=train)
    return folder / "artifacts" / "normalize"


def _write_normalized(target: Path, *, classes: int, size: int, channels: int, train: int) -> None:
    counts = {}
    for seed, (split, number) in enumerate({"train": train, "validation": 24, "test": 30}.items()):
        images, labels = colored_images(number, classes=classes, size=size, channels=channels, seed=seed)
        np.save(target / f"{split}_images.npy", images)
        np.save(target / f"{split}_labels.npy", labels)
        write_files(files_path(split, folder=target), [([f"{split}/{i}.png" for i in range(number)], range(number))])
        counts[split] = {f"class {index}": int((labels == index).sum()) for index in range(classes)}
    info = {
        "dataset": "imagefolder",
        "class_names": [f"class {index}" for index in range(classes)],
        "image_size": size,
        "channels": channels,
        "resize": "crop",
        "mean": [0.4] * channels,
        "std": [0.2] * channels,
        "counts": counts,
        "test_duplicates": [0, 3],
    }
    (target / "dataset.json").write_text(json.dumps(info))


def make_once(name: str, make: Callable[[Path], None], *, factory: pytest.TempPathFactory) -> Path:
    """Return a folder that the first worker to ask for it fills by `make`, and that no test may change."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            unfinished = folder.with_suffix(".unfinished")
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
    return folder


def make_mlflow_store(folder: Path) -> None:
    store = "import sys; from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as S; S(*sys.argv[1:])"
    command = [sys.executable, "-c", store, f"sqlite:///{folder}/mlflow.db", str(folder)]
    subprocess.run(command, check=True, capture_output=True)


def make_prefect_store(folder: Path) -> None:
    environment = {**os.environ, "PREFECT_HOME": str(folder), "PREFECT_API_URL": ""}
    command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
    subprocess.run(command, check=True, capture_output=True, env=environment)


@pytest.fixture(scope="session")
def mlflow_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an `mlflow.db` without runs, which tests copy, as creating one takes seconds."""
    return make_once("mlflow_store", make_mlflow_store, factory=tmp_path_factory)


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory, mlflow_store: Path) -> Path:
    """Return a folder with an `mlflow.db` and a `prefect.db` without runs, which tests copy."""

    def make(folder: Path) -> None:
        make_prefect_store(folder)
        shutil.copy(mlflow_store / "mlflow.db", folder)

    return make_once("stores", make, factory=tmp_path_factory)


def start_server(project: Path, stores: Path) -> str:
    """Start the Prefect server of a project that has none yet, and return the URL of its API."""
    (project / ".prefect").mkdir()
    shutil.copy(stores / "prefect.db", project / ".prefect")
    return server.start(project, port=free_port())[0].api_url


@pytest.fixture
def no_servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remove the servers that the environment names, or the fixture `api_url` of an earlier test in this process."""
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    with temporary_settings(restore_defaults={PREFECT_API_URL, PREFECT_HOME}):
        yield


@pytest.fixture(scope="session")
def api_url(tmp_path_factory: pytest.TempPathFactory, stores: Path) -> Iterator[str]:
    """Start a Prefect server for flow runs of any project, and yield the URL of its API."""
    folder = tmp_path_factory.mktemp("server")
    url = start_server(folder, stores)
    with temporary_settings({PREFECT_API_URL: url, PREFECT_HOME: folder}):
        yield url
    server.stop(folder)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow_store: Path) -> Path:
    """Change to a new folder with the committed parameters and recipes and an empty MLflow store, and return it."""
    shutil.copy(mlflow_store / "mlflow.db", tmp_path)
    for name in ("params.yaml", "recipes"):
        source = PROJECT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name)
        else:
            shutil.copy(source, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    for name in ("PIPELINE_PROJECT", "PIPELINE_EXPERIMENT", "PIPELINE_FLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def run_step(
    step: str, *, folder: Path | None = None, environment: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """Run a step in `folder` or the current folder as DVC runs it, except that slow imports are already done."""
    process = start_step(step, folder=folder, environment=environment)
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess([step], process.wait(), stdout, stderr)


def start_step(
    step: str,
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] = os.environ,
    hold: str | None = None,
    merge_stderr: bool = False,
) -> Process:
    """Start a step in `folder` or the current folder; its output can be read line by line.

    With `hold` it pauses after the first line that begins with this text until a signal arrives or `release` is called.
    `merge_stderr` sends its stderr to its stdout.
    """
    folder, environment = folder or Path.cwd(), {**environment, "PYTHONPATH": str(PROJECT)}
    if hold is not None:
        environment |= hold_at(hold, folder=folder)
        environment["PYTHONPATH"] += f"{os.pathsep}{PROJECT}"
    return Process(step, folder=folder, environment=environment, merge_stderr=merge_stderr)


def hold_at(beginning: str, *, folder: Path) -> dict[str, str]:
    """Return environment variables with which the first training below a command pauses after such a line."""
    (folder / HOLD_FILE).write_text(beginning, encoding="utf-8")
    return {"HOLD": str(folder / HOLD_FILE), "PYTHONPATH": str(PROJECT / "tests/hold")}


def release(folder: Path) -> None:
    """Resume a training that `hold_at` has paused."""
    (folder / f"{HOLD_FILE}.reached").unlink()


def read_until(beginning: str, process: Process) -> str:
    """Return the output of a process up to the first line that begins with this text."""
    output = ""
    while not (line := process.stdout.readline()).startswith(beginning):
        output += line
        assert line, output
    return output + line


def enable_interrupts() -> None:
    """Let a new child process react to Ctrl-C, which background jobs of a shell and their children ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def copy_project(target: Path) -> Path:
    """Copy the project's files as they are now into a new repository, and return its folder."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listing, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    for name in files.splitlines():
        if (PROJECT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, target / name)
    start_repository(target)
    return target


def start_repository(folder: Path, *paths: str) -> None:
    """Make the folder a git repository, and commit these paths or, without any, all files."""
    commit = ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "Start"]
    for command in (["init", "-q"], ["add", *(paths or ["."])], commit):
        subprocess.run(["git", *command], cwd=folder, check=True)


def flow_run(project: Path, *arguments: str) -> str:
    """Run the flow from the command line, with MLflow store and Prefect server of `project`; return its output."""
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    started, _ = server.start(project, port=free_port())
    done = subprocess.run(
        [sys.executable, "-m", "flows.train_classifier", *arguments],
        cwd=project,
        env=environment | {"PREFECT_API_URL": started.api_url, "PREFECT_HOME": str(project / ".prefect")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory, stores: Path) -> Iterator[Path]:
    """Yield a copy of the project with an uncommitted change, in which a flow run has trained for one epoch."""
    project = copy_project(tmp_path_factory.mktemp("recorded") / "project")
    for name in ("user.name", "user.email"):
        subprocess.run(["git", "config", name, "t"], cwd=project, check=True)
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("top_k: 5", "top_k: 3"))
    shutil.copy(stores / "mlflow.db", project)
    try:
        start_server(project, stores)
        flow_run(project, "--set", "train.epochs=1")
        yield project
    finally:
        server.stop(project)
