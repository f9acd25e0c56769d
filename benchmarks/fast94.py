"""The recipe cifar10_fast94 on a GPU: seconds, accuracy over seeds, utilisation, and how far from the floor.

`python -m benchmarks.fast94 [SEEDS] [--images FOLDER] [--train-images N]` trains once to warm up, then once a seed.
"Seconds" are those of the training with its judgements of the validation split, from data on the disk to the last
weights; test accuracy is the mean over the recipe's views. `--train-images` makes it short, to try it on a CPU.
"""

import argparse
import statistics
import time
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cifar10 import add_images, prepare_apart
from benchmarks.table import header, table
from benchmarks.ways import CIFAR10
from pipeline.data import DatasetInfo, Split
from pipeline.loop import prepare_torch, train
from pipeline.model import Classifier, build, configure, logits_of
from pipeline.params import Params, check_params, compose
from pipeline.train import initialise

RECIPE, SIDE = "cifar10_fast94", 4096


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def matrix_rate(device: torch.device) -> float:
    """bfloat16 operations a second."""
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
    """Of an image, forward and backward."""
    counter, number = FlopCounterMode(display=False), 64
    with counter:
        classifier(torch.zeros(number, 3, 32, 32, device=device)).sum().backward()
    return counter.get_total_flops() / number


def one(seed: int, params: Params, info: DatasetInfo, *, device: torch.device, train_images: int | None) -> list[float]:
    """Seconds, test accuracy, and the share of the time in which the GPU had work, in that order."""
    values = params.train.model_copy(update={"seed": seed})
    prepare_torch(values)
    folder = CIFAR10 / "normalize"
    start = time.perf_counter()
    splits = {
        name: Split.read(name, info=info, device=device, folder=folder) for name in ("train", "validation", "test")
    }
    if train_images:
        part = splits["train"]
        splits["train"] = replace(part, images=part.images[:train_images], labels=part.labels[:train_images])
    classifier = build(configure(values, info))
    initialise(classifier, splits["train"], seed=seed)
    classifier.to(device).to(memory_format=torch.channels_last)
    used = []
    train(
        classifier,
        params=values,
        train_split=splits["train"],
        validation_split=splits["validation"],
        on_epoch=lambda epoch, speed: used.append(torch.cuda.utilization() if device.type == "cuda" else 0),
    )
    wait(device)
    seconds = time.perf_counter() - start
    views = params.evaluate.test_time_augmentation
    logits = logits_of(classifier, splits["test"], batch_size=2_000, views=views)
    accuracy = (logits.argmax(1) == splits["test"].labels).double().mean().item()
    return [seconds, accuracy, statistics.mean(used) / 100]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fast94", description="The recipe cifar10_fast94.")
    parser.add_argument("seeds", nargs="?", type=int, default=10)
    parser.add_argument("--train-images", type=int, metavar="N", help="only as many; default: all")
    add_images(parser)
    arguments = parser.parse_args()
    prepare_apart(arguments.images)
    params = check_params(compose(RECIPE, {}), origin=RECIPE)
    device, info = prepare_torch(params.train), DatasetInfo.read(CIFAR10 / "normalize")
    few = arguments.train_images
    one(0, params, info, device=device, train_images=few)  # warms up
    found = [one(seed, params, info, device=device, train_images=few) for seed in range(arguments.seeds)]
    rows = [["seed", "seconds", "test accuracy", "GPU at work"]]
    rows += [[str(seed), f"{s:.2f}", f"{a:.2%}", f"{u:.0%}"] for seed, (s, a, u) in enumerate(found)]
    spreads = [statistics.stdev(column) if len(found) > 1 else 0.0 for column in zip(*found, strict=True)]
    means = [statistics.mean(column) for column in zip(*found, strict=True)]
    rows += [["mean ± sd", f"{means[0]:.2f} ± {spreads[0]:.2f}", f"{means[1]:.2%} ± {spreads[1]:.2%}", ""]]
    images = params.train.epochs * (few or sum(info.counts["train"].values()))
    classifier = build(configure(params.train, info)).to(device)
    floor = operations(classifier, device=device) * images / matrix_rate(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(header(), name, "", table(rows), "", sep="\n")
    print(
        f"{images / means[0]:,.0f} images/s; floor {floor:.3f} s (operations over the bfloat16 matrix rate), ", end=""
    )
    print(f"of which the training takes {means[0] / floor:.1f} times")


if __name__ == "__main__":
    main()
