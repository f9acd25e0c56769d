"""Measure how much longer an epoch takes with portable kernels, which give the same bits on every CPU.

`python -m benchmarks.kernels [ROUNDS]` trains in turn with native and portable kernels, and prints medians and their
median ratio for the recipes digits and cifar10_lenet, and for three steps of my_images_finetune. Each training is a
process of its own, since PyTorch chooses its kernels once in a process. Imports and a first epoch, on a tenth of the
images, are not measured. The images are random pixels.
"""

import sys
import time

import numpy as np

from benchmarks.recipe import first_images, image_config
from benchmarks.setting import PROJECT, options, timed
from benchmarks.table import header, medians
from pipeline.arrays import Split
from pipeline.core.errors import report_errors
from pipeline.models.build import build, memory_format
from pipeline.models.config import ModelConfig
from pipeline.models.cpu_kernels import PORTABLE
from pipeline.params import TrainParams, check_params
from pipeline.recipes import compose
from pipeline.training.device import prepare_torch
from pipeline.training.loop import train

# by recipe: epochs, training images, pixels a side, channels
RECIPES = {"digits": (5, 1_078, 32, 1), "cifar10_lenet": (1, 45_000, 32, 3), "my_images_finetune": (1, 96, 256, 3)}
# random weights: the time does not depend on them
FROM_NOTHING = {"train.weights": None, "train.layer_decay": 1.0, "train.head_learning_rate_factor": 1.0}
KERNELS = ("native", "portable")


def random_split(recipe: str, *, num_images: int) -> Split:
    """Return a split of random pixels and labels with images of the recipe's size."""
    _, _, size, channels = RECIPES[recipe]
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (num_images, size, size, channels), dtype=np.uint8)
    return Split.of(images, draw.integers(0, 10, num_images), mean=(0.5,) * channels, std=(0.25,) * channels)


def seconds_of_epochs(recipe: str, *, kernels: str) -> float:
    """Return the seconds of the recipe's epochs on the CPU, validation included."""
    epochs, num_images, size, channels = RECIPES[recipe]
    changes = {"train.cpu_kernels": kernels, "train.epochs": epochs, "train.device": "cpu"}
    params = check_params(compose(recipe, FROM_NOTHING | changes), origin="benchmark").train
    prepare_torch(params)
    train_split, validation_split = (random_split(recipe, num_images=n) for n in (num_images, num_images // 10))
    mean, std = (0.5,) * channels, (0.25,) * channels
    config = image_config(params, class_names=tuple("0123456789"), mean=mean, std=std, image_size=size)
    _train(config, params, first_images(train_split, max(num_images // 10, params.batch_size)), validation_split)
    start = time.perf_counter()
    _train(config, params, train_split, validation_split)
    return time.perf_counter() - start


def _train(config: ModelConfig, params: TrainParams, train_split: Split, validation_split: Split) -> None:
    """Train a new network."""
    classifier = build(config).to(memory_format=memory_format(params))
    train(classifier, params=params, train_split=train_split, validation_split=validation_split)


def main() -> None:
    """Measure each recipe with both kernels in turn and print a table for each."""
    rounds = options("kernels", __doc__, repeats="ROUNDS", default=7).parse_args().repeats
    print(header(seeds="0"))
    for recipe in RECIPES:
        seconds: dict[str, list[float]] = {kernels: [] for kernels in KERNELS}
        for _ in range(rounds):
            for kernels in KERNELS:
                code = f"from benchmarks.kernels import *; print(seconds_of_epochs({recipe!r}, kernels={kernels!r}))"
                _, output = timed(sys.executable, "-c", code, cwd=PROJECT, without=tuple(PORTABLE))
                seconds[kernels].append(float(output.split()[-1]))
        print(f"{recipe}\n\n{medians(seconds, base='native', digits=2)}\n", flush=True)


if __name__ == "__main__":
    with report_errors():
        main()
