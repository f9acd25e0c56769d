"""Answer blocks of images with one row for each image."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.core.processes import num_cores
from pipeline.params import Views
from pipeline.prediction.image_files import ReadImage
from pipeline.prediction.model import LoadedModel, answer_of


@dataclass(frozen=True)
class Row:
    """The answer for one input, or the reason (`error`) why it has none.

    `class_name`, `probability`, `top` and `is_unknown` are those of `Answer`. An input with an error has no class,
    no probability and an empty `top`. `is_unknown` is also None where no coverage was asked for. `content_hash` (16
    hexadecimal digits) is None where the file cannot be read. `model_md5` is the MD5 of the weights file.
    """

    path: str
    model_md5: str
    content_hash: str | None = None
    class_name: str | None = None
    probability: float | None = None
    top: tuple[tuple[str, float], ...] = ()
    is_unknown: bool | None = None
    error: str | None = None


def answer_blocks(
    blocks: Iterable[Sequence[ReadImage]],
    *,
    model: LoadedModel,
    top: int,
    threshold: float | None = None,
    views: Views = "none",
) -> Iterator[list[Row]]:
    """Yield the rows of each block of images, in their order, with the `top` most probable classes of each image.

    With a threshold, an image whose highest probability is below it is unknown.
    """
    for block in blocks:
        pixels = [image.pixels for image in block if image.pixels is not None]
        answers = iter(model.probabilities(np.stack(pixels), threads=num_cores(), views=views) if pixels else ())
        yield [
            _unanswered(image, model=model)
            if image.pixels is None
            else _answered(image, next(answers), model=model, top=top, threshold=threshold)
            for image in block
        ]


def _unanswered(image: ReadImage, *, model: LoadedModel) -> Row:
    return Row(image.path, model.files.weights_md5, content_hash=image.content_hash or None, error=image.error)


def _answered(image: ReadImage, probabilities: Any, *, model: LoadedModel, top: int, threshold: float | None) -> Row:
    answer = answer_of(probabilities, config=model.config, top=top, threshold=threshold)
    return Row(
        path=image.path,
        model_md5=model.files.weights_md5,
        content_hash=image.content_hash,
        class_name=answer.class_name,
        probability=answer.probability,
        top=answer.top,
        is_unknown=None if threshold is None else answer.is_unknown,
    )
