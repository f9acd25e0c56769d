"""Kill trainings at any point, resume them by the same command, and compare the results.

`python -m tests.faults.harness --kills 200` (`make faults`) prints a line for each training and the count at the end.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus, Run
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from pipeline.artifacts import file_md5
from pipeline.core.yaml import dump_yaml
from pipeline.tracking.provenance import TRAIN_OUTPUTS, tag_name
from tests.conftest import DEFAULTS, PROJECT, write_normalized

FILES = ("best.safetensors", "last.safetensors", "model.json", "history.csv", "curves.png")
# 6 steps per epoch, and more than one checkpoint in each epoch.
PARAMS = {
    "epochs": 4,
    "batch_size": 16,
    "log_every_steps": 1,
    "checkpoint_every_minutes": 0.0002,
    "cpu_threads": 1,
}
GOLDEN_RATIO = (5**0.5 - 1) / 2
# The duration of `python -m pipeline.train`, most of it for imports.
COMMAND_SECONDS = 6.0
# Events that evenly distributed kills may miss.
CHOSEN_EVENTS: tuple[tuple[str, int], ...] = (
    ("create_run before", 1),
    ("create_run after", 1),
    ("step before", 1),
    ("step after", 1),
    ("step before", 24),
    ("step after", 24),
    ("checkpoint half written", 1),
    ("checkpoint half written", 3),
    ("checkpoint written", 1),
    ("checkpoint written", 4),
    ("log_batch after", 4),
    ("finalize_logged_model before", 1),
    ("finalize_logged_model after", 1),
    ("set_terminated before", 1),
    ("set_terminated after", 1),
)


@dataclass(frozen=True)
class Result:
    """The outcome of a finished training: the MD5 of each file, and the comparable data of each MLflow run."""

    files: dict[str, str]
    runs: tuple[tuple[str, dict[str, Any]], ...]


class Site:
    """A folder for trainings, and the process that runs them."""

    def __init__(self, folder: Path, *, process: subprocess.Popen[str]) -> None:
        self._folder, self._process = folder, process
        self._count = 0
        make_template(folder / "template")

    def project(self) -> Path:
        """Make a new project, and return its folder."""
        self._count += 1
        return Path(shutil.copytree(self._folder / "template", self._folder / f"training-{self._count}"))

    def train(self, project: Path, *, kill: Any = None) -> int:
        """Run one training in the project, and return its exit status."""
        assert self._process.stdin
        assert self._process.stdout
        request = {"folder": str(project), "log": str(project / "events.txt"), "kill": kill}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def make_template(folder: Path) -> None:
    """Write a project with data, parameters and an empty MLflow store."""
    write_normalized(folder)
    values = json.loads(json.dumps(DEFAULTS))
    values["train"] |= PARAMS
    (folder / "params.yaml").write_text(dump_yaml(values))
    SqlAlchemyStore(f"sqlite:///{folder}/mlflow.db", (folder / "mlartifacts").as_uri())  # type: ignore[no-untyped-call]


@contextmanager
def open_site(folder: Path) -> Iterator[Site]:
    names = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME")
    environment = {
        name: value for name, value in os.environ.items() if name not in names and not name.startswith("PIPELINE_")
    }
    with subprocess.Popen(
        [sys.executable, "-m", "tests.faults.child"],
        cwd=PROJECT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Site(folder, process=process)
        finally:
            process.kill()


def result(project: Path) -> Result:
    """Read the outcome of a training."""
    files = {name: file_md5(project / "artifacts" / "train" / name) for name in FILES}
    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    runs = client.search_runs([found.experiment_id for found in client.search_experiments()])
    return Result(files, tuple((run.info.status, _history(client, run)) for run in runs))


def _history(client: MlflowClient, run: Run) -> dict[str, Any]:
    """Return each metric's steps and values in the order of steps; of speeds, which differ, only the steps."""
    history: dict[str, Any] = {}
    for name in run.data.metrics:
        if not name.startswith("system/"):
            points = sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, name))
            history[name] = [step for step, _ in points] if name == "speed/images_per_second" else points
    models = client.search_logged_models([run.info.experiment_id], filter_string=f"source_run_id = '{run.info.run_id}'")
    history["models"] = sum(model.status == LoggedModelStatus.READY for model in models)
    history["hashes"] = (run.data.tags.get("model.md5"), run.data.tags.get(tag_name(TRAIN_OUTPUTS)))
    return history


