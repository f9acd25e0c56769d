"""Measure which operators take the time of an epoch of cifar10_lenet, and compare it with the least possible time.

`python -m benchmarks.floor [ROUNDS]` counts the operations of the forward and backward pass, and measures how fast the
machine multiplies matrices (float32, 2048 x 2048) and copies memory. It prints the least time that these rates allow
(the floor), the time that an epoch takes, and the operators that take it. Rates and epochs are measured in turn; the
medians count.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.lenet import PARAMS, TRAIN_IMAGES, VALIDATION_IMAGES, Splits, new_classifier, random_splits, train_epoch
from benchmarks.setting import options
from benchmarks.table import header, table
from pipeline.core.errors import report_errors
from pipeline.training.device import prepare_torch

MATRIX_SIDE, COPIED_BYTES = 2048, 2**28
MAX_PRINTED_OPERATORS = 10


def operations_per_image() -> float:
    """Return the operations of one image, forward and backward; a multiplication and an addition count as two."""
    num_images = PARAMS.train.batch_size
    classifier, counter = new_classifier(), FlopCounterMode(display=False)
    with counter:
        logits = classifier(torch.zeros(num_images, 3, 32, 32))
        F.cross_entropy(logits, torch.zeros(num_images, dtype=torch.int64)).backward()  # type: ignore[no-untyped-call]
    return counter.get_total_flops() / num_images


def seconds(work: Callable[[], object]) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def operator_table(splits: Splits) -> str:
    """Return a table of the operators that take most of an epoch, without the time of operators that they call."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        train_epoch(new_classifier(), splits)
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    rows = [
        [event.key, f"{event.self_cpu_time_total / total:.1%}", f"{event.count:,}"]
        for event in events[:MAX_PRINTED_OPERATORS]
    ]
    rest = sum(event.self_cpu_time_total for event in events[MAX_PRINTED_OPERATORS:]) / total
    return table([["operator", "fraction of the time", "calls"], *rows, ["all others", f"{rest:.1%}", ""]])


def main() -> None:
    """Measure rates and epochs in turn, and print the tables."""
    rounds = options("floor", __doc__, repeats="ROUNDS", default=7).parse_args().repeats
    print(header(seeds="0"))
    prepare_torch(PARAMS.train)
    splits = random_splits()
    matrix, memory, copy = torch.rand(MATRIX_SIDE, MATRIX_SIDE), *torch.zeros(2, COPIED_BYTES, dtype=torch.uint8)
    tasks: dict[str, Callable[[], object]] = {
        "matrix": lambda: matrix @ matrix,
        "memory": lambda: copy.copy_(memory),
        "epoch": lambda: train_epoch(new_classifier(), splits),
    }
    taken = [{name: seconds(task) for name, task in tasks.items()} for _ in range(rounds + 1)]
    del taken[0]  # the first round warms up
    found = {name: statistics.median([each[name] for each in taken]) for name in tasks}
    rate, bandwidth = 2 * MATRIX_SIDE**3 / found["matrix"], 2 * COPIED_BYTES / found["memory"]
    flops = operations_per_image()
    # a validation image needs the forward pass only, which is about a third of the operations
    least = flops * (TRAIN_IMAGES + VALIDATION_IMAGES / 3) / rate
    read = (TRAIN_IMAGES + VALIDATION_IMAGES) * 32 * 32 * 3 / bandwidth
    rows = [
        ["quantity", "value"],
        ["operations of an image, forward and backward", f"{flops / 1e6:.2f} million"],
        ["matrix rate, float32", f"{rate / 1e9:.0f} GFLOP/s"],
        ["memory, read and write", f"{bandwidth / 1e9:.1f} GB/s"],
        ["floor of an epoch, operations", f"{least:.2f} s"],
        ["floor of an epoch, reading the pixels", f"{read:.3f} s"],
        ["epoch taken", f"{found['epoch']:.2f} s"],
        ["times the floor", f"{found['epoch'] / (least + read):.2f}"],
    ]
    print(table(rows))
    print()
    print(operator_table(splits))


if __name__ == "__main__":
    with report_errors():
        main()
