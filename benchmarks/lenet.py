"""Train an epoch of the recipe cifar10_lenet on random images, for the benchmarks that compare epochs."""

import time
from typing import Any

import numpy as np
import torch

from benchmarks.recipe import image_config
from benchmarks.ways import RECIPE
from pipeline.arrays import Split
from pipeline.models.build import Classifier, build
from pipeline.params import check_params
from pipeline.recipes import compose
from pipeline.training.loop import train

Splits = tuple[Split, Split]  # train and validation
TRAIN_IMAGES, VALIDATION_IMAGES = 45_000, 5_000
OVERRIDES = {"train.epochs": 1, "train.device": "cpu", "train.cpu_kernels": "native"}
PARAMS = check_params(compose(RECIPE, OVERRIDES), origin="benchmark")
CONFIG = image_config(PARAMS.train, class_names=tuple("0123456789"), mean=(0.5,) * 3, std=(0.25,) * 3)


def random_split(num_images: int, *, seed: int) -> Split:
    """Return a split of random pixels and labels."""
    draw = np.random.default_rng(seed)
    images = draw.integers(0, 256, (num_images, 32, 32, 3), dtype=np.uint8)
    labels = draw.integers(0, 10, num_images)
    return Split.of(images, labels, mean=CONFIG.mean, std=CONFIG.std, device=torch.device("cpu"))


def random_splits() -> Splits:
    """Return random splits for train and validation, as large as those of CIFAR-10."""
    return random_split(TRAIN_IMAGES, seed=1), random_split(VALIDATION_IMAGES, seed=2)


def new_classifier() -> Classifier:
    """Return the network with new random weights."""
    return build(CONFIG).to(memory_format=torch.channels_last)


def train_epoch(classifier: Classifier, splits: Splits, **callbacks: Any) -> float:
    """Train one epoch and validate; return the seconds. `callbacks` are those of `train`."""
    start = time.perf_counter()
    train(classifier, params=PARAMS.train, train_split=splits[0], validation_split=splits[1], **callbacks)
    return time.perf_counter() - start
