"""Compare two ways to classify a folder of image files: `pipeline.predict`, and a DataLoader of torchvision.

`python -m benchmarks.predict [ROUNDS] [--files 100000] [--kills 10] [--images FOLDER]` makes a folder of links to the
images of CIFAR-10, and runs each way in turn, as a process of its own, with the same LeNet (of untrained weights, which
take as long as trained ones) on the CPU. It prints the medians, the median of the ratios within the rounds, images a
second, and the start-up (the interpreter and its imports), which is part of each way. The second table has the peaks of
memory for a tenth of the files and for all; they are measured in other runs than the times.

With `--kills`, the command is killed by SIGKILL, with all its processes, that often, at random moments spread over its
work, and started again each time. Where a run ends before its moment, the kills that are left are made on the way to
another file. Each file must be, byte for byte, that of a run that nothing interrupted, and have one row for each image.
Nothing else should run on the machine meanwhile.
"""

import math
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet
import torch

from benchmarks.cifar10 import add_images, prepare_apart
from benchmarks.ingest import memory_peaks, seconds, start
from benchmarks.setting import options, positive, scratch
from benchmarks.table import header, medians, table
from benchmarks.ways import CIFAR10_IMAGES
from pipeline.core.errors import UserError, report_errors
from pipeline.models.build import build
from pipeline.models.config import ModelConfig
from pipeline.models.files import save_config, save_weights

OURS, LOOP = "pipeline.predict", "torchvision's DataLoader"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SEED = 0
# the longest times after which a run is killed: from its start, and from a part that it made
SECONDS_OF_START, SECONDS_OF_PART = 4.0, 0.1
SAMPLE_SECONDS = 0.002


@contextmanager
def folder_of_links(number: int) -> Iterator[Path]:
    """Yield a temporary folder with the model, and with that many links to the images, some of them several times."""
    images = sorted(CIFAR10_IMAGES.resolve().rglob("*.jpg"))
    with scratch() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        for index, image in enumerate(islice(cycle(images), number)):
            (folder / "images" / f"{index:06}.jpg").symlink_to(image)
        write_model(folder / "model")
        yield folder


def write_model(folder: Path) -> None:
    """Write an untrained LeNet for CIFAR-10."""
    folder.mkdir()
    torch.manual_seed(SEED)
    config = ModelConfig(
        model="lenet",
        weights=None,
        loss="cross_entropy",
        class_names=CLASSES,
        image_size=32,
        input_size=None,
        channels=3,
        resize="crop",
        mean=(0.4913, 0.4821, 0.4465),
        std=(0.2452, 0.2428, 0.2606),
        temperature=1.0,
    )
    save_weights(build(config), folder / "best.safetensors")
    save_config(config, folder)


def ours(output: str) -> list[str]:
    """Return the command of the pipeline that writes this file."""
    return [sys.executable, "-m", OURS, "images", "--model", "model", "--device", "cpu", "--output", output]


def loop() -> list[str]:
    """Return the command of the other way."""
    return [sys.executable, "-m", "benchmarks.ways.predict", "images", "model", "answers.csv"]


def one_round(folder: Path) -> dict[str, float]:
    """Run each way once; return its seconds."""
    found = {OURS: seconds(ours("answers.parquet"), folder), LOOP: seconds(loop(), folder)}
    (folder / "answers.parquet").unlink()
    starts = {f"start-up of {OURS}": "pipeline.prediction.command", f"start-up of {LOOP}": "benchmarks.ways.predict"}
    return found | {way: seconds([sys.executable, "-c", f"import {name}"], folder) for way, name in starts.items()}


def times_table(folder: Path, *, files: int, rounds: int) -> str:
    """Return the table of seconds."""
    found = [one_round(folder) for _ in range(rounds)]
    taken = {way: [each[way] for each in found] for way in found[0]}
    speeds = {way: ", ".join(f"{files / value:,.0f}" for value in taken[way]) for way in (OURS, LOOP)}
    return f"{files:,} files\n{medians(taken, base=OURS, more={'images a second': speeds})}"


def memory_table(sizes: list[int]) -> str:
    """Return the table of peaks of memory for each of these numbers of files."""
    rows = [["files", "way", "all processes (MB)", "largest process (MB)"]]
    for number in sizes:
        with folder_of_links(number) as folder:
            for way, command in {OURS: ours("answers.parquet"), LOOP: loop()}.items():
                peaks = memory_peaks(command, folder)
                rows.append([f"{number:,}", way, *(f"{value / 1e6:,.0f}" for value in peaks)])
    return table(rows)


