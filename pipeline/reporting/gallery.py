"""Choose the images that the report shows, and encode them as small pictures without metadata."""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.artifacts import Images, Labels
from pipeline.evaluation.predictions import Predictions

MAX_LOSSLESS_SIZE = 40  # pixels a side, up to which an image is stored as PNG and enlarged by the browser
MAX_SIZE = 112  # pixels a side of a stored picture
WEBP_QUALITY = 72
GALLERY_LENGTH = 12
MAX_EXAMPLES = 200  # pictures in the section with examples of each class
MAX_EXAMPLES_OF_CLASS = 8


@dataclass(frozen=True)
class Picture:
    """A picture of a gallery: its data URI, and what is known about the image.

    `index` is that of the image in its split. Names are class names; `probability` is that of the predicted class.
    """

    uri: str
    pixelated: bool
    index: int
    name: str
    actual: str
    predicted: str = ""
    probability: float = math.nan


def encode(image: npt.NDArray[np.uint8]) -> str:
    """Return an image (H, W, C) uint8 as a data URI; a large one is made smaller."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    stream = BytesIO()
    if is_lossless(image):
        kind = "png"
        picture.save(stream, format="PNG", optimize=True)
    else:
        kind = "webp"
        picture.thumbnail((MAX_SIZE, MAX_SIZE), Image.Resampling.LANCZOS)
        picture.save(stream, format="WEBP", quality=WEBP_QUALITY)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def is_lossless(image: npt.NDArray[np.uint8]) -> bool:
    """Return whether an image (H, W, C) is small enough to be stored with all its pixels."""
    return bool(max(image.shape[:2]) <= MAX_LOSSLESS_SIZE)


def mistakes(predictions: Predictions, images: Images) -> list[Picture]:
    """Return the wrong predictions of the highest probability, the highest first."""
    return _predicted(predictions, images, np.flatnonzero(~predictions.is_correct), sign=-1)


def doubtful(predictions: Predictions, images: Images) -> list[Picture]:
    """Return the correct predictions of the lowest probability, the lowest first."""
    return _predicted(predictions, images, np.flatnonzero(predictions.is_correct), sign=1)


def _predicted(predictions: Predictions, images: Images, indices: Labels, *, sign: int) -> list[Picture]:
    """Return pictures of the images in the order of sign times the probability of the predicted class."""
    confidences = predictions.confidences(predictions.best_probabilities)
    order = np.argsort(sign * confidences[indices], kind="stable")[:GALLERY_LENGTH]
    names = predictions.class_names
    return [
        Picture(
            encode(images[index]),
            is_lossless(images[index]),
            index,
            predictions.names[index],
            names[predictions.actual[index]],
            names[predictions.predicted[index]],
            float(confidences[index]),
        )
        for index in indices[order].tolist()
    ]


def examples(
    images: Images, labels: Labels, *, file_names: Sequence[str], class_names: Sequence[str]
) -> list[tuple[str, list[Picture]]]:
    """Return pictures of each class with its name, evenly spaced over the images of the class.

    With more than MAX_EXAMPLES classes, those are the first ones.
    """
    number = min(MAX_EXAMPLES_OF_CLASS, max(1, MAX_EXAMPLES // len(class_names)))
    found = []
    for label, class_name in enumerate(class_names[:MAX_EXAMPLES]):
        of_class = np.flatnonzero(labels == label)
        chosen = of_class[np.unique(np.linspace(0, len(of_class) - 1, number).astype(int))] if len(of_class) else []
        pictures = [
            Picture(encode(images[index]), is_lossless(images[index]), index, file_names[index], class_name)
            for index in map(int, chosen)
        ]
        found.append((class_name, pictures))
    return found
