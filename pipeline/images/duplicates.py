"""Find images that occur more than once: exact duplicates by a hash of the pixels, near-duplicates by correlation.

Results are computed in whole numbers, or in single operations that are correctly rounded. They are therefore the same
on every machine, whatever its number of threads and its vector instructions.
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

Digests = npt.NDArray[np.uint64]  # (N, 2): 128 bits for each image
Features = npt.NDArray[np.int16]  # (N, D), see `features`
Indices = npt.NDArray[np.int64]
GRID = 8  # an image is averaged to GRID x GRID cells before it is compared
_NORM = 4000  # to which the features of each image are scaled
# principal axes for the upper bound of products: on CIFAR-10 they hold 73 % of the squared norms, and only two of a
# million pairs of images have a bound above the threshold
_AXES = 31
_ROWS = 1024  # of features that are multiplied at a time: 4 MB of products
TEST_ROWS = 2**14  # test images in memory at a time: 40 MB of features and their projections


@dataclass(frozen=True)
class ExactDuplicates:
    """The numbers of identical images, examples of them, and the test images with a copy in another split."""

    # by split: the number of images, less the number of different ones
    within: dict[str, int]
    # by pair of splits "A-B": the number of images in B that are identical to one in A
    across: dict[str, int]
    # examples: indices of an image and of a later identical one; pairs of different splits come first
    pairs: list[tuple[int, int]]
    # ascending indices of images in the last split that are identical to one in an earlier split
    test: Indices


@dataclass(frozen=True)
class Match:
    """A test image and the most similar image of the other splits, by their indices, with their correlation."""

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
    across = {
        f"{first}-{second}": int(members[first][group[splits[second]]].sum())
        for first, second in combinations(splits, 2)
    }
    *others, test = splits
    in_others = np.logical_or.reduce([members[split] for split in others])
    test_duplicates = splits[test][in_others[group[splits[test]]]]
    return ExactDuplicates(within, across, _example_pairs(group, splits, limit=examples), test_duplicates)


def _groups(found: Digests) -> Indices:
    """Return the group of each image, (N,) int64: images with identical digests have the same group."""
    order = np.lexsort((found[:, 1], found[:, 0]))
    ordered = found[order]
    starts = np.r_[False, (ordered[1:] != ordered[:-1]).any(axis=1)][: len(found)]
    group = np.empty(len(found), np.int64)
    group[order] = np.cumsum(starts)
    return group


def _present(group: Indices, indices: Indices) -> npt.NDArray[np.bool_]:
    """Return for each group whether one of these images is in it: (number of groups,) bool."""
    present = np.zeros(int(group.max(initial=-1)) + 1, np.bool_)
    present[group[indices]] = True
    return present


def _example_pairs(group: Indices, splits: Mapping[str, Indices], *, limit: int) -> list[tuple[int, int]]:
    """Return pairs of the first image of a group and a later one in it, those of different splits first."""
    order = np.concatenate(list(splits.values()))
    split = np.repeat(np.arange(len(splits)), [len(indices) for indices in splits.values()])
    _, first, inverse = np.unique(group[order], return_index=True, return_inverse=True)
    first = first[inverse]
    later = np.flatnonzero(first != np.arange(len(order)))
    across = split[later] != split[first[later]]
    chosen = np.concatenate([later[across], later[~across]])[:limit]
    return [(int(order[first[position]]), int(order[position])) for position in chosen]


def features(images: Images) -> Features:
    """Return features of images whose dot products show how similar the images are.

    Images (N, S, S, C) uint8, with S of at least 8, are averaged to 8 x 8 cells. Their features (N, 112 C) int16 are
    the differences between neighboring cells, scaled to the norm _NORM and rounded. The dot product of the features of
    two images, divided by _NORM squared, is their correlation to within 0.0001. The features of an image of one color
    are zeros.

    Differences were chosen after a look at pairs of CIFAR-10 images. They ignore brightness and give slow gradients, as
    in a sky, less weight. At the threshold where 2.6 % of the test images have a match, 19 of 20 pairs show the same
    picture. With the values of the cells it is three of four pairs, at 3.4 %. The literature found 3.25 %, by features
    of a network and by eye (Barz and Denzler 2020, "Do We Train on Test Data?", doi:10.3390/jimaging6060041).
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
    """Return the features of the mirrored images (left to right), given those of the images."""
    channels = values.shape[1] // (2 * GRID * (GRID - 1))
    down, right = np.split(values, 2, axis=1)
    down = down.reshape(-1, GRID - 1, GRID, channels)[:, :, ::-1]
    right = -right.reshape(-1, GRID, GRID - 1, channels)[:, :, ::-1]
    result: Features = np.concatenate([down.reshape(len(values), -1), right.reshape(len(values), -1)], axis=1)
    return result


