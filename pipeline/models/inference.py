"""Run a network over images: logits and class probabilities, calibrated by the temperature of the model."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.arrays import Split, evaluation_batches, normalize_pixels
from pipeline.artifacts import Images
from pipeline.models.config import ModelConfig
from pipeline.params import Views

# On the CPU, the last bits of an image's logits depend on the size of its batch, on its position in a batch whose size
# is no multiple of 8, and on the number of threads that compute a batch (measured with LeNet, airbench, ResNet-18 and
# EfficientNet-Lite0). They are the same in batches of 16 that one thread computes, whatever the other images are.
IMAGES_PER_CHUNK = 16


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
        logits.append(_weighted_logits(classifier, images, views=views))
    classifier.train(was_training)
    return torch.cat(logits)


def independent_logits(classifier: nn.Module, split: Split, *, threads: int, views: Views = "none") -> Tensor:
    """Return the logits (N, num_classes) float32 of a split on the CPU, as `logits_of` does, for a trained network.

    The bits of an image's logits depend neither on the other images and their number nor on the number of `threads`.
    Each thread computes chunks of IMAGES_PER_CHUNK images by itself, which is as fast as larger batches on all threads.
    The network must be in evaluation mode.
    """
    before = torch.get_num_threads()
    chunk_logits = partial(_chunk_logits, classifier, split, views=views)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return torch.cat(list(pool.map(chunk_logits, range(0, len(split), IMAGES_PER_CHUNK))))
    finally:
        torch.set_num_threads(before)


def trained_logits(
    classifier: nn.Module, split: Split, *, threads: int, batch_size: int, views: Views = "none"
) -> Tensor:
    """Return the logits (N, num_classes) float32 of a split by a trained network, on the CPU.

    On the CPU, they are computed by `independent_logits`; on another device, in batches of `batch_size` images.
    """
    if split.labels.device.type == "cpu":
        return independent_logits(classifier, split, threads=threads, views=views)
    return logits_of(classifier, split, batch_size=batch_size, views=views).cpu()


@torch.no_grad()
def _chunk_logits(classifier: nn.Module, split: Split, start: int, *, views: Views) -> Tensor:
    """Return the logits of the chunk that begins at an image; a shorter last chunk is filled up with black images."""
    pixels = split.pixels(start, min(start + IMAGES_PER_CHUNK, len(split)))
    missing = IMAGES_PER_CHUNK - len(pixels)
    images = normalize_pixels(F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else pixels, split=split)
    return _weighted_logits(classifier, images, views=views)[: len(pixels)]


def _weighted_logits(classifier: nn.Module, images: Tensor, *, views: Views) -> Tensor:
    """Return the logits (B, num_classes) float32, with several views the weighted mean of those of the views."""
    weighted = [weight * classifier(view).float() for weight, view in _views(images, views)]
    return torch.stack(weighted).sum(0) if len(weighted) > 1 else weighted[0]


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

    They are calibrated where the model has a temperature. The images are computed together, which is faster for a few
    than `trained_logits`; the last bits depend on their number.
    """
    labels = np.zeros(len(images), dtype=np.int64)
    split = Split.of(images, labels, mean=config.mean, std=config.std, device=torch.device("cpu"))
    return probabilities_of(logits_of(classifier, split, batch_size=256), temperature=config.temperature)
