"""Kills trainings all over their lives, lets the plain command go on, and compares what comes out.

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
from tests.conftest import DEFAULTS, PROJECT, write_normalized

FILES = ("best.safetensors", "last.safetensors", "model.json", "history.csv", "curves.png")
PARAMS = {
    "epochs": 4,
    "batch_size": 16,
    "log_every_steps": 1,
    "checkpoint_every_minutes": 0.0002,
    "cpu_threads": 1,
}
"""6 steps an epoch, and more than one checkpoint in each."""
GOLDEN_RATIO = (5**0.5 - 1) / 2
PLAIN_SECONDS = 6.0
"""About as long as the plain command takes, most of it for Python's imports."""
DIRECTED: tuple[tuple[str, int], ...] = (
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
"""Points that a spread of kills may miss."""


@dataclass(frozen=True)
class Result:
    """What a finished training left: the hash of each file, and of each MLflow run what must be equal."""

    files: dict[str, str]
    runs: tuple[tuple[str, dict[str, Any]], ...]


class Site:
    """A folder for trainings, and the process that starts them."""

    def __init__(self, folder: Path, *, process: subprocess.Popen[str]) -> None:
        self._folder, self._process = folder, process
        self._count = 0
        make_template(folder / "template")

    def project(self) -> Path:
        """A fresh project."""
        self._count += 1
        return Path(shutil.copytree(self._folder / "template", self._folder / f"training-{self._count}"))

    def train(self, project: Path, *, kill: Any = None) -> int:
        """The exit status of one training in the project."""
        assert self._process.stdin
        assert self._process.stdout
        request = {"folder": str(project), "log": str(project / "events.txt"), "kill": kill}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def make_template(folder: Path) -> None:
    """A project with data, parameters and an empty MLflow store."""
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
    """Read what the training left."""
    files = {name: file_md5(project / "artifacts" / "train" / name) for name in FILES}
    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    runs = client.search_runs([found.experiment_id for found in client.search_experiments()])
    return Result(files, tuple((run.info.status, _history(client, run)) for run in runs))


def _history(client: MlflowClient, run: Run) -> dict[str, Any]:
    """Each metric's steps and values, in the order of steps; speeds differ, so only their steps."""
    history: dict[str, Any] = {}
    for name in run.data.metrics:
        if not name.startswith("system/"):
            points = sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, name))
            history[name] = [step for step, _ in points] if name == "images_per_second" else points
    models = client.search_logged_models([run.info.experiment_id], filter_string=f"source_run_id = '{run.info.run_id}'")
    history["models"] = sum(model.status == LoggedModelStatus.READY for model in models)
    history["hashes"] = (run.data.tags.get("model.md5"), run.data.tags.get("outputs.train"))
    return history


def train_with_kills(site: Site, kills: Sequence[Any]) -> tuple[Result, list[str]]:
    """A training that is killed at each of the points in turn, where it gets that far, and then goes on to its end."""
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


def differences(found: Result, whole: Result) -> str:
    """What is not as in the uninterrupted training."""
    lines = [f"{name} {md5}" for name, md5 in found.files.items() if whole.files[name] != md5]
    if len(found.runs) != 1 or found.runs[0][0] != whole.runs[0][0]:
        lines.append(f"runs {[status for status, _ in found.runs]}")
    history = found.runs[0][1]
    lines += [f"{name} {history.get(name)}" for name, value in whole.runs[0][1].items() if history.get(name) != value]
    return f"DIFFERENT: {'; '.join(lines)}"


def is_done(project: Path) -> bool:
    """Whether a process that was killed had nothing more to do but to sweep up: the result is there, whole."""
    left = [path for path in (project / ".cache/checkpoints").glob("*/") if path.suffix != ".gone"]
    return (project / "artifacts/train").exists() and not left


def plans(*, events: int, seed: int) -> Iterator[list[Any]]:
    """Points for one training after the other, without end: a directed or an even one, and one drawn at random.

    The second is left out where the training ends before it.
    """
    draw = random.Random(seed)
    for point in DIRECTED:
        yield [list(point), draw.randrange(1, events)]
    for number in itertools.count():  # ever finer shares of the life
        yield [1 + int(events * (number * GOLDEN_RATIO % 1)), draw.randrange(1, events)]


def kill_plain_commands(project: Path, *, kills: int, seed: int) -> list[float]:
    """Run `python -m pipeline.train` until it is done, killed `kills` times if it lasts; gives the seconds it had."""
    draw, times = random.Random(seed), list[float]()
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "MLFLOW_TRACKING_URI": f"sqlite:///{project}/mlflow.db"}
    while not times or not is_done(project):
        with (project / "output.txt").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.train"], cwd=project, env=environment, stdout=output, stderr=output
            )
        seconds = draw.uniform(1, PLAIN_SECONDS)
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
    """Kill, compare, count."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.harness", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="at chosen points")
    parser.add_argument("--plain", type=int, default=20, help="kills of `python -m pipeline.train` at random times")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started, killed, different = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as folder, open_site(Path(folder)) as site:
        project = site.project()
        assert site.train(project) == 0, (project / "output.txt").read_text()
        whole, events = result(project), len((project / "events.txt").read_text().splitlines())
        print(f"uninterrupted: {events} events, {whole.files}", flush=True)
        for found, points in _all(site, arguments, events=events):
            killed += len(points)
            different += found != whole
            verdict = "equal" if found == whole else differences(found, whole)
            print(f"{killed:>4} kills: {', '.join(points)}: {verdict}", flush=True)
    print(f"{killed} kills in {time.monotonic() - started:.0f} s; different: {different}")
    sys.exit(1 if different else 0)


def _all(site: Site, arguments: argparse.Namespace, *, events: int) -> Iterator[tuple[Result, list[str]]]:
    """Of each training, what it left, and where it was killed."""
    killed, points = 0, plans(events=events, seed=arguments.seed)
    while killed < arguments.kills:
        found, where = train_with_kills(site, next(points))
        killed += len(where)
        yield found, where
    project = site.project()
    times = kill_plain_commands(project, kills=arguments.plain, seed=arguments.seed)
    yield result(project), [f"{seconds:.1f} s" for seconds in times]


if __name__ == "__main__":
    main()
