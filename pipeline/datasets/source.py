"""What all data sources share: `Source`, from which images are read, and `source.json`, which describes its files."""

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
from pipeline.images.blocks import Block, block_length
from pipeline.images.decode import resize_pixels
from pipeline.params import Channels, Dataset, NormalizeParams

DESCRIPTION = "source.json"
DOWNLOAD_AGAIN = "run `dvc repro download --force`"


@dataclass(frozen=True)
class Source:
    """A data set to be read once, from the first to the last block."""

    dataset: Dataset
    class_names: tuple[str, ...]
    channels: Channels
    num_files: int
    """Number of files or images, readable or not."""
    blocks: Iterator[Block]
    """At most BLOCK_IMAGES images and about BLOCK_BYTES each, in an order that only the data determines."""
    ignored_files: Sequence[str] = ()
    """Names of files in the class folders that are not used and are no images."""
    undecodable_files: Sequence[tuple[str, str]] = ()
    """(name, reason) of images in formats without a decoder, which are in no block."""


class _Undecodable(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    file: str
    reason: str


class Description(BaseModel):
    """The content of `source.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dataset: Dataset
    class_names: list[str] = []
    counts: dict[str, dict[str, NonNegativeInt]] = {}
    """Number of files by split and class."""
    ignored_files: list[str] = []
    undecodable_files: list[_Undecodable] = []
    files: dict[str, Any] = {}
    """How many files were found, used and not used; for people who read the file."""


def read_description(folder: Path) -> Description:
    """Read `source.json` of a download folder; raises UserError where it is missing or damaged."""
    path = folder / DESCRIPTION
    try:
        return Description.model_validate(read_json(path))
    except ValidationError as error:
        raise UserError(f"{path}: damaged ({first_problem(error)}); {DOWNLOAD_AGAIN}") from None


def choose_channels(params: NormalizeParams, *, native: Channels) -> Channels:
    """Return the number of channels to read: that of the parameters, or the source's own where that is auto."""
    return native if params.channels == "auto" else params.channels


def check_class_names(class_names: Sequence[str], *, origin: str) -> tuple[str, ...]:
    """Return the names if they could be those of folders: logs, tables and pages show them as they are.

    Raises UserError for a name that is empty, not printable or has a slash, and for one that comes twice.
    """
    for name in class_names:
        if not name.isprintable() or not name.strip() or "/" in name:
            raise UserError(f"{origin}: found the class name {name!r}; allowed: printable characters without /")
    if len(set(class_names)) < len(class_names):
        raise UserError(f"{origin}: a class name comes twice; allowed: distinct names; {DOWNLOAD_AGAIN}")
    return tuple(class_names)


def array_blocks(
    pixels: npt.NDArray[np.uint8], labels: Labels, *, split: str, prefix: str, image_size: int, channels: Channels
) -> Iterator[Block]:
    """Yield blocks of (N, H, W) or (N, H, W, 3) uint8, brought to (N, image_size, image_size, channels).

    The images are named `<prefix>/00000` and so on.
    """
    unchanged = pixels.shape[1:] == (image_size, image_size, channels)
    length = block_length(image_size * image_size * channels)
    for start in range(0, len(pixels), length):
        some = pixels[start : start + length]
        images = some if unchanged else _resize(some, image_size=image_size, channels=channels)
        names = [f"{prefix}/{number:05}" for number in range(start, start + len(some))]
        yield Block(split, images, labels[start : start + length], names, [])


def _resize(images: Iterable[npt.NDArray[np.uint8]], *, image_size: int, channels: Channels) -> Images:
    return np.stack([resize_pixels(image, image_size=image_size, channels=channels) for image in images])
