"""The recipe cifar10_lenet without the tools around it: one process that reads the archive, trains and judges once.

`python -m benchmarks.ways.bare [SEED]`; arrays are made from the archive in `.cache/benchmarks/cifar10/download/`.
"""

import numpy as np
import torch

from benchmarks.ways import CIFAR10, is_reached, seed
from pipeline.data import DatasetInfo, Split
from pipeline.loop import judge, prepare_torch, train
from pipeline.model import build, configure
from pipeline.params import check_params, compose
from pipeline.raw import open_source


def main() -> None:
    """Read, train, judge."""
    params = check_params(compose("cifar10_lenet", {"train.seed": seed()}), origin="cifar10_lenet")
    device, info = prepare_torch(params.train), DatasetInfo.read(CIFAR10 / "normalize")
    blocks = list(open_source(CIFAR10 / "download", params=params.normalize).blocks)
    images = {
        split: np.concatenate([block.images for block in blocks if block.split == split]) for split in ("train", "test")
    }
    labels = {
        split: np.concatenate([block.labels for block in blocks if block.split == split]) for split in ("train", "test")
    }
    held_out = np.arange(len(images["train"])) % 10 == 0
    parts = {
        "train": (images["train"][~held_out], labels["train"][~held_out]),
        "validation": (images["train"][held_out], labels["train"][held_out]),
        "test": (images["test"], labels["test"]),
    }
    splits = {name: Split.of(*part, mean=info.mean, std=info.std, device=device) for name, part in parts.items()}
    classifier = build(configure(params.train, info)).to(device).to(memory_format=torch.channels_last)
    train(classifier, params=params.train, train_split=splits["train"], validation_split=splits["validation"])
    is_reached(judge(classifier, splits["test"], loss=params.train.loss)[1])


if __name__ == "__main__":
    main()
