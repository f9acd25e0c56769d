"""Small trainings for the checks on a GPU: networks, parameters and images of three classes."""

from typing import Any

import numpy as np
import torch

from benchmarks.recipe import image_config
from pipeline.arrays import Split
from pipeline.models.build import Classifier, build, memory_format
from pipeline.params import TrainParams, check_params, compose

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adamw": {"optimizer": "adamw", "nesterov": False, "learning_rate": 0.002},
    "rmsprop": {"optimizer": "rmsprop", "nesterov": False, "momentum": 0.0, "learning_rate": 0.002},
    "muon": {"optimizer": "muon"},
}
BASE: dict[str, Any] = {
    "batch_size": 32,
    "epochs": 4,
    "learning_rate": 0.01,
    "bias_learning_rate_factor": 1.0,
    "label_smoothing": 0.0,
    "cutout_size": 4,
    "log_every_steps": 5,
    "average_every_steps": None,
    "checkpoint_every_minutes": 1e-9,
    "cpu_threads": 1,
}
TWO_STEPS: dict[str, Any] = {"epochs": 1, "learning_rate": 0.001, "schedule": "constant", "warmup_fraction": 0.0}
CLASSES = 3
MEAN, STD = (0.4,) * 3, (0.25,) * 3


def toy_params(model: str, optimizer: str, **changes: Any) -> TrainParams:
    """Return parameters of a small training, from those of cifar10_fast94."""
    values = BASE | OPTIMIZERS[optimizer] | {"model": model} | changes
    return check_params(compose("cifar10_fast94", {f"train.{k}": v for k, v in values.items()}), origin="toy").train


def toy_split(number: int, *, seed: int, device: torch.device) -> Split:
    """Return images (number, 32, 32, 3) of noise with a bright bar, whose position is the class."""
    draw = np.random.default_rng(seed)
    labels = np.arange(number, dtype=np.int64) % CLASSES
    images = draw.integers(0, 120, (number, 32, 32, 3), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:, label * 10 : (label + 1) * 10] += 120
    return Split.of(images, labels, mean=MEAN, std=STD, device=device)


def toy_classifier(params: TrainParams, *, device: torch.device) -> Classifier:
    """Return the network with the weights of seed 0, on the device."""
    torch.manual_seed(0)
    config = image_config(params, class_names=tuple(map(str, range(CLASSES))), mean=MEAN, std=STD)
    return build(config).to(device).to(memory_format=memory_format(params))
