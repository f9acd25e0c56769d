"""Read scikit-learn's 1,797 handwritten digits of 8x8 pixels, which need no download."""

import gzip
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.artifacts import read_array, write_array
from pipeline.core.errors import UserError
from pipeline.datasets.source import DOWNLOAD_AGAIN, Description, Source, array_blocks, choose_channels
from pipeline.params import DownloadParams, NormalizeParams

WHITE = 16  # the largest value of a pixel
CLASS_NAMES = tuple("0123456789")


def download(folder: Path, *, params: DownloadParams) -> Mapping[str, Any]:  # noqa: ARG001  # as in all sources
    """Write `images.npy`, (1797, 8, 8) uint8 from 0 to 16, and `labels.npy`, (1797,) int64."""
    rows = _read_rows()
    images, labels = rows[:, :-1].reshape(-1, 8, 8), rows[:, -1]
    write_array(folder / "images.npy", [images], shape=images.shape, dtype=np.uint8)
    write_array(folder / "labels.npy", [labels], shape=labels.shape, dtype=np.int64)
    print(f"digits: {len(images):,} images of 8x8 pixels from scikit-learn")
    return {}


def _read_rows() -> npt.NDArray[np.uint8]:
    """Return the digits as rows (1797, 65) uint8, each of 64 pixels and the label.

    Reads the file that `sklearn.datasets.load_digits` reads, because importing scikit-learn takes about one second.
    Raises UserError if the file does not exist.
    """
    package = importlib.util.find_spec("sklearn")
    path = Path(package.origin).parent / "datasets/data/digits.csv.gz" if package and package.origin else None
    if path is None or not path.exists():
        raise UserError(f"download.dataset is digits, but {path or 'scikit-learn'} is missing; run `make install`")
    with gzip.open(path, "rt", encoding="ascii") as file:
        return np.loadtxt(file, dtype=np.uint8, delimiter=",")


def open_digits(folder: Path, *, description: Description, params: NormalizeParams) -> Source:
    """Open the digits, with pixels scaled to 0…255; raises UserError where the arrays cannot be the digits."""
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
