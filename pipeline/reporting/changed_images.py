"""Choose the images that changed sides between two models, with what each model predicted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.artifacts import Images
from pipeline.comparison.pairing import Pairing
from pipeline.reporting.gallery import GALLERY_LENGTH, Picture, picture


@dataclass(frozen=True)
class ChangedImage:
    """An image that only one model gets right: its row in the pairing, name, classes and probabilities."""

    index: int
    name: str
    content_hash: str
    actual: str
    predicted: tuple[str, str]  # by A and by B
    probability: tuple[float, float]  # that A and B give to what they predict


def only_right(pairing: Pairing, names: Sequence[str], *, of_a: bool) -> list[ChangedImage]:
    """Return the images that only A, or only B, gets right; first those of the highest mean probability of both.

    `names` are those of the images of the pairing for people. The probabilities are calibrated where the model has a
    known temperature.
    """
    a, b = pairing.a, pairing.b
    right, wrong = (a, b) if of_a else (b, a)
    indices = np.flatnonzero(right.is_correct & ~wrong.is_correct)
    confidences = [each.confidences(each.best_probabilities) for each in (a, b)]
    order: npt.NDArray[np.intp] = np.argsort(-(confidences[0] + confidences[1])[indices], kind="stable")
    return [
        ChangedImage(
            index=index,
            name=names[index],
            content_hash=a.content_hashes[index],
            actual=a.class_names[a.actual[index]],
            predicted=(a.class_names[a.predicted[index]], b.class_names[b.predicted[index]]),
            probability=(float(confidences[0][index]), float(confidences[1][index])),
        )
        for index in indices[order].tolist()
    ]


def with_known_pictures(
    changed: Sequence[ChangedImage], images: Images | None, *, rows: Mapping[str, int]
) -> list[tuple[ChangedImage, Picture | None]]:
    """Return the first images, each with its picture, or None where no image has its content hash.

    `rows` has the row in `images` by content hash.
    """
    return [
        (each, picture(images[rows[each.content_hash]], each.name))
        if images is not None and each.content_hash in rows
        else (each, None)
        for each in changed[:GALLERY_LENGTH]
    ]
