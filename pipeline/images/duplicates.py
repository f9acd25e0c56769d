"""Images that occur more than once: exactly, by a hash of their pixels, and nearly, by correlation.

What counts is computed in whole numbers or in single correctly rounded operations, so that the result is the same on
any machine, whatever its number of threads and width of vectors.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from pipeline.artifacts import Images
from pipeline.core.processes import num_cores

Digests = npt.NDArray[np.uint64]
"""(N, 2) uint64: 128 bits an image."""
Features = npt.NDArray[np.int16]
"""(N, D) int16; see `features`."""
Indices = npt.NDArray[np.int64]
GRID = 8
"""Cells a side to which an image is averaged before it is compared."""
_NORM = 4000
_AXES = 31
"""Principal axes by which products are bounded; on CIFAR-10 they keep 73 % of the squares, and the bound leaves two of
a million pairs."""
_ROWS = 1024
"""Rows of features multiplied at a time: 4 MB of products."""
TEST_ROWS = 2**14
"""Test images held in memory: 40 MB of features and their projections."""


@dataclass(frozen=True)
class ExactDuplicates:
    """What `exact_duplicates` found."""

    within: dict[str, int]
    """By split: images beyond the first of each group of identical ones in it."""
    across: dict[str, int]
    """By pair of splits "A-B": images of B that are identical to one in A."""
    pairs: list[tuple[int, int]]
    """Examples: indices of an image and of an identical later one; pairs in two splits come first."""
    test: Indices
    """Images of the last split that are identical to one of an earlier split, ascending."""


@dataclass(frozen=True)
class Match:
    """A test image and the image outside the test split that it is most like."""

    test: int
    other: int
    correlation: float


def digests(images: Images) -> Digests:
    """Return the 128-bit BLAKE2b of each image's pixels."""
    hashes = (hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images)
    return np.frombuffer(b"".join(hashes), "<u8").reshape(len(images), 2).astype(np.uint64)


def exact_duplicates(found: Digests, splits: Mapping[str, Indices], *, examples: int) -> ExactDuplicates:
    """Find groups of identical images; `splits` gives the indices into `found` of each split, test last."""
    group = _groups(found)
    members = {split: _present(group, indices) for split, indices in splits.items()}
    within = {split: len(indices) - int(members[split].sum()) for split, indices in splits.items()}
    across = {f"{a}-{b}": int(members[a][group[splits[b]]].sum()) for a, b in combinations(splits, 2)}
    *others, test = splits
    earlier = np.logical_or.reduce([members[split] for split in others])
    leaked = splits[test][earlier[group[splits[test]]]]
    return ExactDuplicates(within, across, _example_pairs(group, splits, limit=examples), leaked)


def _groups(found: Digests) -> Indices:
    """Return the same number for identical digests: (N,) int64."""
    order = np.lexsort((found[:, 1], found[:, 0]))
    ordered = found[order]
    starts = np.r_[False, (ordered[1:] != ordered[:-1]).any(axis=1)][: len(found)]
    group = np.empty(len(found), np.int64)
    group[order] = np.cumsum(starts)
    return group


def _present(group: Indices, indices: Indices) -> npt.NDArray[np.bool_]:
    present = np.zeros(int(group.max(initial=-1)) + 1, np.bool_)
    present[group[indices]] = True
    return present


def _example_pairs(group: Indices, splits: Mapping[str, Indices], *, limit: int) -> list[tuple[int, int]]:
    """Yield each image that is not the first of its group, with that first one."""
    order = np.concatenate(list(splits.values()))
    split = np.repeat(np.arange(len(splits)), [len(indices) for indices in splits.values()])
    _, first, inverse = np.unique(group[order], return_index=True, return_inverse=True)
    first = first[inverse]
    later = np.flatnonzero(first != np.arange(len(order)))
    across = split[later] != split[first[later]]
    chosen = np.concatenate([later[across], later[~across]])[:limit]
    return [(int(order[first[position]]), int(order[position])) for position in chosen]