def _cells(images: Images) -> npt.NDArray[np.int64]:
    """Return the mean of each cell in sixteenths, rounded down: (N, 8, 8, C) int64 from 0 to 4080.

    The sum over a cell of up to 256 x 256 pixels is below 2**24: float32 is exact, and four times as fast as integers.
    """
    count, size, _, channels = images.shape
    edges = np.arange(GRID) * size // GRID
    sides = np.diff(np.r_[edges, size])
    member = np.repeat(np.eye(GRID, dtype=np.float32), sides, axis=1)
    sums = member @ images.reshape(count, size, size * channels).astype(np.float32)
    sums = member @ sums.reshape(count, GRID, size, channels)
    result: npt.NDArray[np.int64] = sums.astype(np.int64) * 16 // np.multiply.outer(sides, sides)[:, :, np.newaxis]
    return result


FeatureBlocks = Iterator[tuple[Indices, Features]]  # blocks of indices (n,) of images and their features (n, D)


def near_duplicates(test: FeatureBlocks, others: Callable[[], FeatureBlocks], *, correlation: float) -> list[Match]:
    """Return the test images whose correlation with another image or its mirror image is at least `correlation`.

    The matches are in the order of the test images, each with the most similar other image only. `others` is called
    once for each TEST_ROWS test images, and returns all other images.
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
    """Return the most similar other image of each test image; it is exact if its correlation is at least `correlation`.

    Test images without a candidate of such a correlation may have another match, with a lower correlation.
    """
    # the smallest product to look at: norms differ from _NORM by up to 0.25 %, and bounds are rounded
    least = (0.99 * correlation - 0.001) * _NORM**2
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
    """Features of some images, and their projections from `_projected`."""

    values: Features
    projected: npt.NDArray[np.float32]


def _candidates(
    tile: tuple[_Rows, int], *, columns: _Rows, least: float
) -> tuple[Indices, npt.NDArray[np.float32], Indices]:
    """Return the rows of a tile whose product with a column may be `least` or more.

    A tile is the _ROWS rows from its start. The result is the numbers of the rows, the largest product of each, and the
    column of that product. Only for these rows are the whole features multiplied. They are whole numbers, and every
    partial sum is at most the product of the norms (Cauchy-Schwarz), which is below 2**24: float32 is exact.
    """
    side, start = tile
    bounds = side.projected[start : start + _ROWS] @ columns.projected.T
    rows = start + np.flatnonzero(bounds.max(axis=1) >= least)
    products = side.values[rows].astype(np.float32) @ columns.values.astype(np.float32).T
    column = products.argmax(axis=1)
    return rows, products[np.arange(len(rows)), column], column


def _principal_axes(values: Features) -> npt.NDArray[np.float64]:
    """Return the directions along which the rows have the largest sums of squares: (D, _AXES) float64, orthonormal."""
    wide = values.astype(np.float64)
    _, vectors = np.linalg.eigh(wide.T @ wide)
    axes: npt.NDArray[np.float64] = vectors[:, -_AXES:]
    return axes


def _projected(values: Features, axes: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Return the coordinates of features on the axes, and the norm of the remainder: (N, _AXES + 1) float32.

    The dot product of two projections is an upper bound of that of the features, by the inequality of Cauchy and
    Schwarz for the remainders.
    """
    coordinates = values.astype(np.float64) @ axes
    remainder = _squares(values) - np.einsum("nd,nd->n", coordinates, coordinates)
    return np.column_stack([coordinates, np.sqrt(np.maximum(remainder, 0))]).astype(np.float32)


def _squares(values: Features) -> npt.NDArray[np.int64]:
    """Return the squared norm of each row: (N,) int64."""
    wide = values.astype(np.int64)
    squares: npt.NDArray[np.int64] = np.einsum("nd,nd->n", wide, wide)
    return squares


def _gathered(blocks: FeatureBlocks, *, rows: int) -> FeatureBlocks:
    """Yield the same rows in blocks of `rows` rows, the last one of fewer; products of small blocks are slow."""
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
