"""Compare our server with `mlflow models serve`: failures, latency and throughput of the same model.

`python -m benchmarks.serving [--images FOLDER]` trains two quick models of the digits in a temporary project. It starts
both servers with the first model, as they come, and 8 clients send 1,000 requests of one image each to one server after
the other, in several rounds: to ours photographs as files and arrays as JSON, to MLflow's server the same arrays.
`--model models:/NAME/VERSION` measures another model, that of the store which the settings name.

With --change-champion, the second model becomes the champion while 8 clients send photographs to our server.

The photographs are JPEG files in the folder or any folder in it; without the option, those of an archive of CIFAR-10
beside the project are used. Nothing else should run on the machine meanwhile.
"""

import argparse
import itertools
import json
import statistics
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np

from benchmarks.cifar10 import ARCHIVE
from benchmarks.load import Load, Reply, confused_clients, milliseconds
from benchmarks.served_project import NAME, make_project, started
from benchmarks.setting import PROJECT, options, positive, scratch
from benchmarks.table import header, median_ratio, table
from flows.ports import free_port
from pipeline.core.errors import UserError, report_errors
from pipeline.images.decode import decode
from pipeline.models.config import ModelConfig
from pipeline.models.files import load_config
from pipeline.tracking import registry
from pipeline.tracking.model_files import find_model_files

PHOTOGRAPHS = 200
JSON, BYTES = "application/json", "application/octet-stream"
OURS, OURS_ARRAYS, MLFLOW = "ours, photographs", "ours, arrays", "mlflow models serve, arrays"


@dataclass
class Way:
    """A server with what is sent to it, and what it answered in each round."""

    url: str
    bodies: Sequence[bytes]
    content_type: str
    replies: list[Reply] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def one_round(self, *, requests: int, clients: int) -> None:
        load = Load(self.url, self.bodies, self.content_type, requests=requests, clients=clients)
        self.seconds.append(load.run())
        self.replies += load.replies


def read_photographs(folder: Path | None) -> list[bytes]:
    """Return the first JPEG files of a folder, or of the archive beside the project; UserError where there are none."""
    if folder:
        paths = itertools.islice(sorted(folder.rglob("*.jp*g")), PHOTOGRAPHS)
        found = [path.read_bytes() for path in paths]
    elif (PROJECT / ARCHIVE).is_file():
        with tarfile.open(PROJECT / ARCHIVE) as archive:
            members = itertools.islice((each for each in archive if each.name.endswith(".jpg")), PHOTOGRAPHS)
            found = [archive.extractfile(member).read() for member in members]  # type: ignore[union-attr]
    else:
        found = []
    if not found:
        raise UserError(f"found no photographs in {folder or ARCHIVE}; allowed: JPEG files; name a folder by --images")
    return found


def as_arrays(photographs: Sequence[bytes], *, config: ModelConfig) -> list[bytes]:
    """Return requests with the pixels of each photograph, as the model has them, as JSON."""
    settings = {"image_size": config.image_size, "channels": config.channels, "resize": config.resize}
    pixels = (decode(content, **settings) for content in photographs)  # type: ignore[arg-type]
    return [json.dumps({"inputs": [each.tolist()]}).encode() for each in pixels]


def start_ours(model: str, stack: ExitStack, *, log: Path, more: Sequence[str] = ()) -> str:
    """Start our server as it comes; return its address."""
    port = free_port()
    command = [sys.executable, "-m", "pipeline.serve", "--model", model, "--port", str(port), *more]
    stack.enter_context(started(command, health=f"http://127.0.0.1:{port}/health", log=log))
    return f"http://127.0.0.1:{port}/predict"