def features(images: Images) -> Features:
    """Return the differences between neighboring cells of the image in 8 x 8 cells, scaled to one norm and rounded.

    (N, S, S, C) uint8, S at least 8, to (N, 112 C) int16. The dot product of two of them, over _NORM squared, is their
    correlation to within 0.0001. An image of one color has none: all zeros.

    Differences were chosen on CIFAR-10 by looking at pairs. They leave out brightness and weigh slow gradients, as
    of a sky, less: at the threshold where 2.6 % of the test images are found, 19 of 20 pairs are the same picture;
    with the cells' values themselves it is three of four at 3.4 %. The literature, by neural features and by
    eye, has 3.25 % (Barz and Denzler 2020, "Do We Train on Test Data?", doi:10.3390/jimaging6060041).
    """
    cells = _cells(images)
    down = np.diff(cells, axis=1).reshape(len(images), -1)
    right = np.diff(cells, axis=2).reshape(len(images), -1)
    differences = np.concatenate([down, right], axis=1)
    squares = np.einsum("nd,nd->n", differences, differences)  # exact: at most 336 * 4080**2
    norms = np.sqrt(np.maximum(squares, 1).astype(np.float64))
    scaled: Features = np.rint(differences * _NORM / norms[:, np.newaxis]).astype(np.int16)
    return scaled


def mirrored(values: Features) -> Features:
    """Return the features of the images mirrored left to right."""
    channels = values.shape[1] // (2 * GRID * (GRID - 1))
    down, right = np.split(values, 2, axis=1)
    down = down.reshape(-1, GRID - 1, GRID, channels)[:, :, ::-1]
    right = -right.reshape(-1, GRID, GRID - 1, channels)[:, :, ::-1]
    result: Features = np.concatenate([down.reshape(len(values), -1), right.reshape(len(values), -1)], axis=1)
    return result


def _cells(images: Images) -> npt.NDArray[np.int64]:
    """Return the mean of each cell in sixteenths, rounded down: (N, 8, 8, C), 0 to 4080.

    Sums of a cell up to 256 pixels a side are below 2**24: float32 is exact, and four times as fast as whole numbers.
    """
    count, size, _, channels = images.shape
    edges = np.arange(GRID) * size // GRID
    sides = np.diff(np.r_[edges, size])
    member = np.repeat(np.eye(GRID, dtype=np.float32), sides, axis=1)
    sums = member @ images.reshape(count, size, size * channels).astype(np.float32)
    sums = member @ sums.reshape(count, GRID, size, channels)
    result: npt.NDArray[np.int64] = sums.astype(np.int64) * 16 // np.multiply.outer(sides, sides)[:, :, np.newaxis]
    return result


FeatureBlocks = Iterator[tuple[Indices, Features]]
"""Indices (n,) of images and their features (n, D), in blocks."""


def near_duplicates(test: FeatureBlocks, others: Callable[[], FeatureBlocks], *, correlation: float) -> list[Match]:
    """Find test images whose correlation with another image or its mirror image is at least this, in order.

    Only the most similar other image is returned. `others` is called once for each TEST_ROWS test images.
    """
    with ThreadPoolExecutor(num_cores()) as pool, threadpool_limits(1, user_api="blas"):
        blocks = _gathered(test, rows=TEST_ROWS)
        matches = (
            match for block in blocks for match in _matches(*block, others(), correlation=correlation, pool=pool)
        )
        return [match for match in matches if match.correlation >= correlation]


