"""Measure the recipe cifar10_fast94 on a GPU: seconds, accuracy over seeds, utilization, and distance from the floor.

`python -m benchmarks.fast94 [SEEDS] [--images FOLDER] [--train-images N]` trains once to warm up, then once a seed.
The seconds are those of training and validation, from data on the disk to the last weights. The test accuracy is that
of the mean over the recipe's views. `--train-images` makes it short, to try it on a CPU.
"""

import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cifar10 import add_images, prepare_apart
from benchmarks.recipe import accuracy_on, first, load, network
from benchmarks.setting import options, positive
from benchmarks.table import header, mean_and_deviation, table
from benchmarks.ways import arrays
from pipeline.arrays import DatasetInfo
from pipeline.core.errors import report_errors
from pipeline.models.build import Classifier
from pipeline.params import Params, check_params, compose
from pipeline.training.device import prepare_torch
from pipeline.training.initialize import initialize_from_images
from pipeline.training.loop import train

RECIPE, SIDE = "cifar10_fast94", 4096


def wait(device: torch.device) -> None:
    """Wait until a GPU has done what was sent to it."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def matrix_rate(device: torch.device) -> float:
    """Return bfloat16 operations a second of a large matrix product."""
    side = SIDE if device.type == "cuda" else SIDE // 4
    matrix, repeats = torch.rand(side, side, device=device, dtype=torch.bfloat16), 20
    matrix @ matrix
    wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        matrix @ matrix
    wait(device)
    return 2 * side**3 * repeats / (time.perf_counter() - start)


def operations(classifier: Classifier, *, device: torch.device) -> float:
    """Return the operations of an image, forward and backward."""
    counter, number = FlopCounterMode(display=False), 64
    with counter:
        classifier(torch.zeros(number, 3, 32, 32, device=device)).sum().backward()
    return counter.get_total_flops() / number


def one(seed: int, params: Params, *, device: torch.device, train_images: int | None) -> list[float]:
    """Train once; return seconds, test accuracy, and the fraction of the time in which the GPU was busy."""
    values = params.train.model_copy(update={"seed": seed})
    start = time.perf_counter()
    classifier, splits = load(values, arrays(RECIPE))
    train_split = first(splits["train"], train_images or len(splits["train"]))
    initialize_from_images(classifier, train_split, seed=seed)
    classifier.to(device)
    used = []
    train(
        classifier,
        params=values,
        train_split=train_split,
        validation_split=splits["validation"],
        on_epoch=lambda epoch, speed: used.append(torch.cuda.utilization() if device.type == "cuda" else 0),
    )
    wait(device)
    seconds = time.perf_counter() - start
    accuracy = accuracy_on(splits["test"], classifier, views=params.evaluate.test_time_augmentation)
    return [seconds, accuracy, statistics.mean(used) / 100]


def main() -> None:
    """Measure and print."""
    parser = options("fast94", __doc__, repeats="SEEDS", default=10)
    parser.add_argument("--train-images", type=positive, metavar="N", help="train on this many images; default: all")
    add_images(parser)
    arguments = parser.parse_args()
    params, few = check_params(compose(RECIPE, {}), origin=RECIPE), arguments.train_images
    if few and few < params.train.batch_size:
        parser.error(f"--train-images: found {few}; allowed: {params.train.batch_size} or more, a batch")
    prepare_apart(arguments.images, recipe=RECIPE)
    device, info = prepare_torch(params.train), DatasetInfo.read(arrays(RECIPE))
    print(header(seeds=f"0 to {arguments.repeats - 1}"))
    print(torch.cuda.get_device_name() if device.type == "cuda" else "CPU", end="\n\n", flush=True)
    one(0, params, device=device, train_images=few)  # warms up
    found = [one(seed, params, device=device, train_images=few) for seed in range(arguments.repeats)]
    rows = [["seed", "seconds", "test accuracy", "GPU busy"]]
    rows += [[str(seed), f"{s:.2f}", f"{a:.2%}", f"{u:.0%}"] for seed, (s, a, u) in enumerate(found)]
    seconds, accuracies, _ = zip(*found, strict=True)
    rows += [["mean ± sd", mean_and_deviation(seconds, ".2f"), mean_and_deviation(accuracies, ".2%"), ""]]
    print(table(rows))
    images, mean = params.train.epochs * (few or sum(info.counts["train"].values())), statistics.mean(seconds)
    classifier = network(params.train, info).to(device)
    floor = operations(classifier, device=device) * images / matrix_rate(device)
    print(f"\n{images / mean:,.0f} images/s; floor {floor:.3f} s (operations over the bfloat16 matrix rate), ", end="")
    print(f"of which the training takes {mean / floor:.1f} times")


if __name__ == "__main__":
    with report_errors():
        main()