def check_kills(folder: Path, *, files: int, kills: int) -> str:
    """Return a sentence on the files of runs that were killed that often; raises UserError where one is a wrong one."""
    whole, resumed = folder / "whole.parquet", folder / "resumed.parquet"
    num_parts = run(whole, folder).parts
    generator = random.Random(SEED)  # noqa: S311
    num_kills = num_files = 0
    while num_kills < kills:  # a run may end before its moment
        found = kill_and_finish(resumed, folder, num_parts=num_parts, kills=kills - num_kills, generator=generator)
        _check_rows(resumed, files=files)
        if resumed.read_bytes() != whole.read_bytes():
            raise UserError(f"{resumed.name}: differs from {whole.name}; allowed: the same bytes; report this defect")
        resumed.unlink()
        if not found:
            raise UserError(f"--files {files}: each run ended before it was killed; allowed: longer runs; choose more")
        num_kills, num_files = num_kills + found, num_files + 1
    made = "one file" if num_files == 1 else f"{num_files} files"
    return f"{num_kills} kills, {made} of {files:,} rows: none lost, none twice, the same bytes as without a kill"


def kill_and_finish(output: Path, folder: Path, *, num_parts: int, kills: int, generator: random.Random) -> int:
    """Make a file by runs that are killed up to this often, and by one that is not; return how many were killed."""
    num_killed = 0
    for fraction in sorted(generator.random() for _ in range(kills)):
        done = run(output, folder, kill_at=(int(fraction * num_parts), generator.random()))
        if not done.was_killed:
            return num_killed
        num_killed += 1
        print(f"killed after {done.seconds:.2f} s with {done.parts} of {num_parts} parts", flush=True)
    run(output, folder)
    return num_killed


def _check_rows(output: Path, *, files: int) -> None:
    """Raise UserError where the file does not have one row for each image, in their order."""
    paths = pyarrow.parquet.read_table(output, columns=["path"])["path"].to_pylist()
    expected = [f"images/{index:06}.jpg" for index in range(files)]
    if paths != expected:
        lost, twice = len(set(expected) - set(paths)), len(paths) - len(set(paths))
        raise UserError(
            f"{output.name}: {lost:,} rows lost, {twice:,} twice; allowed: one for each; report this defect"
        )


class Run(NamedTuple):
    """A run of the command: the number of parts that it was seen to have, its seconds, and whether it was killed."""

    parts: int
    seconds: float
    was_killed: bool


def run(output: Path, folder: Path, *, kill_at: tuple[float, float] = (math.inf, 0)) -> Run:
    """Run the command to its end, or kill it when it has made a number of parts and some time has passed since.

    `kill_at` is that number, and the time as a fraction of the seconds of a start, or of one part where it has made
    parts itself. Raises UserError where the command failed.
    """
    target, moment = kill_at
    parts = first = _num_parts(output)
    begin = time.perf_counter()
    with start(ours(output.name), folder, new_group=True) as child:
        while child.poll() is None:
            parts = max(parts, _num_parts(output))
            if parts >= target:
                time.sleep(moment * (SECONDS_OF_START if first >= target else SECONDS_OF_PART))
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                break
            time.sleep(SAMPLE_SECONDS)
    if child.returncode not in (0, -signal.SIGKILL):
        raise UserError(f"the command ended with status {child.returncode}; fix what it printed, then run this again")
    return Run(parts, time.perf_counter() - begin, was_killed=child.returncode == -signal.SIGKILL)


def _num_parts(output: Path) -> int:
    """Return the number of finished parts of a file that is being made."""
    return len(list(output.with_name(f"{output.name}.partial").glob("[0-9]*.parquet")))


def main() -> None:
    """Prepare the images, measure, print the tables."""
    parser = options("predict", __doc__, repeats="ROUNDS", default=3)
    parser.add_argument("--files", type=positive, default=100_000, help="how many; default: 100000")
    parser.add_argument("--kills", type=positive, help="also kill the command this often; default: never")
    add_images(parser)
    arguments = parser.parse_args()
    prepare_apart(arguments.images)
    print(header(seeds=f"{SEED} for weights and kills"))
    with folder_of_links(arguments.files) as folder:
        print(times_table(folder, files=arguments.files, rounds=arguments.repeats), flush=True)
        if arguments.kills:
            print(f"\n{check_kills(folder, files=arguments.files, kills=arguments.kills)}", flush=True)
    print(f"\npeaks of memory\n{memory_table([-(-arguments.files // 10), arguments.files])}")


if __name__ == "__main__":
    with report_errors():
        main()