def train_with_kills(site: Site, kills: Sequence[Any]) -> tuple[Result, list[str]]:
    """Train, kill and resume at each event that is reached, and return the outcome and the events of the kills."""
    project, points = site.project(), list[str]()
    for kill in [*kills, None]:
        if is_done(project):
            break
        status = site.train(project, kill=kill)
        if status == 0:
            break
        assert status == -signal.SIGKILL, (project / "output.txt").read_text()
        points.append((project / "events.txt").read_text().splitlines()[-1])
    found = result(project)
    shutil.rmtree(project)
    return found, points


def differences(found: Result, uninterrupted: Result) -> str:
    """Describe the differences from an uninterrupted training."""
    lines = [f"{name} {md5}" for name, md5 in found.files.items() if uninterrupted.files[name] != md5]
    if len(found.runs) != 1 or found.runs[0][0] != uninterrupted.runs[0][0]:
        lines.append(f"runs {[status for status, _ in found.runs]}")
    history = found.runs[0][1]
    lines += [
        f"{name} {history.get(name)}" for name, value in uninterrupted.runs[0][1].items() if history.get(name) != value
    ]
    return f"DIFFERENT: {'; '.join(lines)}"


def is_done(project: Path) -> bool:
    """Return whether a killed training was complete except for its cleanup."""
    checkpoints = [path for path in (project / ".cache/checkpoints").glob("*/") if path.suffix != ".gone"]
    return (project / "artifacts/train").exists() and not checkpoints


def plans(*, events: int, seed: int) -> Iterator[list[Any]]:
    """Yield without end the events at which to kill a training: a chosen or evenly distributed one, then a random one.

    A training that ends before its second event is killed only once.
    """
    draw = random.Random(seed)
    for point in CHOSEN_EVENTS:
        yield [list(point), draw.randrange(1, events)]
    for number in itertools.count():  # events that divide the training ever more finely
        yield [1 + int(events * (number * GOLDEN_RATIO % 1)), draw.randrange(1, events)]


def kill_commands(project: Path, *, kills: int, seed: int) -> list[float]:
    """Run `python -m pipeline.train` until it is done, with up to `kills` kills; return the seconds before each."""
    draw, times = random.Random(seed), list[float]()
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "MLFLOW_TRACKING_URI": f"sqlite:///{project}/mlflow.db"}
    while not times or not is_done(project):
        with (project / "output.txt").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.train"], cwd=project, env=environment, stdout=output, stderr=output
            )
        seconds = draw.uniform(1, COMMAND_SECONDS)
        try:
            process.wait(seconds if len(times) < kills else None)
            assert process.returncode == 0, (project / "output.txt").read_text()
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            times.append(seconds)
    return times


def main() -> None:
    """Kill trainings, compare their outcomes, and print the number of differences."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.harness", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="at chosen points")
    parser.add_argument("--plain", type=int, default=20, help="kills of `python -m pipeline.train` at random times")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started, killed, different = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as folder, open_site(Path(folder)) as site:
        project = site.project()
        assert site.train(project) == 0, (project / "output.txt").read_text()
        uninterrupted, events = result(project), len((project / "events.txt").read_text().splitlines())
        print(f"uninterrupted: {events} events, {uninterrupted.files}", flush=True)
        for found, points in _all(site, arguments, events=events):
            killed += len(points)
            different += found != uninterrupted
            verdict = "equal" if found == uninterrupted else differences(found, uninterrupted)
            print(f"{killed:>4} kills: {', '.join(points)}: {verdict}", flush=True)
    print(f"{killed} kills in {time.monotonic() - started:.0f} s; different: {different}")
    sys.exit(1 if different else 0)


def _all(site: Site, arguments: argparse.Namespace, *, events: int) -> Iterator[tuple[Result, list[str]]]:
    """Yield the outcome of each training, and the events or times at which it was killed."""
    killed, points = 0, plans(events=events, seed=arguments.seed)
    while killed < arguments.kills:
        found, where = train_with_kills(site, next(points))
        killed += len(where)
        yield found, where
    project = site.project()
    times = kill_commands(project, kills=arguments.plain, seed=arguments.seed)
    yield result(project), [f"{seconds:.1f} s" for seconds in times]


if __name__ == "__main__":
    main()