def start_mlflow(model: str, stack: ExitStack, *, log: Path) -> str:
    """Start MLflow's server as it comes; return its address."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", model]
    command += ["--port", str(port), "--env-manager", "local"]
    stack.enter_context(started(command, health=f"http://127.0.0.1:{port}/ping", log=log))
    return f"http://127.0.0.1:{port}/invocations"


def largest_difference(ours: Way, mlflow: Way, *, config: ModelConfig) -> float:
    """Return the largest difference of a probability that both servers give for the same arrays."""
    differences = []
    for body in ours.bodies[:20]:
        first, second = (
            httpx.post(each, content=body, headers={"Content-Type": JSON}, trust_env=False).raise_for_status().json()
            for each in (f"{ours.url}?top={len(config.class_names)}", mlflow.url)
        )
        own = {each["class"]: each["probability"] for each in first["predictions"][0]["top"]}
        other = second["predictions"][0]
        differences += [abs(own[name] - other[name]) for name in config.class_names]
    return float(np.max(differences))


def result_rows(ways: Mapping[str, Way], *, requests: int) -> list[list[str]]:
    """Return the table of all ways; the ratio is that of the throughputs within a round, the median of the rounds."""
    rows = [["way", "requests", "failures", "p50 (ms)", "p99 (ms)", "requests/s", f"ratio to {MLFLOW}"]]
    for name, way in ways.items():
        each = [
            f"{len(way.replies):,}",
            str(sum(bool(reply.error) for reply in way.replies)),
            f"{milliseconds(way.replies, 50):.1f}",
            f"{milliseconds(way.replies, 99):.1f}",
            f"{statistics.median(requests / seconds for seconds in way.seconds):.0f}",
            f"{median_ratio(ways[MLFLOW].seconds, way.seconds):.2f}",
        ]
        rows.append([name, *each])
    return rows


def compare(model: str, photographs: Sequence[bytes], *, arguments: argparse.Namespace, folder: Path) -> bool:
    """Measure both servers in turns, and print the table; return whether no request failed."""
    config = load_config(find_model_files(model).folder)
    arrays = as_arrays(photographs, config=config)
    with ExitStack() as stack:
        ours = start_ours(model, stack, log=folder / "ours.log")
        theirs = start_mlflow(model, stack, log=folder / "mlflow.log")
        ways = {
            OURS: Way(ours, photographs, BYTES),
            OURS_ARRAYS: Way(ours, arrays, JSON),
            MLFLOW: Way(theirs, arrays, JSON),
        }
        difference = largest_difference(ways[OURS_ARRAYS], ways[MLFLOW], config=config)
        for way in ways.values():  # the first answers take longer
            Load(way.url, way.bodies, way.content_type, requests=arguments.clients, clients=arguments.clients).run()
        for _ in range(arguments.rounds):
            for way in ways.values():
                way.one_round(requests=arguments.requests, clients=arguments.clients)
    shape = f"{config.image_size} x {config.image_size} x {config.channels}"
    print(f"{config.model}, arrays of {shape}, {arguments.clients} clients, {arguments.rounds} rounds of", end=" ")
    print(f"{arguments.requests:,} requests; both servers agree within {difference:.0e}\n")
    print(f"{table(result_rows(ways, requests=arguments.requests))}\n", flush=True)
    return _report_errors([reply for way in ways.values() for reply in way.replies])


def change_champion(photographs: Sequence[bytes], *, arguments: argparse.Namespace, folder: Path) -> bool:
    """Make version 2 the champion in mid-load, and print how it took over; return whether that was without a fault."""
    md5s = {one.number: one.model_md5.encode() for one in registry.find_versions(NAME)}
    old, new = md5s["1"], md5s["2"]
    changed_at = list[float]()

    def change() -> None:
        registry.set_alias(NAME, registry.CHAMPION, "2")
        changed_at.append(time.perf_counter())

    with ExitStack() as stack:
        url = start_ours(f"models:/{NAME}@{registry.CHAMPION}", stack, log=folder / "change.log")
        load = Load(url, photographs, BYTES, requests=arguments.requests, clients=arguments.clients)
        load.until, load.change, load.change_after = lambda content: new in content, change, arguments.requests // 4
        load.run()
    first = next((number for number, reply in enumerate(load.replies, start=1) if new in reply.content), None)
    if first is None:
        print(f"after {len(load.replies):,} answers, the new champion has not answered")
        return False
    wrong = confused_clients(load.replies, old=old, new=new)
    delay = load.replies[first - 1].end - changed_at[0]
    before, after = load.replies[: first - 1], load.replies[first - 1 :]
    failures = sum(bool(reply.error) for reply in load.replies)
    print(
        f"champion changed after answer {load.change_after:,}; of {len(load.replies):,} answers to {load.clients} "
        f"clients, number {first:,} is the first of the new one, {delay:.1f} s later\n"
        f"failures: {failures}; clients that did not see the old one, then the new one: {len(wrong)}\n"
        f"p99 before: {milliseconds(before, 99):.1f} ms, after: {milliseconds(after, 99):.1f} ms; the longest answer: "
        f"{milliseconds(load.replies, 100):.1f} ms"
    )
    return _report_errors(load.replies) and not wrong


def _report_errors(replies: Sequence[Reply]) -> bool:
    """Print the first failures; return whether there are none."""
    errors = [reply.error for reply in replies if reply.error]
    for error in errors[:5]:
        print(f"failure: {error}")
    return not errors


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = options("serving", __doc__, repeats="ROUNDS", default=5)
    parser.add_argument("--model", metavar="URI", help="such as models:/NAME/VERSION; default: a model of the digits")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="photographs; default: the archive of CIFAR-10")
    parser.add_argument("--requests", type=positive, default=1000, help="of a round; default: 1000")
    parser.add_argument("--clients", type=positive, default=8, help="default: 8")
    parser.add_argument("--change-champion", action="store_true", help="also change the champion in mid-load")
    arguments = parser.parse_args()
    arguments.rounds = arguments.repeats
    if arguments.model and ":/" not in arguments.model:
        raise UserError(f"--model {arguments.model}: allowed: a model in MLflow, such as models:/digits/1")
    if arguments.model and arguments.change_champion:
        raise UserError("--change-champion changes that of a temporary project; leave --model out")
    return arguments


def main() -> None:
    """Make the project, measure, and print; the status is 1 where a request failed."""
    arguments = parse()
    photographs = read_photographs(arguments.images)
    print(header(seeds="0, 1"), flush=True)
    with scratch() as scratch_folder:
        folder = Path(scratch_folder)
        if not arguments.model:
            make_project(folder)
        model = arguments.model or f"models:/{NAME}/1"
        is_good = compare(model, photographs, arguments=arguments, folder=folder)
        if arguments.change_champion:
            is_good = change_champion(photographs, arguments=arguments, folder=folder) and is_good
    if not is_good:
        sys.exit("error: a request failed, or a new champion was not taken over; see above")


if __name__ == "__main__":
    with report_errors():
        main()
