"""Prepare images for a network: which normalization pretrained weights expect, and how images get the right size."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from pipeline.models.names import TIMM_PREFIX
from pipeline.models.packaged import PACKAGED_NETWORK, PIXEL_MEAN, PIXEL_STD
from pipeline.models.timm import timm_config
from pipeline.params import Channels

Interpolation = Literal["bilinear", "bicubic"]
Values = tuple[float, ...]


@dataclass(frozen=True)
class Preparation:
    """How images are prepared for a network.

    `mean` and `std` are those of pixels / 255, one number for each channel. Images of another size than the network's
    are resized to its size / `crop_fraction`, and their center is cut out.
    """

    mean: Values
    std: Values
    interpolation: Interpolation = "bilinear"
    crop_fraction: float = 1.0


def pretrained_preparation(model: str, *, weights: str | None, channels: Channels) -> Preparation | None:
    """Return the preparation that the pretrained weights of a network expect, or None where the data set decides.

    The data set decides for random weights and for networks of ours. A file in `train.weights` is taken for weights of
    the same origin as DEFAULT. Raises UserError for an unknown network of timm.
    """
    if weights is None:
        return None
    found = _of_timm(model, weights) if model.startswith(TIMM_PREFIX) else _of_torchvision(model)
    if found is None or channels == len(found.mean):
        return found
    mean, std = (sum(values) / len(values) for values in (found.mean, found.std))
    return replace(found, mean=(mean,), std=(std,))


def _of_timm(name: str, weights: str) -> Preparation:
    """Return the preparation that timm states for the weights of a network; the packaged weights have their own."""
    config = timm_config(name)
    is_packaged = name == PACKAGED_NETWORK and weights == "DEFAULT"
    mean, std = ((PIXEL_MEAN,) * 3, (PIXEL_STD,) * 3) if is_packaged else (config.mean, config.std)
    crop_fraction = min(config.crop_pct, 1.0)  # more than 1 means a black border, which is left out here
    return Preparation(tuple(mean), tuple(std), config.interpolation, crop_fraction)


def _of_torchvision(name: str) -> Preparation | None:
    """Return the preparation that torchvision states for DEFAULT weights; None where it does not have the network."""
    from torchvision import models  # noqa: PLC0415  # see pipeline/models/torchvision.py

    if name not in models.list_models(module=models):
        return None
    weights: Any = models.get_model_weights(name)
    values = weights.DEFAULT.transforms()
    crop_fraction = values.crop_size[0] / values.resize_size[0]
    return Preparation(tuple(values.mean), tuple(values.std), values.interpolation.value, crop_fraction)


def fit_to_size(images: Tensor, *, size: int, interpolation: Interpolation, crop_fraction: float) -> Tensor:
    """Return the images (B, C, H, H) float32 as (B, C, size, size).

    Images of this size are returned unchanged. Others are resized to size / crop_fraction, unless they have that size,
    and their center is cut out.
    """
    if images.shape[-1] == size:
        return images
    resized = round(size / crop_fraction)
    if images.shape[-1] != resized:
        images = F.interpolate(images, size=(resized, resized), mode=interpolation, align_corners=False, antialias=True)
    start = (resized - size) // 2
    return images[:, :, start : start + size, start : start + size]