def _matches(
    indices: Indices, values: Features, others: FeatureBlocks, *, correlation: float, pool: ThreadPoolExecutor
) -> list[Match]:
    """Return the most similar other image of each test image, exact where the similarity is at least `correlation`."""
    least = (0.99 * correlation - 0.001) * _NORM**2  # norms are within 0.25 % of _NORM, and bounds are rounded
    axes = _principal_axes(values[:_ROWS])
    sides = [_Rows(side, _projected(side, axes)) for side in (values, mirrored(values))]
    tiles = [(side, start) for side in sides for start in range(0, len(values), _ROWS)]
    best = np.zeros(len(values), np.float32)
    index, square = np.zeros(len(values), np.int64), np.ones(len(values), np.int64)
    for other_indices, other_values in _gathered(others, rows=_ROWS):
        columns = _Rows(other_values, _projected(other_values, axes))
        for rows, product, column in pool.map(partial(_candidates, columns=columns, least=least), tiles):
            better = product > best[rows]
            found, nearest = rows[better], column[better]
            best[found], index[found] = product[better], other_indices[nearest]
            square[found] = _squares(other_values[nearest])
    scale = np.sqrt((np.maximum(_squares(values), 1) * square).astype(np.float64))
    return [Match(*match) for match in zip(indices.tolist(), index.tolist(), (best / scale).tolist(), strict=True)]


class _Rows(NamedTuple):
    values: Features
    projected: npt.NDArray[np.float32]
    """See `_projected`."""


def _candidates(
    tile: tuple[_Rows, int], *, columns: _Rows, least: float
) -> tuple[Indices, npt.NDArray[np.float32], Indices]:
    """Return, of the _ROWS rows from the start of the tile, those whose product with a column may be `least` or more.

    Returns them, the largest product of each, and the column that has it. Only these rows are multiplied whole. These
    are products of whole numbers; every partial sum is at most the product of the norms (Cauchy-Schwarz), which is
    below 2**24: float32 is exact.
    """
    side, start = tile
    bounds = side.projected[start : start + _ROWS] @ columns.projected.T
    rows = start + np.flatnonzero(bounds.max(axis=1) >= least)
    products = side.values[rows].astype(np.float32) @ columns.values.astype(np.float32).T
    column = products.argmax(axis=1)
    return rows, products[np.arange(len(rows)), column], column


def _principal_axes(values: Features) -> npt.NDArray[np.float64]:
    """Return the directions in which these rows extend most: (D, _AXES) float64, orthonormal."""
    wide = values.astype(np.float64)
    _, vectors = np.linalg.eigh(wide.T @ wide)
    axes: npt.NDArray[np.float64] = vectors[:, -_AXES:]
    return axes


def _projected(values: Features, axes: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Return coordinates on the axes, and the norm of the remainder: (N, _AXES + 1) float32.

    The dot product of two of them is no less than that of the features, by Cauchy-Schwarz on what is left.
    """
    coordinates = values.astype(np.float64) @ axes
    left = _squares(values) - np.einsum("nd,nd->n", coordinates, coordinates)
    return np.column_stack([coordinates, np.sqrt(np.maximum(left, 0))]).astype(np.float32)


def _squares(values: Features) -> npt.NDArray[np.int64]:
    wide = values.astype(np.int64)
    squares: npt.NDArray[np.int64] = np.einsum("nd,nd->n", wide, wide)
    return squares


def _gathered(blocks: FeatureBlocks, *, rows: int) -> FeatureBlocks:
    """Yield the same in blocks of this many rows, the last one of fewer: products of few rows are slow."""
    indices, values, count = list[Indices](), list[Features](), 0
    for block_indices, block_values in blocks:
        indices.append(block_indices)
        values.append(block_values)
        count += len(block_indices)
        if count >= rows:
            joined = np.concatenate(indices), np.concatenate(values)
            count %= rows
            for start in range(0, len(joined[0]) - count, rows):
                yield joined[0][start : start + rows], joined[1][start : start + rows]
            indices, values = [joined[0][len(joined[0]) - count :]], [joined[1][len(joined[1]) - count :]]
    if count:
        yield np.concatenate(indices), np.concatenate(values)
