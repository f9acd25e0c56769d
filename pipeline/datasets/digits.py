"""scikit-learn's 1,797 handwritten digits of 8x8 pixels, which need no network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artifacts import read_array, write_array
from pipeline.core.errors import UserError
from pipeline.datasets.source import DOWNLOAD_AGAIN, Description, Source, array_blocks, choose_channels
from pipeline.params import DownloadParams, NormalizeParams

WHITE = 16
CLASS_NAMES = tuple("0123456789")


def download(folder: Path, *, params: DownloadParams) -> Mapping[str, Any]:  # noqa: ARG001  # as every source has it
    """Write `images.npy`, (1797, 8, 8) uint8 from 0 to 16, and `labels.npy`, (1797,) int64."""
    from sklearn.datasets import load_digits  # noqa: PLC0415  # takes seconds, and only this data source needs it

    digits = load_digits()
    images, labels = digits.images, digits.target
    write_array(folder / "images.npy", [images], shape=images.shape, dtype=np.uint8)
    write_array(folder / "labels.npy", [labels], shape=labels.shape, dtype=np.int64)
    print(f"digits: {len(images):,} images of 8x8 pixels from scikit-learn")
    return {}


def open_digits(folder: Path, *, description: Description, params: NormalizeParams) -> Source:
    """Open the digits, with values scaled to 0…255; raises UserError where the arrays are not the digits."""
    values = read_array(folder / "images.npy", dtype=np.uint8, dimensions=3)
    labels = read_array(folder / "labels.npy", dtype=np.int64, dimensions=1)
    in_range = 0 not in values.shape and values.max() <= WHITE and ((labels >= 0) & (labels < len(CLASS_NAMES))).all()
    if len(values) != len(labels) or not in_range:
        raise UserError(f"{folder}: not scikit-learn's digits (values 0-16, labels 0-9); {DOWNLOAD_AGAIN}")
    channels = choose_channels(params, native=1)
    blocks = array_blocks(
        np.rint(values * (255 / WHITE)).astype(np.uint8),
        labels,
        split="train",
        prefix="digits",
        image_size=params.image_size,
        channels=channels,
    )
    return Source(description.dataset, CLASS_NAMES, channels, num_files=len(values), blocks=blocks)
