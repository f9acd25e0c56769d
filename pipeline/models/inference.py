"""Run a network over images: logits and class probabilities, calibrated by the temperature of the model."""

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.arrays import Split, evaluation_batches
from pipeline.artifacts import Images
from pipeline.models.config import ModelConfig
from pipeline.params import Views


@torch.no_grad()
def logits_of(
    classifier: nn.Module,
    split: Split,
    *,
    batch_size: int,
    between: tuple[int, int] | None = None,
    views: Views = "none",
) -> Tensor:
    """Return the logits (N, num_classes) float32 of a split on its device.

    `between` limits them to the images from its first index up to its second. With several `views` of each image, the
    result is the weighted mean of their logits. The network is in evaluation mode meanwhile.
    """
    was_training = classifier.training
    classifier.eval()
    logits = []
    for images, _ in evaluation_batches(split, batch_size=batch_size, between=between):
        weighted = [weight * classifier(view).float() for weight, view in _views(images, views)]
        logits.append(torch.stack(weighted).sum(0) if len(weighted) > 1 else weighted[0])
    classifier.train(was_training)
    return torch.cat(logits)


def _views(images: Tensor, views: Views) -> list[tuple[float, Tensor]]:
    """Return views of the images (B, C, H, W) with their weights, whose sum is 1.

    They are the images and the mirrored images, and for `mirror_and_shift` also both shifted diagonally by one pixel,
    once in each direction.
    """
    if views == "none":
        return [(1.0, images)]
    unshifted = [(0.5, images), (0.5, images.flip(3))]
    if views == "mirror":
        return unshifted
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    shifted = [padded[:, :, start : start + height, start : start + width] for start in (0, 2)]
    return [(0.25, view) for _, view in unshifted] + [
        (0.125, view) for image in shifted for view in (image, image.flip(3))
    ]


def probabilities_of(logits: Tensor, *, temperature: float | None) -> npt.NDArray[np.float64]:
    """Return the class probabilities (N, num_classes) float64: the softmax of the logits divided by the temperature.

    Without a temperature, the logits are not divided. In float64, close logits keep their order at every temperature:
    the most probable class is that of the highest logit.
    """
    return (logits.cpu().double() / (temperature or 1.0)).softmax(1).numpy()


def class_probabilities(classifier: nn.Module, images: Images, *, config: ModelConfig) -> npt.NDArray[np.float64]:
    """Return the probabilities (N, num_classes) float64 of images (N, H, W, C) uint8, computed on the CPU.

    They are calibrated where the model has a temperature.
    """
    labels = np.zeros(len(images), dtype=np.int64)
    split = Split.of(images, labels, mean=config.mean, std=config.std, device=torch.device("cpu"))
    return probabilities_of(logits_of(classifier, split, batch_size=256), temperature=config.temperature)
