"""Join images into sets: images that are joined, directly or through others, are in the same set."""

from array import array

import numpy as np
import numpy.typing as npt

from pipeline.images.duplicates import Indices, Similar


class DisjointSets:
    """Sets of images by their index, at first one for each image; 8 bytes an image."""

    def __init__(self, size: int) -> None:
        self._parents = array("q", range(size))

    def join_equal(self, keys: npt.NDArray[np.generic], indices: Indices) -> None:
        """Join the images (n,) whose keys (n,) are equal."""
        order = np.argsort(keys, kind="stable")
        equal = keys[order][1:] == keys[order][:-1]
        self._join(indices[order][:-1][equal], indices[order][1:][equal])

    def join_similar(self, found: Similar) -> None:
        """Join each row with the columns that it is similar to."""
        rows, columns = (np.array([self._find(index) for index in each.tolist()]) for each in found[:2])
        # where many images are similar, nearly all of a million pairs are joined already
        pairs = np.argwhere((found.correlations > 0) & (rows[:, np.newaxis] != columns))
        first, second = rows[pairs[:, 0]], columns[pairs[:, 1]]
        _, chosen = np.unique(first * len(self._parents) + second, return_index=True)
        self._join(first[chosen], second[chosen])

    def labels(self) -> Indices:
        """Return the smallest index in the set of each image: (N,) int64."""
        return np.fromiter((self._find(index) for index in range(len(self._parents))), np.int64, len(self._parents))

    def _join(self, first: Indices, second: Indices) -> None:
        for one, other in zip(first.tolist(), second.tolist(), strict=True):
            low, high = sorted((self._find(one), self._find(other)))
            self._parents[high] = low

    def _find(self, index: int) -> int:
        """Return the smallest index in the set of an image; halve the path to it."""
        parents = self._parents
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index


def set_sizes(labels: Indices) -> Indices:
    """Return for each image (n,) how many of these images are in its set, by their labels from `DisjointSets`."""
    sizes: Indices = np.bincount(labels)[labels]
    return sizes
