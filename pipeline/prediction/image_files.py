"""Read image files that a user names; nothing here imports PyTorch, since each decoding process imports this module."""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.datasets.layout import suffix
from pipeline.images.blocks import hash_content
from pipeline.images.decode import MAX_FILE_BYTES, UNDECODABLE_SUFFIXES, UnreadableImage, check_suffix, decode
from pipeline.params import Channels, Resize
from pipeline.prediction.inputs import Input, describe_os_error


@dataclass(frozen=True)
class ReadImage:
    """An image file as it was read: its pixels, or the reason why it could not be decoded.

    `pixels` are (H, W, C) uint8, as `normalize` would store them. `content_hash` has the 16 hexadecimal digits of
    `hash_content` of the file, and is "" where the file could not be read.
    """

    path: str
    pixels: npt.NDArray[np.uint8] | None
    content_hash: str
    error: str = ""


class ReadFiles(NamedTuple):
    """Image files as they were read: paths, hashes, errors, and the pixels (n, H, W, C) uint8 of those without error.

    One array is passed between processes sooner than many.
    """

    paths: list[str]
    hashes: list[str]
    errors: list[str]
    pixels: npt.NDArray[np.uint8]

    def images(self) -> list[ReadImage]:
        """Return the files one by one; their pixels are views of the array."""
        pixels = iter(self.pixels)
        return [
            ReadImage(path, None if error else next(pixels), content_hash, error)
            for path, content_hash, error in zip(self.paths, self.hashes, self.errors, strict=True)
        ]


def read_files(
    inputs: Sequence[Input | ReadImage], *, image_size: int, channels: Channels, resize: Resize
) -> ReadFiles:
    """Read and decode the image files of the inputs, except those that were read already."""
    images = [
        each
        if isinstance(each, ReadImage)
        else read_image(each, image_size=image_size, channels=channels, resize=resize)
        for each in inputs
    ]
    pixels = [image.pixels for image in images if image.pixels is not None]
    return ReadFiles(
        [image.path for image in images],
        [image.content_hash for image in images],
        [image.error for image in images],
        np.stack(pixels) if pixels else np.empty((0, image_size, image_size, channels), np.uint8),
    )


def read_image(file: Input, *, image_size: int, channels: Channels, resize: Resize) -> ReadImage:
    """Read and decode an image file; where that fails, the result has the reason, in one line."""
    path, content_hash = file.path, ""
    if file.error:
        return ReadImage(path, None, "", file.error)
    try:
        if suffix(path) in UNDECODABLE_SUFFIXES:  # a tenth of the time of a small image is saved by this condition
            check_suffix(path)
        content = _read_bytes(path)
        content_hash = f"{hash_content(content):016x}"
        pixels = decode(content, image_size=image_size, channels=channels, resize=resize)
    except OSError as error:
        return ReadImage(path, None, content_hash, describe_os_error(error))
    except UnreadableImage as error:
        return ReadImage(path, None, content_hash, f"not readable as an image ({error})")
    return ReadImage(path, pixels, content_hash)


def is_readable(file: Input) -> bool:
    """Return whether the bytes of an input can be read, and read again."""
    if file.error or file.here_only:
        return False
    try:
        _read_bytes(file.path)
    except (OSError, UnreadableImage):
        return False
    return True


def _read_bytes(path: str) -> bytes:
    """Return the content of a file or pipe; raises UnreadableImage for a device and for content that is too long.

    A pipe is read until the program that writes into it closes it.
    """
    status = os.stat(path)  # noqa: PTH116
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError
    is_pipe = stat.S_ISFIFO(status.st_mode)
    if not (is_pipe or stat.S_ISREG(status.st_mode)):  # opening a device may already change something
        raise UnreadableImage("a device, not a file")
    if status.st_size > MAX_FILE_BYTES:
        raise UnreadableImage(f"{status.st_size:,} bytes; allowed: {MAX_FILE_BYTES:,}")
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123
        return _read_pipe(file) if is_pipe else file.read()


def _read_pipe(file: FileIO) -> bytes:
    """Return what is written into a pipe; raises UnreadableImage where it is too long."""
    content = bytearray()
    while part := file.read(2**16):
        content += part
        if len(content) > MAX_FILE_BYTES:
            raise UnreadableImage(f"more than {MAX_FILE_BYTES:,} bytes")
    return bytes(content)
