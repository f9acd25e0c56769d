"""Define what all data sources share: `Source`, which yields images, and the content of `source.json`."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from pipeline.artifacts import Images, Labels, read_json
from pipeline.core.errors import UserError
from pipeline.core.validation import first_problem
from pipeline.images.blocks import Block, block_length, hash_content
from pipeline.images.decode import resize_pixels
from pipeline.params import Channels, Dataset, NormalizeParams

DESCRIPTION = "source.json"
DOWNLOAD_AGAIN = "run `dvc repro download --force`"


@dataclass(frozen=True)
class Source:
    """A data set whose images are read once, block by block."""

    dataset: Dataset
    class_names: tuple[str, ...]
    channels: Channels
    # number of image files or images, including unreadable ones
    num_files: int
    # of at most BLOCK_IMAGES images and about BLOCK_BYTES each; their order depends only on the data
    blocks: Iterator[Block]
    # names of files in class folders that are not images
    ignored_files: Sequence[str] = ()
    # (name, reason) of images in formats without a decoder, which are in no block
    undecodable_files: Sequence[tuple[str, str]] = ()


class _Undecodable(BaseModel):
    """A file in a format without a decoder."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    file: str
    reason: str


class Description(BaseModel):
    """The content of `source.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dataset: Dataset
    class_names: list[str] = []
    counts: dict[str, dict[str, NonNegativeInt]] = {}  # files by split and class
    num_groups: NonNegativeInt = 0  # groups that a table of labels gives
    ignored_files: list[str] = []
    undecodable_files: list[_Undecodable] = []
    files: dict[str, Any] = {}  # numbers of files found, used and not used, for readers of the file only


def read_description(folder: Path) -> Description:
    """Read `source.json` of a download folder; raises UserError where it is missing or damaged."""
    path = folder / DESCRIPTION
    try:
        return Description.model_validate(read_json(path))
    except ValidationError as error:
        raise UserError(f"{path}: damaged ({first_problem(error)}); {DOWNLOAD_AGAIN}") from None


def choose_channels(params: NormalizeParams, *, native: Channels) -> Channels:
    """Return the channels of the parameters or, for `auto`, the source's own number `native`."""
    return native if params.channels == "auto" else params.channels


def check_class_names(class_names: Sequence[str], *, origin: str) -> tuple[str, ...]:
    """Return the class names as a tuple, checked so that logs, tables and file names can contain them.

    Raises UserError for a name that is empty, not printable or has a slash, and for one that occurs twice.
    """
    for name in class_names:
        if not name.isprintable() or not name.strip() or "/" in name:
            raise UserError(
                f"{origin}: found the class name {name!r}; allowed: printable characters without /; rename the class"
            )
    if len(set(class_names)) < len(class_names):
        raise UserError(f"{origin}: a class name occurs twice; allowed: distinct names; {DOWNLOAD_AGAIN}")
    return tuple(class_names)


def array_blocks(
    pixels: npt.NDArray[np.uint8], labels: Labels, *, split: str, prefix: str, image_size: int, channels: Channels
) -> Iterator[Block]:
    """Resize images and yield them in blocks.

    `pixels` is (N, H, W) or (N, H, W, 3) uint8, `labels` (N,) int64. The blocks have (n, image_size, image_size,
    channels) uint8, and the images have the names `<prefix>/00000` and so on.
    """
    unchanged = pixels.shape[1:] == (image_size, image_size, channels)
    length = block_length(image_size * image_size * channels)
    for start in range(0, len(pixels), length):
        some = pixels[start : start + length]
        images = some if unchanged else _resize(some, image_size=image_size, channels=channels)
        names = [f"{prefix}/{number:05}" for number in range(start, start + len(some))]
        hashes = [hash_content(image.tobytes()) for image in some]
        yield Block(split, images, labels[start : start + length], names, [], hashes)


def _resize(images: Iterable[npt.NDArray[np.uint8]], *, image_size: int, channels: Channels) -> Images:
    return np.stack([resize_pixels(image, image_size=image_size, channels=channels) for image in images])
