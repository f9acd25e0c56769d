"""Train by the pipeline, on the train split of the arrays that its step normalize wrote.

Four fifths of an epoch suffice, since each test image is evaluated together with its mirror image.
"""

import pipeline  # noqa: F401  # first, since it disables Python's garbage collector during PyTorch's import

# isort: split
import torch

from benchmarks.recipe import accuracy_on, first_images, load
from benchmarks.ways import RECIPE, arrays, is_reached, seed
from pipeline.params import check_params
from pipeline.recipes import compose
from pipeline.training.loop import train

OVERRIDES = {
    "train.optimizer": "muon",
    "train.epochs": 1,
    "train.batch_size": 128,
    "train.learning_rate": 0.07,
    "train.schedule": "linear",
    "train.weight_decay": 0.0005,
    "train.warmup_fraction": 0.1,
    "train.flip": False,
    "train.crop_padding": 0,
    "train.device": "cpu",
    "train.cpu_kernels": "native",  # like the other ways
}

TRAIN_FRACTION = 0.8  # of the images of the train split, in which all classes are mixed


def main() -> None:
    """Train, then evaluate on the test split."""
    more = {"train.seed": seed(), "train.cpu_threads": torch.get_num_threads()}  # as in the other ways
    params = check_params(compose(RECIPE, OVERRIDES | more), origin=RECIPE).train
    classifier, splits = load(params, arrays())
    used = first_images(splits["train"], int(TRAIN_FRACTION * len(splits["train"])))
    train(classifier, params=params, train_split=used, validation_split=splits["validation"])
    is_reached(accuracy_on(splits["test"], classifier, views="mirror"))


if __name__ == "__main__":
    main()
