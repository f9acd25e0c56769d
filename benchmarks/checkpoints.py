"""What checkpoints cost: epochs of the recipe cifar10_lenet with and without one, in turn, in one process.

`python -m benchmarks.checkpoints [EPOCHS]` prints the median of each and their ratio. The images are random pixels in
the number and size of CIFAR-10's, since time does not depend on what they show.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.table import medians
from pipeline.checkpoint import Checkpoint, Checkpoints
from pipeline.data import Split
from pipeline.loop import prepare_torch, train
from pipeline.model import ModelConfig, build
from pipeline.params import TrainParams, check_params, compose

TRAIN_IMAGES, VALIDATION_IMAGES, WARM_UP_EPOCHS = 45_000, 5_000, 2


def random_split(number: int, *, seed: int, device: torch.device) -> Split:
    draw = np.random.default_rng(seed)
    images = draw.integers(0, 256, (number, 32, 32, 3), dtype=np.uint8)
    return Split.of(images, draw.integers(0, 10, number), mean=[0.5] * 3, std=[0.25] * 3, device=device)


def make_config(params: TrainParams) -> ModelConfig:
    return ModelConfig(
        model=params.model,
        weights=None,
        loss=params.loss,
        class_names=tuple("0123456789"),
        image_size=32,
        input_size=None,
        channels=3,
        resize="crop",
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )


def main() -> None:
    """Measure and print."""
    epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    overrides = {"train.epochs": WARM_UP_EPOCHS + 2 * epochs, "train.early_stopping_epochs": None}
    params = check_params(compose("cifar10_lenet", overrides), origin="benchmark").train
    device = prepare_torch(params)
    classifier = build(make_config(params)).to(device).to(memory_format=torch.channels_last)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    ends: list[float] = []
    with tempfile.TemporaryDirectory(dir=".") as folder:  # on the project's file system
        checkpoints = Checkpoints(Path(folder) / "checkpoints")

        def save(checkpoint: Checkpoint) -> None:
            with_checkpoint = len(ends) % 2 == 0
            if with_checkpoint:
                checkpoints.write(checkpoint)
            ends.append(time.perf_counter())
            if len(ends) > WARM_UP_EPOCHS:
                seconds[with_checkpoint].append(ends[-1] - ends[-2])

        train(
            classifier,
            params=params,
            train_split=random_split(TRAIN_IMAGES, seed=1, device=device),
            validation_split=random_split(VALIDATION_IMAGES, seed=2, device=device),
            save=save,
        )
    without = "epoch without a checkpoint"
    print(medians({"epoch with a checkpoint": seconds[True], without: seconds[False]}, base=without, digits=3))


if __name__ == "__main__":
    main()
