"""Read CIFAR-10 from its official archive, which has six pickled batches of 10,000 images of 32x32 pixels each."""

import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.artifacts import Labels, copy_file
from pipeline.core.errors import TemporaryError, UserError
from pipeline.core.progress import format_bytes
from pipeline.datasets.archives import DamagedArchive, check_members, open_compressed_tar, read_member, report_damage
from pipeline.datasets.fetch import find_archive
from pipeline.datasets.pickles import load_pickle
from pipeline.datasets.source import Description, Source, array_blocks, check_class_names, choose_channels
from pipeline.images.blocks import Block
from pipeline.params import Channels, DownloadParams, NormalizeParams

ARCHIVE = "cifar-10-python.tar.gz"
ARCHIVE_FOLDER = "cifar-10-batches-py"
# (name, split) of the files with images, in the order in which they are read
BATCHES = (*((f"data_batch_{number}", "train") for number in range(1, 6)), ("test_batch", "test"))
IMAGE_SIZE = 32
NUM_IMAGES = 60_000


def download(folder: Path, *, params: DownloadParams) -> Mapping[str, Any]:
    """Write the archive with the MD5 `params.md5` to `cifar-10-python.tar.gz`; its files are not extracted.

    Raises UserError or TemporaryError where no place has it.
    """
    archive = find_archive(params)
    count = check_members(archive)
    if copy_file(archive, folder / ARCHIVE) != params.md5:
        raise TemporaryError(f"{archive}: changed while it was copied; try again")
    size = format_bytes(archive.stat().st_size)
    print(f"cifar10: {ARCHIVE}, {size}, {count} members, MD5 {params.md5} as expected")
    return {}


def open_cifar10(folder: Path, *, description: Description, params: NormalizeParams) -> Source:
    """Open the archive; raises UserError where a file in it is missing or does not have the documented format."""
    archive = folder / ARCHIVE
    with report_damage(archive):
        tar = open_compressed_tar(archive)
    names = _read_dictionary(tar, "batches.meta", archive=archive).get("label_names")
    if not isinstance(names, list) or not names or not all(type(name) in (str, bytes) for name in names):
        raise UserError(f"{archive}: batches.meta has no list of label_names; check download.md5")
    texts = [name.decode(errors="replace") if isinstance(name, bytes) else name for name in names]
    class_names = check_class_names(texts, origin=f"{archive}: batches.meta")
    channels = choose_channels(params, native=3)
    blocks = _blocks(tar, archive, num_classes=len(class_names), image_size=params.image_size, channels=channels)
    return Source(description.dataset, class_names, channels, num_files=NUM_IMAGES, blocks=blocks)


def _blocks(
    tar: tarfile.TarFile, archive: Path, *, num_classes: int, image_size: int, channels: Channels
) -> Iterator[Block]:
    """Yield the images, one batch (30 MB) in memory at a time."""
    with tar:
        for batch, split in BATCHES:
            pixels, labels = _read_batch(tar, batch, archive=archive, num_classes=num_classes)
            yield from array_blocks(pixels, labels, split=split, prefix=batch, image_size=image_size, channels=channels)


def _read_batch(
    tar: tarfile.TarFile, batch: str, *, archive: Path, num_classes: int
) -> tuple[npt.NDArray[np.uint8], Labels]:
    """Return images (n, 32, 32, 3) uint8 and labels (n,) int64."""
    content = _read_dictionary(tar, batch, archive=archive)
    data, labels = content.get("data"), content.get("labels")
    row = 3 * IMAGE_SIZE * IMAGE_SIZE
    if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == row):
        found = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise UserError(f"{archive}: data of {batch} is {found}; allowed: uint8 (n, {row}); check download.md5")
    if not (isinstance(labels, list) and len(labels) == len(data) and all(type(label) is int for label in labels)):
        raise UserError(f"{archive}: labels of {batch} are not {len(data)} whole numbers; check download.md5")
    if not all(0 <= label < num_classes for label in labels):
        raise UserError(f"{archive}: labels of {batch} are not all in 0…{num_classes - 1}; check download.md5")
    planes = data.reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), np.array(labels, np.int64)


def _read_dictionary(tar: tarfile.TarFile, name: str, *, archive: Path) -> dict[str, Any]:
    """Return the dictionary in a pickled file of the archive, with its keys as text."""
    try:
        with report_damage(archive):
            content = read_member(tar, f"{ARCHIVE_FOLDER}/{name}")
    except KeyError:
        raise UserError(f"{archive}: has no {ARCHIVE_FOLDER}/{name}; check download.urls and download.md5") from None
    try:
        value = load_pickle(content)
    except DamagedArchive as error:
        raise UserError(f"{archive}: {name} refused ({error}); check download.urls and download.md5") from None
    if not isinstance(value, dict):
        raise UserError(f"{archive}: {name} is a {type(value).__name__}; allowed: a dictionary; check download.md5")
    return {key.decode("latin1") if isinstance(key, bytes) else key: entry for key, entry in value.items()}
