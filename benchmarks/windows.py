"""Measure seconds and memory of a training that reads its images from a file, as where they do not fit in memory.

`python -m benchmarks.windows [ROUNDS]` writes files of random images of CIFAR-10's size (3 GB, removed at the end) and
trains LeNet on each for an epoch, with the settings of cifar10_lenet. Each way runs in turn, in a process of its own
that warms up first. The table has the seconds for as many images as CIFAR-10 has, their median ratio, and the highest
resident memory of the process. The files have just been written, so they are in the system's cache.
"""

import multiprocessing
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.lenet import CONFIG, PARAMS, new_classifier, random_split, train_epoch
from benchmarks.setting import options, scratch
from benchmarks.table import header, medians
from pipeline.arrays import Split
from pipeline.core.errors import report_errors
from pipeline.training.device import prepare_torch

CIFAR10_IMAGES = 45_000  # of the train split; 138 MB
WINDOW_MEGABYTES = 64
RESIDENT = f"{CIFAR10_IMAGES:,} images in memory"


def write_images(path: Path, num_images: int) -> None:
    """Write a file of random pixels (num_images, 32, 32, 3) uint8."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(num_images, 32, 32, 3))
    draw = np.random.default_rng(0)
    for start in range(0, num_images, CIFAR10_IMAGES):
        block = array[start : start + CIFAR10_IMAGES]
        block[:] = draw.integers(0, 256, block.shape, dtype=np.uint8)


def measure(path: Path, *, in_memory: bool) -> tuple[float, float]:
    """Train an epoch; return its seconds per CIFAR10_IMAGES images, and the peak of this process's memory in MB."""
    prepare_torch(PARAMS.train)
    images = np.load(path, mmap_mode=None if in_memory else "c")
    split = Split.of(
        images,
        np.arange(len(images)) % 10,
        mean=CONFIG.mean,
        std=CONFIG.std,
        device=torch.device("cpu"),
        window_bytes=WINDOW_MEGABYTES * 2**20,
    )
    train_epoch(new_classifier(), (random_split(CIFAR10_IMAGES // 10, seed=1), random_split(100, seed=2)))
    seconds = train_epoch(new_classifier(), (split, random_split(100, seed=2)))
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak
    return seconds * CIFAR10_IMAGES / len(images), int(peak[1]) / 1000


def main() -> None:
    """Measure each way in a process of its own, and print the table."""
    rounds = options("windows", __doc__, repeats="ROUNDS", default=3).parse_args().repeats
    print(header(seeds="0"))
    context = multiprocessing.get_context("spawn")
    with scratch() as folder:
        sizes = [CIFAR10_IMAGES, 4 * CIFAR10_IMAGES, 16 * CIFAR10_IMAGES]
        paths = {number: Path(folder) / f"{number}.npy" for number in sizes}
        for number, path in paths.items():
            write_images(path, number)
        ways = {RESIDENT: partial(measure, paths[CIFAR10_IMAGES], in_memory=True)}
        for number, path in paths.items():
            ways[f"{number:,} images from a file"] = partial(measure, path, in_memory=False)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        peaks: dict[str, float] = dict.fromkeys(ways, 0.0)
        for _ in range(rounds):
            for way, run in ways.items():
                with context.Pool(1) as pool:
                    value, peak = pool.apply(run)
                seconds[way].append(value)
                peaks[way] = max(peaks[way], peak)
    print(f"seconds for {CIFAR10_IMAGES:,} images; windows of {WINDOW_MEGABYTES} MB of images")
    memory = {way: f"{peak:.0f}" for way, peak in peaks.items()}
    print(medians(seconds, base=RESIDENT, more={"peak of memory (MB)": memory}, digits=2))


if __name__ == "__main__":
    with report_errors():
        main()
