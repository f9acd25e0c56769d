"""Augment images at random with torchvision's transforms: each image on its own, and whole batches by mixing images.

The transforms draw from PyTorch's own generator on the CPU, also for images on a GPU. Every call seeds that generator
and restores its state afterwards, since dropout uses it too: the result depends on the image and the seed only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from pipeline.params import AutoAugment, TrainParams

Transform = Callable[[Tensor], Tensor]  # of one image (C, H, W)
Mixing = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # of images (B, C, H, W) and labels (B,)


@dataclass(frozen=True)
class Augmentation:
    """The random augmentation of each image in each epoch, as `TrainParams` describes it; sizes in pixels, 0 for none.

    A random resized crop makes images of `input_size` pixels a side, or, if that is None, of the size that they had.
    """

    flip: bool = False
    crop_padding: int = 0
    cutout_size: int = 0
    random_resized_crop: float | None = None
    color_jitter: float = 0.0
    auto_augment: AutoAugment = "none"
    random_erasing: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    input_size: int | None = None

    @classmethod
    def of(cls, params: TrainParams) -> Self:
        """Return the augmentation that the parameters describe."""
        return cls(**{name: getattr(params, name) for name in cls.__dataclass_fields__})


def pixel_transform(augmentation: Augmentation, *, image_size: int) -> Transform | None:
    """Return the transform of one image (C, H, W) uint8 of `image_size` pixels a side, or None if it has none.

    The crop is first: it makes the images of most trainings smaller, and so the other transforms faster.
    """
    transforms: list[Transform] = []
    if augmentation.random_resized_crop is not None:
        # bilinear also for a network that resizes by bicubic interpolation; antialiased, as the network does
        scale, size = (augmentation.random_resized_crop, 1.0), augmentation.input_size or image_size
        transforms.append(_v2().RandomResizedCrop(size, scale=scale, antialias=True))
    if augmentation.auto_augment != "none":
        transforms.append(_policy(augmentation.auto_augment))
    if value := augmentation.color_jitter:
        transforms.append(_v2().ColorJitter(brightness=value, contrast=value, saturation=value, hue=value / 4))
    return _v2().Compose(transforms) if transforms else None


def erasing_transform(augmentation: Augmentation) -> Transform | None:
    """Return the transform that erases part of one normalized image (C, H, W) in place, or None if it has none.

    The erased part becomes 0, the mean (Zhong et al. 2017, arXiv:1708.04896).
    """
    probability = augmentation.random_erasing
    return _v2().RandomErasing(p=probability, value=0, inplace=True) if probability else None


def mixing_transform(augmentation: Augmentation, *, num_classes: int | None) -> Mixing | None:
    """Return the transform that mixes each image of a batch with the one before it, or None if it has none.

    It takes normalized images (B, C, H, W) and labels (B,) int64, and returns images of the same shape and the shares
    of the classes (B, num_classes) float32. With MixUp (Zhang et al. 2017, arXiv:1710.09412) and CutMix (Yun et al.
    2019, arXiv:1905.04899), it applies one of both, drawn for the batch.
    """
    alphas = {"MixUp": augmentation.mixup_alpha, "CutMix": augmentation.cutmix_alpha}
    choices = [
        getattr(_v2(), name)(alpha=alpha, num_classes=num_classes) for name, alpha in alphas.items() if alpha > 0
    ]
    return _v2().RandomChoice(choices) if choices else None


def apply_to_each(transform: Transform, images: Tensor, *, seeds: Sequence[int]) -> list[Tensor]:
    """Return the results of the transform for each image of a batch (B, C, H, W), each with its own seed."""
    # one call for the whole batch would draw once, and transform all images in the same way
    return [apply_seeded(transform, image, seed=seed) for image, seed in zip(images, seeds, strict=True)]


def apply_seeded(function: Callable[..., Any], *arguments: Tensor, seed: int) -> Any:
    """Return the result of a function that draws from PyTorch's generator on the CPU, after seeding that generator.

    The state of the generator is restored, and the generators of other devices stay as they are.
    """
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPU's, which dropout uses
        return function(*arguments)


def _policy(name: AutoAugment) -> Any:
    """Return torchvision's policy of this name, with its default strength."""
    policies = {"rand_augment": "RandAugment", "trivial_augment": "TrivialAugmentWide"}
    return getattr(_v2(), policies[name])(interpolation=_v2().InterpolationMode.BILINEAR)


def _v2() -> Any:
    """Return torchvision's transforms."""
    from torchvision.transforms import v2  # noqa: PLC0415  # see pipeline/models/torchvision.py

    return v2
