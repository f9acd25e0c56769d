"""Find the images on which an export is verified: those of the validation split, or files that the user names."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from pipeline.arrays import DatasetInfo
from pipeline.artifacts import NORMALIZE, Images, read_split, verify_splits
from pipeline.core.errors import UserError
from pipeline.images.decode import IMAGE_SUFFIXES, UnreadableImage, decode
from pipeline.models.config import ModelConfig

MAX_IMAGES = 256
WAYS = (
    "name image files of its classes with --images FOLDER, or run this in a checkout whose `dvc repro normalize` made "
    "the arrays that it was trained on"
)
Item = TypeVar("Item")


def validation_images(config: ModelConfig, *, label: str) -> Images:
    """Return up to MAX_IMAGES images (N, H, W, C) uint8 of `artifacts/normalize/`, spread over its validation split.

    Raises UserError where there are none, or where they are not as those that the model takes.
    """
    if not (NORMALIZE / "dataset.json").is_file():
        raise UserError(f"{NORMALIZE}: no validation images to verify the export of {label} on; {WAYS}")
    verify_splits("validation")
    info = DatasetInfo.read()
    for field in ("class_names", "image_size", "channels", "resize"):
        found, expected = getattr(info, field), getattr(config, field)
        if found != expected:
            raise UserError(
                f"{NORMALIZE}: its validation images do not fit {label}: {field} is {_shorten(found)}; allowed: "
                f"{_shorten(expected)}; {WAYS}"
            )
    images, _ = read_split("validation")
    if not len(images):
        raise UserError(f"{NORMALIZE}: the validation split has no images; {WAYS}")
    return np.stack(spread(images, MAX_IMAGES))


def read_images(folder: Path, *, config: ModelConfig) -> Images:
    """Return up to MAX_IMAGES images (N, H, W, C) uint8 from the files of a folder, spread over them.

    Files that cannot be read are left out. Raises UserError where none can be read.
    """
    images = []
    for path in spread(find_files(folder, option="--images"), MAX_IMAGES):
        try:
            content = path.read_bytes()
            images.append(decode(content, image_size=config.image_size, channels=config.channels, resize=config.resize))
        except UnreadableImage:
            continue
    if not images:
        raise UserError(f"--images {folder}: none of the files can be read as an image; name another folder")
    return np.stack(images)


def find_files(folder: Path, *, option: str) -> list[Path]:
    """Return the image files in a folder and its sub-folders, by their suffixes, sorted; hidden ones are left out.

    Raises UserError, naming the option, where there are none.
    """
    found = [
        Path(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if Path(name).suffix.lower() in IMAGE_SUFFIXES
    ]
    visible = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not visible:
        state = "found no image files" if folder.is_dir() else "no such folder"
        raise UserError(f"{option} {folder}: {state}; allowed: a folder with image files; name another folder")
    return sorted(visible)


def spread(items: "Sequence[Item] | Images", count: int) -> list[Item]:
    """Return `count` of the items at equal distances from the first to the last, or all where there are fewer."""
    indices = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[index] for index in indices]


def _shorten(value: object) -> str:
    text = str(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 80 else f"{text[:80]}…"
