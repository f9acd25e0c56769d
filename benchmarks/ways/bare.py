"""Run the recipe cifar10_lenet without DVC, MLflow and Prefect: one process reads the archive, trains and evaluates.

`python -m benchmarks.ways.bare [SEED]` makes the arrays from the archive in `.cache/benchmarks/cifar10/download/`.
"""

import numpy as np

from benchmarks.recipe import accuracy_on, network
from benchmarks.ways import CIFAR10, RECIPE, arrays, is_reached, seed
from pipeline.arrays import DatasetInfo, Split
from pipeline.datasets.cifar10 import open_cifar10
from pipeline.datasets.source import Description
from pipeline.params import check_params
from pipeline.recipes import compose
from pipeline.training.device import prepare_torch
from pipeline.training.loop import train


def main() -> None:
    """Read, train and evaluate."""
    params = check_params(compose(RECIPE, {"train.seed": seed()}), origin=RECIPE)
    device, info = prepare_torch(params.train), DatasetInfo.read(arrays())
    blocks = list(
        open_cifar10(CIFAR10 / "download", description=Description(dataset="cifar10"), params=params.normalize).blocks
    )
    images, labels = (
        {
            split: np.concatenate([getattr(block, kind) for block in blocks if block.split == split])
            for split in ("train", "test")
        }
        for kind in ("images", "labels")
    )
    held_out = np.arange(len(images["train"])) % 10 == 0
    arrays_by_split = {
        "train": (images["train"][~held_out], labels["train"][~held_out]),
        "validation": (images["train"][held_out], labels["train"][held_out]),
        "test": (images["test"], labels["test"]),
    }
    splits = {
        name: Split.of(*pair, mean=info.mean, std=info.std, device=device) for name, pair in arrays_by_split.items()
    }
    classifier = network(params.train, info).to(device)
    train(classifier, params=params.train, train_split=splits["train"], validation_split=splits["validation"])
    is_reached(accuracy_on(splits["test"], classifier))


if __name__ == "__main__":
    main()
