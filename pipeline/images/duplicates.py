"""Find images that occur more than once: exact duplicates by a hash of the pixels, near-duplicates by correlation.

Results are computed in whole numbers, or in single operations that are correctly rounded. They are therefore the same
on every machine, whatever its number of threads and its vector instructions.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
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
_BLOCK_ROWS = 1024  # rows that are multiplied at a time: 4 MB of products
ROWS_IN_MEMORY = 2**12  # images that are compared with all others at a time: 14 MB of features and their projections


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
    group = group_identical(found)
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


def group_identical(found: Digests) -> Indices:
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


class Similar(NamedTuple):
    """Images that are compared with others, and their correlations; an image may be in several such objects."""

    rows: Indices  # (r,)
    columns: Indices  # (c,)
    # (r, c): the correlation of each row with each column, or with its mirror image, which is 0 below the threshold
    correlations: npt.NDArray[np.float64]


def most_similar(found: Iterable[Similar]) -> list[Match]:
    """Return the most similar column of each row, in the order of the rows, for those that are similar to any."""
    best: dict[int, Match] = {}
    for rows, columns, correlations in found:
        nearest = columns[correlations.argmax(axis=1)]
        for match in map(Match, rows.tolist(), nearest.tolist(), correlations.max(axis=1).tolist()):
            if match.correlation > (best[match.test].correlation if match.test in best else 0):
                best[match.test] = match
    return [best[row] for row in sorted(best)]


def similar_images(
    rows: FeatureBlocks, columns: Callable[[int], FeatureBlocks], *, correlation: float
) -> Iterator[Similar]:
    """Yield all pairs of a row and a column whose correlation, mirrored or not, is at least `correlation`.

    `columns` is called once for each ROWS_IN_MEMORY rows, with 0, 1 and so on, and returns the images that these rows
    are compared with.
    """
    with ThreadPoolExecutor(num_cores()) as pool, threadpool_limits(1, user_api="blas"):
        for number, (indices, values) in enumerate(_gathered(rows, rows=ROWS_IN_MEMORY)):
            yield from _compare(indices, values, columns(number), correlation=correlation, pool=pool)


def _compare(
    indices: Indices, values: Features, columns: FeatureBlocks, *, correlation: float, pool: ThreadPoolExecutor
) -> Iterator[Similar]:
    """Yield the pairs of these rows and all columns whose correlation is at least `correlation`."""
    axes = _principal_axes(values[:_BLOCK_ROWS])
    sides = [_rows(indices, side, axes) for side in (values, mirrored(values))]
    tiles = [side.part(start) for start in range(0, len(values), _BLOCK_ROWS) for side in sides]
    for column_indices, column_values in _gathered(columns, rows=_BLOCK_ROWS):
        block = _rows(column_indices, column_values, axes)
        yield from (
            found for found in pool.map(partial(_compare_tile, columns=block, correlation=correlation), tiles) if found
        )


class _Rows(NamedTuple):
    """Some images: their indices, features, squared norms, and projections from `_projected`."""

    indices: Indices
    values: Features
    squares: npt.NDArray[np.int64]
    projected: npt.NDArray[np.float32]

    def part(self, start: int) -> "_Rows":
        """Return the _BLOCK_ROWS rows from `start`."""
        chosen = slice(start, start + _BLOCK_ROWS)
        return _Rows(self.indices[chosen], self.values[chosen], self.squares[chosen], self.projected[chosen])


def _rows(indices: Indices, values: Features, axes: npt.NDArray[np.float64]) -> _Rows:
    return _Rows(indices, values, _squares(values), _projected(values, axes))


def _compare_tile(tile: _Rows, *, columns: _Rows, correlation: float) -> Similar | None:
    """Return the pairs of rows and columns whose correlation is at least `correlation`; None without any.

    Only for rows and columns whose bound allows such a correlation are the whole features multiplied. They are whole
    numbers, and every partial sum is at most the product of the norms (Cauchy-Schwarz), which is below 2**24: float32
    is exact.
    """
    # the smallest product to look at: norms differ from _NORM by up to 0.25 %, and bounds are rounded
    least = (0.99 * correlation - 0.001) * _NORM**2
    bounds = tile.projected @ columns.projected.T
    row = np.flatnonzero(bounds.max(axis=1) >= least)
    if not len(row):
        return None
    column = np.flatnonzero((bounds[row] >= least).any(axis=0))
    products = tile.values[row].astype(np.float32) @ columns.values[column].astype(np.float32).T
    scale = np.sqrt(np.multiply.outer(tile.squares[row], columns.squares[column]).clip(1).astype(np.float64))
    correlations = products / scale
    correlations[correlations < correlation] = 0
    return Similar(tile.indices[row], columns.indices[column], correlations) if correlations.any() else None


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
