"""Search the decoded images of a data set for duplicates, and describe them for `dataset.json`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.core.progress import progress
from pipeline.images.duplicates import (
    TEST_ROWS,
    ExactDuplicates,
    FeatureBlocks,
    Indices,
    Match,
    exact_duplicates,
    near_duplicates,
)
from pipeline.images.spool import Spool
from pipeline.params import NormalizeParams

MAX_EXAMPLES = 20  # pairs of duplicates that dataset.json names


@dataclass(frozen=True)
class Duplicates:
    """The images that occur more than once, exactly or nearly; indices are those in the spool."""

    exact: ExactDuplicates
    near: list[Match]


def find_duplicates(spool: Spool, splits: Mapping[str, Indices], *, params: NormalizeParams) -> Duplicates:
    """Find identical images in all splits, and test images that are nearly equal to one in train or validation."""
    others = np.sort(np.concatenate([splits["train"], splits["validation"]]))
    passes = math.ceil(len(splits["test"]) / TEST_ROWS)
    with progress("near-duplicates", total=passes * len(others), unit="images") as advance:

        def blocks() -> FeatureBlocks:
            for indices, values in spool.feature_blocks(others):
                yield indices, values
                advance(len(indices))

        test = spool.feature_blocks(splits["test"])
        near = near_duplicates(test, blocks, correlation=params.near_duplicate_correlation)
    return Duplicates(exact_duplicates(spool.digests, splits, examples=MAX_EXAMPLES), near)


def describe_duplicates(
    found: Duplicates, spool: Spool, splits: Mapping[str, Indices], *, params: NormalizeParams
) -> dict[str, Any]:
    """Return the fields of `dataset.json` about duplicates: numbers, examples, and the test images that have one."""
    exact, near = found.exact, found.near
    most_similar = sorted(near, key=lambda match: (-match.correlation, match.test))[:MAX_EXAMPLES]
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
                [spool.name(match.test), spool.name(match.other), round(match.correlation, 4)] for match in most_similar
            ],
        },
        "test_duplicates": np.searchsorted(splits["test"], test).tolist(),
    }
