"""Find the images on which an export is verified: those of the validation split, or files that the user names."""

import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np

from pipeline.arrays import DatasetInfo
from pipeline.artifacts import NORMALIZE, Images, read_split, verify_splits
from pipeline.core.errors import UserError
from pipeline.evaluation.predict_split import find_mismatch
from pipeline.models.config import ModelConfig
from pipeline.prediction.image_files import read_image
from pipeline.prediction.inputs import Input, expand_paths

MIN_IMAGES, MAX_IMAGES = 64, 256  # with 64, no image is twice in the largest batch
MIN_VALIDATION_IMAGES = 16  # small data sets have fewer than MIN_IMAGES
REMEDIES = (
    f"name {MIN_IMAGES} image files or more of its classes with --images FOLDER, or run this in a checkout whose "
    "`dvc repro normalize` made the arrays that it was trained on"
)
Item = TypeVar("Item")


def validation_images(config: ModelConfig, *, label: str) -> Images:
    """Return up to MAX_IMAGES images (N, H, W, C) uint8 of `artifacts/normalize/`, spread over its validation split.

    Raises UserError where there are fewer than MIN_VALIDATION_IMAGES, or where they are not as those that the model
    takes.
    """
    if not (NORMALIZE / "dataset.json").is_file():
        raise UserError(f"{NORMALIZE}: no validation images to verify the export of {label} on; {REMEDIES}")
    verify_splits("validation")
    if found := find_mismatch(config, DatasetInfo.read()):
        raise UserError(
            f"{NORMALIZE}: its validation images do not fit {label}: {found.field} is {found.of_data}; allowed: "
            f"{found.of_model}; {REMEDIES}"
        )
    images, _ = read_split("validation")
    if len(images) < MIN_VALIDATION_IMAGES:
        raise UserError(
            f"{NORMALIZE}: the validation split has {len(images)} images; allowed: {MIN_VALIDATION_IMAGES} or more; "
            f"{REMEDIES}"
        )
    return np.stack(spread(images, MAX_IMAGES))


def read_images(folder: Path, *, config: ModelConfig) -> Images:
    """Return up to MAX_IMAGES images (N, H, W, C) uint8 from the files of a folder, spread over them.

    Files that cannot be read are left out. Raises UserError where fewer than MIN_IMAGES can be read.
    """
    size, channels, resize = config.image_size, config.channels, config.resize
    files = spread(find_files(folder, option="--images"), MAX_IMAGES)
    read = (read_image(Input(str(path)), image_size=size, channels=channels, resize=resize).pixels for path in files)
    images = [pixels for pixels in read if pixels is not None]
    if len(images) < MIN_IMAGES:
        raise UserError(
            f"--images {folder}: {len(images)} of {len(files)} files can be read as images; allowed: {MIN_IMAGES} or "
            "more; name a folder with more images"
        )
    return np.stack(images)


def find_files(folder: Path, *, option: str) -> list[Path]:
    """Return the images that `predict` finds in a folder and its folders, in the same order.

    Raises UserError, naming the option, where there are none.
    """
    top = os.path.join(folder, "")  # noqa: PTH118  # the "/" distinguishes a folder from the list `-`
    inputs = expand_paths([top], stdin=BytesIO(), null=False) if folder.is_dir() else ()
    found = [Path(file.path) for file in inputs if not file.error]
    if not found:
        state = "found no image files" if folder.is_dir() else "no such folder"
        raise UserError(f"{option} {folder}: {state}; allowed: a folder with image files; name another folder")
    return found


def spread(items: "Sequence[Item] | Images", count: int) -> list[Item]:
    """Return `count` of the items at equal distances from the first to the last, or all where there are fewer."""
    indices = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[index] for index in indices]
