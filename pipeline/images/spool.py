"""Hold decoded images in temporary files, so that a large data set needs little memory."""

import json
import math
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pipeline.artifacts import Images, Labels
from pipeline.images.blocks import SPLITS, Block, block_length, hash_content
from pipeline.images.duplicates import Digests, FeatureBlocks, Indices, digests, features

Hashes = npt.NDArray[np.uint64]  # (N,)


def hash_group(name: str) -> int:
    """Return the hash of a group's name; 0 for no name."""
    return hash_content(name.encode(errors="surrogatepass")) if name else 0


class Spool:
    """Decoded images, found by their index: pixels, features and names on disk, hashes and labels in memory."""

    def __init__(self, folder: Path) -> None:
        self._files = ExitStack()
        self._pixels, self._features, self._names = (
            self._files.enter_context(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115
            for _ in ("pixels", "features", "names")
        )
        self._name_starts, self._names_end = array("q"), 0
        self._labels, self._splits, self._digests = array("q"), array("b"), bytearray()
        self._content_hashes, self._group_hashes = array("Q"), array("Q")
        self.shape: tuple[int, ...] = ()
        self.unreadable: list[tuple[str, str]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def add(self, block: Block) -> None:
        """Append the images of a block; their indices continue those of the images before."""
        self.unreadable += block.unreadable
        if not len(block.images):
            return
        self.shape = block.images.shape[1:]
        self._pixels.write(np.ascontiguousarray(block.images).data)
        self._features.write(features(block.images).data)
        self._digests += digests(block.images).tobytes()
        self._labels.extend(block.labels.tolist())
        self._splits.extend([SPLITS.index(block.split)] * len(block.labels))
        self._content_hashes.extend(block.content_hashes)
        self._group_hashes.extend(hash_group(name) for name in block.groups or [""] * len(block.labels))
        for name in block.names:
            line = json.dumps(name).encode() + b"\n"
            self._name_starts.append(self._names_end)
            self._names_end += self._names.write(line)

    @property
    def labels(self) -> Labels:
        """Return the labels of all images: (N,) int64."""
        return np.array(self._labels, np.int64)

    @property
    def digests(self) -> Digests:
        """Return the digests of all images: (N, 2) uint64."""
        return np.frombuffer(bytes(self._digests), np.uint64).reshape(-1, 2)

    @property
    def content_hashes(self) -> Hashes:
        """Return the hashes of the contents of all images: (N,) uint64."""
        return np.array(self._content_hashes, np.uint64)

    @property
    def group_hashes(self) -> Hashes:
        """Return the hashes of the group names of all images, 0 for those without one: (N,) uint64."""
        return np.array(self._group_hashes, np.uint64)

    def images_of(self, split: str) -> Indices:
        """Return the ascending indices of the images that the source has in this split."""
        return np.flatnonzero(np.array(self._splits, np.int8) == SPLITS.index(split))

    def name(self, index: int) -> str:
        """Return the name of an image."""
        self._names.seek(self._name_starts[index])
        name: str = json.loads(self._names.readline())
        return name

    def pixel_blocks(self, indices: Indices) -> Iterator[Images]:
        """Yield the pixels (n, H, W, C) uint8 of images, whose indices are ascending, in blocks."""
        for _, block in self._blocks(self._pixels, indices, dtype=np.uint8, shape=self.shape):
            yield block

    def feature_blocks(self, indices: Indices) -> FeatureBlocks:
        """Yield indices (n,) and features (n, D) int16 of images, whose indices are ascending, in blocks."""
        length = features(np.zeros((1, *self.shape), np.uint8)).shape[1]
        return self._blocks(self._features, indices, dtype=np.int16, shape=(length,))

    def _blocks(
        self, file: Any, indices: Indices, *, dtype: npt.DTypeLike, shape: tuple[int, ...]
    ) -> Iterator[tuple[Indices, npt.NDArray[Any]]]:
        """Yield indices and rows of a temporary file, in blocks.

        The file is not memory-mapped: pages of a map that were read count as memory of this process.
        """
        size = math.prod(shape) * np.dtype(dtype).itemsize
        length = block_length(size)
        for start in range(0, len(self._labels), length):
            chosen = indices[np.searchsorted(indices, start) : np.searchsorted(indices, start + length)]
            if len(chosen):
                file.seek(start * size)
                content = file.read(length * size)
                yield chosen, np.frombuffer(content, dtype).reshape(-1, *shape)[chosen - start]
