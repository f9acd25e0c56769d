"""The pipeline's own training, on the arrays that its normalize made: a split is held out for validation.

Four fifths of an epoch are enough, where each test image is judged with its mirror image.
"""

from dataclasses import replace

import torch

from benchmarks.ways import CIFAR10, is_reached, seed
from pipeline.data import DatasetInfo, Split
from pipeline.loop import VALIDATION_BATCH, prepare_torch, train
from pipeline.model import build, configure, logits_of
from pipeline.params import check_params, compose

RECIPE = "cifar10_lenet"
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
}

SHARE = 0.8
"""Of the train split's images, which lie in no order."""


def main() -> None:
    """Train, then judge on the test split."""
    more = {"train.seed": seed(), "train.cpu_threads": torch.get_num_threads()}  # as many threads as the other ways
    params = check_params(compose(RECIPE, OVERRIDES | more), origin=RECIPE).train
    device, folder = prepare_torch(params), CIFAR10 / "normalize"
    info = DatasetInfo.read(folder)
    splits = {
        name: Split.read(name, info=info, device=device, folder=folder) for name in ("train", "validation", "test")
    }
    train_split, validation_split, test_split = splits.values()
    used = int(SHARE * len(train_split))
    train_split = replace(train_split, images=train_split.images[:used], labels=train_split.labels[:used])
    classifier = build(configure(params, info)).to(memory_format=torch.channels_last)
    train(classifier, params=params, train_split=train_split, validation_split=validation_split)
    logits = logits_of(classifier, test_split, batch_size=VALIDATION_BATCH, views="mirror")
    is_reached((logits.argmax(1) == test_split.labels).double().mean().item())


if __name__ == "__main__":
    main()
