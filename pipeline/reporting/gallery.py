"""Choose the images that the report shows, and encode them as small pictures without metadata."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.artifacts import Images, Labels
from pipeline.evaluation.predictions import Predictions

MAX_LOSSLESS_SIZE = 40  # pixels a side, up to which an image is stored as PNG and enlarged by the browser
ANSWER_SIZE = 192  # pixels a side, at most, of a picture of a prediction
EXAMPLE_SIZE = 112  # pixels a side, at most, of an example of a class
WEBP_QUALITY = 72
GALLERY_LENGTH = 12
MAX_EXAMPLES = 200  # pictures in the section with examples of each class
MAX_EXAMPLES_OF_CLASS = 8


@dataclass(frozen=True)
class Picture:
    """A picture of an image: its data URI, whether the browser enlarges its pixels, and the name of the image."""

    uri: str
    pixelated: bool
    name: str


@dataclass(frozen=True)
class Answer:
    """A prediction: index in the test split and name of the image, class names, probability of the predicted class."""

    index: int
    name: str
    actual: str
    predicted: str
    probability: float


def encode(image: npt.NDArray[np.uint8], *, max_size: int) -> str:
    """Return an image (H, W, C) uint8 as a data URI; one of more than `max_size` pixels a side is made smaller."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    stream = BytesIO()
    if is_lossless(image):
        kind = "png"
        picture.save(stream, format="PNG", optimize=True)
    else:
        kind = "webp"
        picture.thumbnail((max_size, max_size), Image.Resampling.LANCZOS)
        picture.save(stream, format="WEBP", quality=WEBP_QUALITY)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def is_lossless(image: npt.NDArray[np.uint8]) -> bool:
    """Return whether an image (H, W, C) is small enough to be stored with all its pixels."""
    return bool(max(image.shape[:2]) <= MAX_LOSSLESS_SIZE)


def mistakes(predictions: Predictions) -> list[Answer]:
    """Return the wrong predictions, that of the highest probability first."""
    return _answers(predictions, np.flatnonzero(~predictions.is_correct), sign=-1)


def doubtful(predictions: Predictions) -> list[Answer]:
    """Return the correct predictions, that of the lowest probability first."""
    return _answers(predictions, np.flatnonzero(predictions.is_correct), sign=1)


def _answers(predictions: Predictions, indices: Labels, *, sign: int) -> list[Answer]:
    """Return the predictions in the order of sign times the probability of the predicted class."""
    confidences = predictions.confidences(predictions.best_probabilities)
    order = np.argsort(sign * confidences[indices], kind="stable")
    names = predictions.class_names
    return [
        Answer(
            index,
            predictions.names[index],
            names[predictions.actual[index]],
            names[predictions.predicted[index]],
            float(confidences[index]),
        )
        for index in indices[order].tolist()
    ]


def with_pictures(answers: Sequence[Answer], images: Images) -> list[tuple[Answer, Picture]]:
    """Return the first predictions, each with the picture of its image among the test images."""
    return [(each, picture(images[each.index], each.name)) for each in answers[:GALLERY_LENGTH]]


def picture(image: npt.NDArray[np.uint8], name: str, *, max_size: int = ANSWER_SIZE) -> Picture:
    """Return the picture of an image (H, W, C) with its name."""
    return Picture(encode(image, max_size=max_size), is_lossless(image), name)


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
        pictures = [picture(images[index], file_names[index], max_size=EXAMPLE_SIZE) for index in map(int, chosen)]
        found.append((class_name, pictures))
    return found
