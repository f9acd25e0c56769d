"""Build a network by the name in `train.model`, together with the preparation of its input."""

import copy
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from pipeline.core.errors import UserError, first_line
from pipeline.models.airbench import Airbench
from pipeline.models.config import ModelConfig
from pipeline.models.lenet import LeNet
from pipeline.models.names import TIMM_PREFIX
from pipeline.models.preparation import Interpolation, fit_to_size
from pipeline.models.timm import build_timm_network
from pipeline.models.torchvision import build_torchvision_network
from pipeline.params import TrainParams


class OwnNetwork(Protocol):
    """A class of networks from (B, channels, image_size, image_size) float32 to logits (B, num_classes)."""

    def __call__(self, *, num_classes: int, channels: int, image_size: int) -> nn.Module: ...


# by the name in `train.model`; names that begin with TIMM_PREFIX are timm's, all others torchvision's
OWN_NETWORKS: Mapping[str, OwnNetwork] = {"lenet": LeNet, "airbench": Airbench}


class Classifier(nn.Module):
    """A network and the preparation of its input, from normalized (B, C, H, H) float32 to logits (B, num_classes).

    Images that do not have `input_size` pixels a side are resized and cropped to it, as `fit_to_size` states.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        num_classes: int,
        network_channels: int,
        input_size: int | None,
        interpolation: Interpolation = "bilinear",
        crop_fraction: float = 1.0,
    ) -> None:
        super().__init__()
        self.network = network
        self.num_classes = num_classes
        self.network_channels = network_channels
        self.input_size = input_size
        self.interpolation: Interpolation = interpolation
        self.crop_fraction = crop_fraction
        self.head: Set[str] = frozenset()  # names of the network's tensors whose shape depends on the number of classes
        self.frozen: Sequence[nn.Module] = ()  # modules that stay in evaluation mode, such as batch normalization

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.frozen:
            module.training = False
        return self

    def forward(self, images: Tensor) -> Tensor:
        if self.input_size is not None:
            images = fit_to_size(
                images, size=self.input_size, interpolation=self.interpolation, crop_fraction=self.crop_fraction
            )
        if images.shape[1] < self.network_channels:
            images = images.expand(-1, self.network_channels, -1, -1)
        output = self.network(images)
        # while training, googlenet and inception_v3 return auxiliary logits too
        return output if isinstance(output, Tensor) else output.logits


def build(config: ModelConfig) -> Classifier:
    """Build the classifier with random initial weights; raises UserError for an unknown name or an unsuitable size."""
    num_classes = len(config.class_names)
    with _explain_unsuitable_size(config, batch_size=1):
        network = build_network(config, num_classes=num_classes)
    channels = config.channels if config.model in OWN_NETWORKS else 3
    classifier = Classifier(
        network,
        num_classes=num_classes,
        network_channels=channels,
        input_size=config.input_size,
        interpolation=config.interpolation,
        crop_fraction=config.crop_fraction,
    )
    _check_forward_pass(classifier.eval(), config=config, batch_size=1)
    classifier.train()
    return classifier


def build_network(config: ModelConfig, *, num_classes: int) -> nn.Module:
    """Build the network without the preparation of its input, with random initial weights."""
    if own := OWN_NETWORKS.get(config.model):
        return own(num_classes=num_classes, channels=config.channels, image_size=config.network_size)
    if config.model.startswith(TIMM_PREFIX):
        return build_timm_network(config.model, num_classes=num_classes, image_size=config.network_size)
    return build_torchvision_network(config, num_classes=num_classes)


def memory_format(params: TrainParams) -> torch.memory_format:
    """Return the memory format that `train.channels_last` selects for the network's weights."""
    return torch.channels_last if params.channels_last else torch.contiguous_format


def try_training(classifier: Classifier, *, config: ModelConfig, batch_size: int) -> None:
    """Raise UserError where the network cannot train on batches of this size, as batch normalization on one image."""
    if config.model != "lenet":
        _check_forward_pass(copy.deepcopy(classifier).train(), config=config, batch_size=min(batch_size, 2))


def _check_forward_pass(classifier: nn.Module, *, config: ModelConfig, batch_size: int) -> None:
    """Raise UserError where a forward pass over zeros fails; only a pass shows whether the image size is suitable."""
    images = torch.zeros(batch_size, config.channels, config.image_size, config.image_size)
    with _explain_unsuitable_size(config, batch_size=batch_size), torch.no_grad():
        classifier(images)


@contextmanager
def _explain_unsuitable_size(config: ModelConfig, *, batch_size: int) -> Iterator[None]:
    """Raise UserError where the network refuses the image size or the batch size inside the block."""
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"train.model {config.model} cannot take images of {config.network_size} pixels in batches of {batch_size} "
            f"({first_line(error)}); set train.input_size to the size it was made for, such as 224, or raise batch_size"
        ) from None
