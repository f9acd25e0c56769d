"""Test accuracy of the recipe cifar10_lenet over several seeds: mean and standard deviation.

`python -m benchmarks.accuracy [SEEDS] [--images FOLDER]` trains with seeds 0, 1, … and judges the epoch that was best
on the validation split on the test split, once each, as the steps train and evaluate do. Data and splits are the same.
"""

import argparse
import statistics
import time

import torch

from benchmarks.cifar10 import RECIPE, add_images, prepare_apart
from benchmarks.table import table
from benchmarks.ways import CIFAR10
from pipeline.data import DatasetInfo, Split
from pipeline.loop import judge, prepare_torch, train
from pipeline.model import build, configure
from pipeline.params import check_params, compose


def train_and_judge(seed: int) -> tuple[float, float]:
    """Test accuracy, and the seconds of the training."""
    params = check_params(compose(RECIPE, {"train.seed": seed}), origin=RECIPE).train
    device, folder = prepare_torch(params), CIFAR10 / "normalize"
    info = DatasetInfo.read(folder)
    splits = [Split.read(name, info=info, device=device, folder=folder) for name in ("train", "validation", "test")]
    layout = torch.channels_last if params.channels_last else torch.contiguous_format
    classifier = build(configure(params, info)).to(device).to(memory_format=layout)
    start = time.perf_counter()
    trained = train(classifier, params=params, train_split=splits[0], validation_split=splits[1])
    seconds = time.perf_counter() - start
    classifier.load_state_dict(trained.best)
    return judge(classifier, splits[2], loss=params.loss)[1], seconds


def main() -> None:
    """Train, judge, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description="Accuracy over seeds.")
    parser.add_argument("seeds", nargs="?", type=int, default=5)
    add_images(parser)
    arguments = parser.parse_args()
    prepare_apart(arguments.images)
    found = [train_and_judge(seed) for seed in range(arguments.seeds)]
    accuracies = [accuracy for accuracy, _ in found]
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    rows = [["seed", "test accuracy", "training (s)"]]
    rows += [[str(seed), f"{accuracy:.2%}", f"{seconds:.0f}"] for seed, (accuracy, seconds) in enumerate(found)]
    rows += [["mean ± sd", f"{statistics.mean(accuracies):.2%} ± {spread:.2%}", ""]]
    print(table(rows))


if __name__ == "__main__":
    main()
