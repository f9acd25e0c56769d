"""Search the decoded images of a data set for duplicates, and describe these and the groups for `dataset.json`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.core.progress import progress
from pipeline.images.blocks import SPLITS
from pipeline.images.disjoint_sets import DisjointSets, set_sizes
from pipeline.images.duplicates import (
    ROWS_IN_MEMORY,
    FeatureBlocks,
    Indices,
    Match,
    Similar,
    exact_duplicates,
    group_identical,
    most_similar,
    similar_images,
)
from pipeline.images.splits import touches_other_splits
from pipeline.images.spool import Spool
from pipeline.params import NormalizeParams

MAX_EXAMPLES = 20  # pairs of duplicates that dataset.json names


@dataclass(frozen=True)
class Duplicates:
    """The images that occur more than once, exactly or nearly, and the groups; indices are those in the spool."""

    # test images that are nearly equal to one of another split; none where the source has no test split
    near: list[Match]
    # by image (N,): equal for images that are identical or nearly equal, directly or through others
    sets: Indices
    # by image (N,): equal also for images with the same group name
    groups: Indices


def find_duplicates(spool: Spool, *, params: NormalizeParams) -> Duplicates:
    """Find images that are nearly equal, and join them, identical ones and those with the same group name.

    Where the source has all splits, only the test images are compared with those of the others. Otherwise all images of
    train are compared with each other and with those of the split that the source has.
    """
    splits = {split: spool.images_of(split) for split in SPLITS}
    sets = DisjointSets(len(spool.labels))
    sets.join_equal(group_identical(spool.digests), np.arange(len(spool.labels)))
    source_split = splits["test"] if len(splits["test"]) else splits["validation"]
    others = np.setdiff1d(np.arange(len(spool.labels)), source_split)
    near = most_similar(_join_each(sets, _compare(spool, source_split, others, params=params)))
    if not all(map(len, splits.values())):
        for _ in _join_each(sets, _compare(spool, splits["train"], None, params=params)):
            pass
    images = sets.labels()
    named = np.flatnonzero(spool.group_hashes)
    sets.join_equal(spool.group_hashes[named], named)
    return Duplicates(near if len(splits["test"]) else [], images, sets.labels())


def _join_each(sets: DisjointSets, found: Iterator[Similar]) -> Iterator[Similar]:
    """Join what is similar, and yield it."""
    for similar in found:
        sets.join_similar(similar)
        yield similar


def _compare(spool: Spool, images: Indices, others: Indices | None, *, params: NormalizeParams) -> Iterator[Similar]:
    """Yield images and others that are similar to them; `others` is None for the images themselves."""
    starts = images[::ROWS_IN_MEMORY]  # a pair of two of the images is found once: with the first one in a row
    columns = [images[np.searchsorted(images, start) :] if others is None else others for start in starts]
    if not columns:
        return
    with progress("near-duplicates", total=sum(map(len, columns)), unit="images") as advance:

        def blocks(number: int) -> FeatureBlocks:
            for indices, values in spool.feature_blocks(columns[number]):
                yield indices, values
                advance(len(indices))

        yield from similar_images(spool.feature_blocks(images), blocks, correlation=params.near_duplicate_correlation)


def describe_duplicates(
    found: Duplicates, spool: Spool, splits: Mapping[str, Indices], *, params: NormalizeParams
) -> dict[str, Any]:
    """Return the fields of `dataset.json` about duplicates: numbers, examples, and the test images that have one."""
    exact, near = exact_duplicates(spool.digests, splits, examples=MAX_EXAMPLES), found.near
    examples = sorted(near, key=lambda match: (-match.correlation, match.test))[:MAX_EXAMPLES]
    test = np.union1d(exact.test, np.array([match.test for match in near], np.int64))
    return {
        "exact_duplicates": {
            "within": exact.within,
            "across": exact.across,
            "examples": [[spool.name(first), spool.name(later)] for first, later in exact.pairs],
        },
        "near_duplicates": {
            "correlation": params.near_duplicate_correlation,
            "test_images_with_one_in_train": len(near),
            "examples": [
                [spool.name(match.test), spool.name(match.other), round(match.correlation, 4)] for match in examples
            ],
        },
        "test_duplicates": np.searchsorted(splits["test"], test).tolist(),
        "groups": {**_describe_names(spool, splits), **_describe_groups(found, spool)},
    }


def _describe_names(spool: Spool, splits: Mapping[str, Indices]) -> dict[str, int]:
    """Return numbers of named groups, and of those in several splits; never a name, which may be that of a patient."""
    names = spool.group_hashes
    _, numbers = np.unique(names, return_inverse=True)
    in_splits = np.zeros(int(numbers.max()) + 1, np.int64)
    for indices in splits.values():
        in_splits[np.unique(numbers[indices])] += 1
    across = (in_splits[numbers] > 1) & (names != 0)
    return {
        "named": len(np.unique(names[names != 0])),
        "named_images": int((names != 0).sum()),
        "across_splits": len(np.unique(names[across])),
        "images_across_splits": int(across.sum()),
    }


def _describe_groups(found: Duplicates, spool: Spool) -> dict[str, Any]:
    """Return the drawn splits and, where there are any, numbers of the images and groups that they were drawn from."""
    splits = {split: spool.images_of(split) for split in SPLITS}
    drawn = [split for split, indices in splits.items() if not len(indices)]
    pool = splits["train"] if drawn else splits["test"][:0]
    sizes = set_sizes(found.groups[pool])
    return {
        "drawn_splits": drawn,
        "images": len(pool),
        "joined_groups": len(np.unique(found.groups[pool][sizes > 1])),
        "joined_images": int((sizes > 1).sum()),
        "joined_duplicates": int((set_sizes(found.sets[pool]) > 1).sum()),
        "largest": int(sizes.max(initial=0)),
        "kept_in_train": int(touches_other_splits(found.groups, splits)[pool].sum()),
    }
