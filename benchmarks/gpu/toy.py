"""Make small trainings for the checks on a GPU: networks, parameters, and images of three classes."""

from typing import Any

import numpy as np
import torch

from benchmarks.recipe import image_config
from pipeline.arrays import Split
from pipeline.models.build import Classifier, build, memory_format
from pipeline.params import TrainParams, check_params
from pipeline.recipes import compose

# by optimizer: the parameters that differ from those of cifar10_fast94
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adamw": {"optimizer": "adamw", "nesterov": False, "learning_rate": 0.002},
    "rmsprop": {"optimizer": "rmsprop", "nesterov": False, "momentum": 0.0, "learning_rate": 0.002},
    "muon": {"optimizer": "muon"},
}
# parameters of all small trainings
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
NUM_CLASSES = 3
MEAN, STD = (0.4,) * 3, (0.25,) * 3


def toy_params(model: str, optimizer: str, **changes: Any) -> TrainParams:
    """Return the parameters of a small training; those not named here are those of cifar10_fast94."""
    values = BASE | OPTIMIZERS[optimizer] | {"model": model} | changes
    overrides = {f"train.{name}": value for name, value in values.items()}
    return check_params(compose("cifar10_fast94", overrides), origin="toy").train


def toy_split(num_images: int, *, seed: int, device: torch.device) -> Split:
    """Return images (num_images, 32, 32, 3) of noise with a bright bar, whose position depends on the class."""
    draw = np.random.default_rng(seed)
    labels = np.arange(num_images, dtype=np.int64) % NUM_CLASSES
    images = draw.integers(0, 120, (num_images, 32, 32, 3), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:, label * 10 : (label + 1) * 10] += 120
    return Split.of(images, labels, mean=MEAN, std=STD, device=device)


def toy_classifier(params: TrainParams, *, device: torch.device) -> Classifier:
    """Return the network on the device, with the random weights of seed 0."""
    torch.manual_seed(0)
    config = image_config(params, class_names=tuple(map(str, range(NUM_CLASSES))), mean=MEAN, std=STD)
    return build(config).to(device).to(memory_format=memory_format(params))
