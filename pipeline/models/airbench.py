"""Define the network of airbench94, a small one that was designed to reach 94 % on CIFAR-10 in seconds on a GPU.

Keller Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (arXiv:2404.00498). The first layer whitens the
images: its filters are computed from training images before the first step, and are not trained. All other convolutions
start as the identity.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.core.errors import UserError

WIDTHS = (64, 256, 256)
PATCH_SIZE = 2  # height and width of the first layer's filters in pixels
OUTPUT_SCALE = 1 / 9
EPSILON = 5e-4  # added to the variances, so that directions without contrast are not amplified
MIN_IMAGE_SIZE = 25  # pixels; smaller images vanish in the pooling layers


class Airbench(nn.Sequential):
    """A network from normalized images (B, channels, image_size, image_size) float32 to logits (B, num_classes)."""

    def __init__(self, *, num_classes: int, channels: int, image_size: int) -> None:
        if image_size < MIN_IMAGE_SIZE:
            raise UserError(
                f"train.model airbench needs images of at least {MIN_IMAGE_SIZE} pixels, found {image_size}; "
                "raise normalize.image_size or set train.input_size"
            )
        whitened = 2 * channels * PATCH_SIZE**2
        side = (image_size - PATCH_SIZE + 1) // 2 ** len(WIDTHS) // 3
        super().__init__(
            nn.Conv2d(channels, whitened, PATCH_SIZE),
            nn.GELU(),
            *(
                layer
                for in_channels, width in zip((whitened, *WIDTHS), WIDTHS, strict=False)
                for layer in _block(in_channels, width)
            ),
            nn.MaxPool2d(3),
            nn.Flatten(),
            nn.Linear(WIDTHS[-1] * side**2, num_classes, bias=False),
            Scale(OUTPUT_SCALE),
        )
        self.whitening.weight.requires_grad_(False)

    @property
    def whitening(self) -> nn.Conv2d:
        """Return the first layer."""
        layer = self[0]
        assert isinstance(layer, nn.Conv2d)
        return layer

    @torch.no_grad()
    def whiten(self, batches: Iterable[Tensor]) -> None:
        """Compute the first layer's filters from normalized images (B, channels, H, W) float32.

        The filters are the principal components of the images' patches, each divided by the root of its variance, and
        the negatives of these. Sums are float64, so that the batch size hardly matters. They are computed on the
        images' device, and the eigenvectors on the CPU: 0.03 s for 5,000 images on an H100, 0.4 s on its CPU alone.
        """
        size = self.whitening.weight[0].numel()
        products, number = torch.zeros(size, size, dtype=torch.float64), 0
        for images in batches:
            patches = F.unfold(images.contiguous(), PATCH_SIZE).transpose(1, 2).reshape(-1, size).double()
            products = products.to(patches.device) + patches.T @ patches
            number += len(patches)
        variances, components = torch.linalg.eigh((products / number).cpu())
        filters = (components / (variances + EPSILON).sqrt()).T
        self.whitening.weight.copy_(torch.cat([filters, -filters]).view_as(self.whitening.weight))


class Scale(nn.Module):
    """A layer that multiplies by a number, which is not trained."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, values: Tensor) -> Tensor:
        return values * self.factor


def _block(in_channels: int, width: int) -> list[nn.Module]:
    """Return the layers of a block, which maps (B, in_channels, H, W) to (B, width, H // 2, W // 2)."""
    return [
        _convolution(in_channels, width),
        nn.MaxPool2d(2),
        _norm(width),
        nn.GELU(),
        _convolution(width, width),
        _norm(width),
        nn.GELU(),
    ]


def _convolution(in_channels: int, width: int) -> nn.Conv2d:
    """Return a 3x3 convolution whose first `in_channels` outputs are its inputs."""
    layer = nn.Conv2d(in_channels, width, 3, padding="same", bias=False)
    nn.init.dirac_(layer.weight[:in_channels])
    return layer


def _norm(width: int) -> nn.BatchNorm2d:
    """Return a batch normalization whose scale is not trained."""
    layer = nn.BatchNorm2d(width, eps=1e-12, momentum=0.4)
    layer.weight.requires_grad_(False)
    return layer
