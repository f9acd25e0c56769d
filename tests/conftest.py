"""Small data sets that the pipeline itself could have made, and a copy of the project to run it in."""

import fcntl
import json
import os
import random
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

from flows import ports, server
from pipeline.artifacts import replace_folder
from pipeline.core.settings import get_settings
from pipeline.core.yaml import read_yaml
from pipeline.models.cpu_kernels import use_cpu_kernels
from pipeline.params import Params, TrainParams, check_params
from tests.forked import Process

server.START_SECONDS = 1200  # on a busy machine; pytest's timeout comes first
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more cost time: networks are small, and the cores are taken
# threads that spin while they wait for one another make tests side by side many times as slow
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

use_cpu_kernels("portable", field="tests")  # before the first operation of PyTorch in this process

PROJECT = Path(__file__).parents[1]
DEFAULTS = read_yaml(PROJECT / "params.yaml")
HOLD = ".hold"
TOGETHER = {"test_reproduce": "recorded", "test_trace": "recorded", "test_flows": "api_url", "test_doctor": "api_url"}
"""Files, by the costly fixture that one worker makes for all of them."""


class Scheduling(LoadFileScheduling):  # type: ignore[misc]  # it ships no types
    """`--dist loadfile`, but the files of a costly fixture count as one."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return TOGETHER.get(Path(file).stem, file)


SLOW = {"api_url", "recorded", "site", "reproduced", "trained", "mlflow_server", "whole", "tree"}
"""Fixtures that start servers or trainings."""


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    for item in items:
        if SLOW & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)  # quick files last: all workers end together


@pytest.fixture(autouse=True)
def _fresh_settings() -> Iterator[None]:
    """Leave no test the settings of an earlier one, or its store: `mlflow.set_tracking_uri` sets the variable too."""
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
    """The committed parameters with `train__epochs=3`-like changes."""
    values = json.loads(json.dumps(DEFAULTS))
    for name, value in changes.items():
        section, _, field = name.partition("__")
        values[section][field] = value
    return check_params(values, origin="test")


def train_params(**changes: Any) -> TrainParams:
    return params(**{f"train__{name}": value for name, value in changes.items()}).train


def coloured_images(number: int, *, classes: int = 3, size: int = 32, channels: int = 3, seed: int = 0) -> Any:
    """Images (N, S, S, C) uint8 whose class shows as a bright stripe, with noise; and labels (N,) int64."""
    generator = np.random.default_rng(seed)
    labels = np.arange(number, dtype=np.int64) % classes
    images = generator.integers(0, 120, (number, size, size, channels), dtype=np.uint8)
    width = size // classes
    for image, label in zip(images, labels, strict=True):
        image[:, label * width : (label + 1) * width] += 120
    return images, labels


def write_normalized(folder: Path, *, classes: int = 3, size: int = 32, channels: int = 3, train: int = 96) -> Path:
    """`artifacts/normalize/` below `folder`, as the normalize step leaves it."""
    with replace_folder(folder / "artifacts" / "normalize") as target:
        _write_normalized(target, classes=classes, size=size, channels=channels, train=train)
    return folder / "artifacts" / "normalize"


def _write_normalized(target: Path, *, classes: int, size: int, channels: int, train: int) -> None:
    counts = {}
    for seed, (split, number) in enumerate({"train": train, "validation": 24, "test": 30}.items()):
        images, labels = coloured_images(number, classes=classes, size=size, channels=channels, seed=seed)
        np.save(target / f"{split}_images.npy", images)
        np.save(target / f"{split}_labels.npy", labels)
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


def made_once(name: str, make: Callable[[Path], None], *, factory: pytest.TempPathFactory) -> Path:
    """A folder that the first of the workers to ask for it fills, and that none changes."""
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
    """Folder of an `mlflow.db` without a run, to be copied: to make one takes seconds."""
    return made_once("mlflow_store", make_mlflow_store, factory=tmp_path_factory)


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory, mlflow_store: Path) -> Path:
    """Folder of `mlflow.db` and `prefect.db` without a run, to be copied."""

    def make(folder: Path) -> None:
        make_prefect_store(folder)
        shutil.copy(mlflow_store / "mlflow.db", folder)

    return made_once("stores", make, factory=tmp_path_factory)


def start_server(project: Path, stores: Path) -> str:
    """Start the Prefect server of a project that has none yet; gives its API's address."""
    (project / ".prefect").mkdir()
    shutil.copy(stores / "prefect.db", project / ".prefect")
    return server.start(project, port=free_port())[0].api_url


@pytest.fixture(scope="session")
def api_url(tmp_path_factory: pytest.TempPathFactory, stores: Path) -> Iterator[str]:
    """A Prefect server for flow runs of any project."""
    folder = tmp_path_factory.mktemp("server")
    url = start_server(folder, stores)
    with temporary_settings({PREFECT_API_URL: url, PREFECT_HOME: folder}):
        yield url
    server.stop(folder)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow_store: Path) -> Path:
    """An empty current folder with the committed parameters and recipes, and an MLflow store of its own."""
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
    """Run a step as DVC runs it, but for the imports, in `folder` or the current one."""
    process = start_step(step, folder=folder, environment=environment)
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess([step], process.wait(), stdout, stderr)


def start_step(
    step: str,
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] = os.environ,
    hold: str | None = None,
    joined: bool = False,
) -> Process:
    """Start a step in `folder` or the current one; each line that it prints comes at once.

    With `hold` it waits, once it has printed a line that begins so, until it is ended or `release` is called.
    """
    folder, environment = folder or Path.cwd(), {**environment, "PYTHONPATH": str(PROJECT)}
    if hold is not None:
        environment |= hold_at(hold, folder=folder)
        environment["PYTHONPATH"] += f"{os.pathsep}{PROJECT}"
    return Process(step, folder=folder, environment=environment, joined=joined)


def hold_at(line: str, *, folder: Path) -> dict[str, str]:
    """The variables of a command below which the first training to print such a line waits there."""
    (folder / HOLD).write_text(line, encoding="utf-8")
    return {"HOLD": str(folder / HOLD), "PYTHONPATH": str(PROJECT / "tests/hold")}


def release(folder: Path) -> None:
    """Resume a training that waits at its line."""
    (folder / f"{HOLD}.reached").unlink()


def read_until(beginning: str, process: Process) -> str:
    """What a process prints, up to a line that begins so."""
    read = ""
    while not (line := process.stdout.readline()).startswith(beginning):
        read += line
        assert line, read
    return read + line


def heed_interrupts() -> None:
    """For a child's start: shells let what they put into the background ignore Ctrl-C, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def copy_project(target: Path) -> Path:
    """A fresh repository of the project's files as they are now."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listing, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    for name in files.splitlines():
        if (PROJECT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, target / name)
    start_repository(target)
    return target


def start_repository(folder: Path, *paths: str) -> None:
    """Make a git repository of the folder, and its first commit of all that is in it or of some paths."""
    commit = ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "Start"]
    for command in (["init", "-q"], ["add", *(paths or ["."])], commit):
        subprocess.run(["git", *command], cwd=folder, check=True)


def free_port() -> int:
    """A port on loopback that nothing listens on, below those that the system gives to outgoing connections.

    It is drawn by chance, so that test processes side by side do not get the same one.
    """
    port = random.SystemRandom().randrange(10_000, 32_000)
    return port if ports.is_free(port) else free_port()


def flow_run(project: Path, *arguments: str) -> str:
    """Output of a flow run of `project`, from the command line, with MLflow store and Prefect server of its own."""
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
    """A copy of the project with an uncommitted change, in which a flow run has trained on digits for one epoch."""
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
