"""Wrap a trained network for its export: normalization before it, calibrated probabilities after it."""

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.arrays import Split
from pipeline.models.build import Classifier
from pipeline.models.config import ModelConfig


class ExportedNetwork(nn.Module):
    """A network from images (N, H, W, C) uint8 to class probabilities (N, num_classes) float32.

    Pixels are normalized by the scale and shift of `Split`. The logits are divided by the temperature of the model; one
    without a temperature gives probabilities that are not calibrated.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, classifier: Classifier, *, config: ModelConfig) -> None:
        super().__init__()
        pixel = np.zeros((1, 1, 1, config.channels), np.uint8)  # a split of one pixel has one number for each channel
        split = Split.of(pixel, np.zeros(1, np.int64), mean=config.mean, std=config.std)
        self.register_buffer("scale", split.scale)
        self.register_buffer("shift", split.shift)
        self.classifier = classifier
        self.temperature = config.temperature

    def normalize(self, images: Tensor) -> Tensor:
        """Return (N, H, W, C) uint8 pixels as (N, C, H, W) float32, as `normalize_pixels` does."""
        return torch.addcmul(self.shift, images.float(), self.scale).permute(0, 3, 1, 2)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.classifier(self.normalize(images)).float()
        calibrated: Tensor = logits if self.temperature is None else logits / self.temperature
        return calibrated.softmax(1)
