"""Make networks that are frozen as the parameters say, and train them on small splits."""

from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.arrays import Split
from pipeline.artifacts import file_md5
from pipeline.models.build import Classifier, build
from pipeline.models.freezing import apply_freezing
from pipeline.params import TrainParams
from pipeline.training.features import compute_features, with_features
from pipeline.training.loop import TrainingResult, train
from tests.conftest import train_params
from tests.test_model import config
from tests.test_train import QUICK, split_of

WEIGHTS = "body.safetensors"
FROZEN = {"freeze": "backbone", "weights": WEIGHTS, "crop_padding": 0}
FLIPPED = {**FROZEN, "flip": True}
UNTIL = {"freeze": "until=3", "weights": WEIGHTS}


def divided(model: str, *, classes: int = 3, size: int = 32, **changes: Any) -> tuple[Classifier, TrainParams]:
    """Return a network with random weights, divided as the parameters say, and the parameters."""
    params = train_params(model=model, weights=WEIGHTS, **{"crop_padding": 0} | QUICK | changes)
    configuration = config(model, classes=classes, image_size=size)
    torch.manual_seed(0)
    classifier = build(configuration)
    apply_freezing(classifier, config=configuration, params=params)
    return classifier, params


def timm_classifier(name: str) -> Classifier:
    """Return a network of timm with 3 classes and a marked head."""
    size: dict[str, Any] = {"depth": 2, "embed_dim": 24, "num_heads": 2} if name.startswith("vit") else {}
    network, other = (timm.create_model(name, num_classes=number, **size) for number in (3, 4))
    classifier, shapes = Classifier(network, num_classes=3, network_channels=3, input_size=None), other.state_dict()
    tensors = network.state_dict()
    classifier.head = {name for name in tensors if tensors[name].shape != shapes[name].shape}
    return classifier


def splits() -> tuple[Split, Split]:
    return split_of(48, seed=1), split_of(24, seed=2)


def fit(trained: nn.Module, params: TrainParams, data: tuple[Split, Split], **options: Any) -> TrainingResult:
    return train(trained, params=params, train_split=data[0], validation_split=data[1], **options)


def as_features(classifier: Classifier, head: nn.Module, split: Split) -> Split:
    return with_features(split, np.concatenate(list(compute_features(classifier, head, split, name="a split"))))


def write_weights(folder: Path, model: str = "lenet") -> str:
    """Write weights of a network with 10 classes, and return their MD5."""
    torch.manual_seed(1)
    save_file(build(config(model)).network.state_dict(), folder / WEIGHTS)
    return file_md5(folder / WEIGHTS)
