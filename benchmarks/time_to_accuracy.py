"""Measure how long trainings take to reach the test accuracy of the PyTorch tutorial "Training a Classifier".

`python -m benchmarks.time_to_accuracy [ROUNDS] [--ways ours,tutorial,…] [--images FOLDER]` runs in turn

    ours         the pipeline's training (benchmarks/ways/ours.py)
    tutorial     the tutorial as it is written
    dataloader   the tutorial's network and data, with batch size and learning rate as one would choose them today
    lightning    the same as dataloader, by PyTorch Lightning

on the same images, each with PyTorch's default number of threads. It prints the median seconds, from the start of the
process, and the median of the ratios within the rounds. The seed is the number of the round. Nothing else should run on
the machine meanwhile.

Epochs, learning rates and batch sizes of ours, dataloader and lightning are those that reach this accuracy soonest.
Ours evaluates each test image together with its mirror image, as `evaluate.test_time_augmentation: mirror` does.
"""

import argparse
import math
import re
import subprocess
import sys
import time

from benchmarks.cifar10 import add_images, prepare_apart
from benchmarks.setting import options
from benchmarks.table import header, medians
from benchmarks.ways import TARGET
from pipeline.core.errors import UserError, report_errors

WAYS = ("ours", "tutorial", "dataloader", "lightning")
ACCURACY = re.compile(r"accuracy (\d\.\d{4})")


def run(way: str, *, seed: int, target: float) -> tuple[float, float]:
    """Return the seconds until the target was reached, or infinity, and the last accuracy."""
    command = [sys.executable, "-m", f"benchmarks.ways.{way}", str(seed), str(target)]
    seconds, accuracy = math.inf, 0.0
    start = time.perf_counter()
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        assert child.stdout
        for line in child.stdout:
            lines.append(line)
            if found := ACCURACY.fullmatch(line.strip()):
                accuracy = float(found[1])
                seconds = time.perf_counter() - start if accuracy >= target else math.inf
    if child.returncode:
        output = "".join(lines)[-500:].strip()
        raise UserError(
            f"benchmarks.ways.{way} ended with status {child.returncode}: {output}; fix that, then run this again"
        )
    return seconds, accuracy


def measure(ways: list[str], *, rounds: int, target: float) -> str:
    """Run the ways in turn and return the table."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    accuracies: dict[str, list[str]] = {way: [] for way in ways}
    for seed in range(rounds):
        for way in ways:
            taken, accuracy = run(way, seed=seed, target=target)
            seconds[way].append(taken)
            accuracies[way].append(f"{accuracy:.1%}")
    accuracy_texts = {way: ", ".join(each) for way, each in accuracies.items()}
    return medians(seconds, base="ours" if "ours" in ways else None, more={"test accuracy": accuracy_texts})


def _fraction(text: str) -> float:
    """Convert an argument to a number between 0 and 1; argparse reports the error."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed: a number between 0 and 1, such as {TARGET}")
    return value


def main() -> None:
    """Prepare the images, run the rounds, and print the table."""
    parser = options("time_to_accuracy", __doc__, repeats="ROUNDS", default=3)
    parser.add_argument(
        "--ways", default=",".join(WAYS), help=f"some of {','.join(WAYS)}, separated by commas; default: all"
    )
    parser.add_argument("--target", type=_fraction, default=TARGET, help=f"test accuracy; default: {TARGET}")
    add_images(parser)
    arguments = parser.parse_args()
    ways = list(dict.fromkeys(arguments.ways.split(",")))
    if unknown := set(ways) - set(WAYS):
        parser.error(f"--ways: found {', '.join(sorted(unknown))}; allowed: {', '.join(WAYS)}")
    prepare_apart(arguments.images)
    print(header(seeds="the number of the round, from 0"))
    print(f"seconds to {arguments.target:.1%} test accuracy, from the start of the process")
    print(measure(ways, rounds=arguments.repeats, target=arguments.target))


if __name__ == "__main__":
    with report_errors():
        main()
