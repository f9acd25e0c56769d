"""Measure an epoch of a frozen network on kept features, against the same epoch through the whole network.

`python -m benchmarks.frozen [ROUNDS]` trains the head of a ResNet-18 with random weights on random images: 256 of 128
pixels, and 64 for validation. Each round computes the features, trains an epoch on them, and trains the same epoch with
the frozen network in evaluation mode, as augmentation of pixels would require. All run in this process, after a first
round that is not measured. An epoch includes its validation.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from benchmarks.recipe import image_config
from benchmarks.setting import options
from benchmarks.table import header, medians
from pipeline.arrays import Split
from pipeline.core.errors import report_errors
from pipeline.models.build import Classifier, build, memory_format
from pipeline.models.freezing import apply_freezing
from pipeline.params import check_params
from pipeline.recipes import compose
from pipeline.training.device import prepare_torch
from pipeline.training.features import compute_features, find_separable_head, with_features
from pipeline.training.loop import train

IMAGES, VALIDATION_IMAGES, SIZE = 256, 64, 128
WHOLE, KEPT, COMPUTE = "epoch through the whole network", "epoch on kept features", "compute the features"
OVERRIDES = {
    "train.model": "resnet18",
    "train.weights": "DEFAULT",  # without it nothing may be frozen; random weights take the same time
    "train.freeze": "backbone",
    "train.crop_padding": 0,
    "train.epochs": 1,
    "train.device": "cpu",
}
PARAMS = check_params(compose(None, OVERRIDES), origin="benchmark").train


def random_split(num_images: int, *, seed: int) -> Split:
    """Return a split of random pixels and labels."""
    draw = np.random.default_rng(seed)
    images = draw.integers(0, 256, (num_images, SIZE, SIZE, 3), dtype=np.uint8)
    return Split.of(images, draw.integers(0, 2, num_images), mean=(0.5,) * 3, std=(0.25,) * 3)


def frozen_classifier() -> Classifier:
    """Return the network with random weights, of which only the head is trained."""
    config = image_config(PARAMS, class_names=("a", "b"), mean=(0.5,) * 3, std=(0.25,) * 3, image_size=SIZE)
    classifier = build(config).to(memory_format=memory_format(PARAMS))
    apply_freezing(classifier, config=config, params=PARAMS)
    return classifier


def train_epoch(trained: nn.Module, splits: list[Split]) -> None:
    """Train for one epoch and validate."""
    train(trained, params=PARAMS, train_split=splits[0], validation_split=splits[1])


def seconds_of(action: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure_round(classifier: Classifier, head: nn.Module, splits: list[Split]) -> dict[str, float]:
    """Return the seconds of each way."""
    features: list[Split] = []

    def compute() -> None:
        for split in splits:
            blocks = compute_features(classifier, head, split, name="a split")
            features.append(with_features(split, np.concatenate(list(blocks))))

    return {
        COMPUTE: seconds_of(compute),
        KEPT: seconds_of(lambda: train_epoch(head, features)),
        WHOLE: seconds_of(lambda: train_epoch(classifier, splits)),
    }


def main() -> None:
    """Measure the ways in turn, and print a table."""
    rounds = options("frozen", __doc__, repeats="ROUNDS", default=7).parse_args().repeats
    prepare_torch(PARAMS)
    print(header(seeds="0"))
    classifier, splits = frozen_classifier(), [random_split(IMAGES, seed=1), random_split(VALIDATION_IMAGES, seed=2)]
    head = find_separable_head(classifier, splits[0])
    assert head is not None
    measure_round(classifier, head, splits)
    found = [measure_round(classifier, head, splits) for _ in range(rounds)]
    print(f"{IMAGES} images for training, {VALIDATION_IMAGES} for validation; {torch.get_num_threads()} threads\n")
    print(medians({way: [each[way] for each in found] for way in (WHOLE, COMPUTE, KEPT)}, base=WHOLE, digits=4))


if __name__ == "__main__":
    with report_errors():
        main()
