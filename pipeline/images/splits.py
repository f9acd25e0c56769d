"""Assign images to train, validation and test."""

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from pipeline.artifacts import Labels
from pipeline.core.errors import UserError
from pipeline.images.blocks import SPLITS
from pipeline.images.duplicates import (
    Digests,
    Indices,
)
from pipeline.images.spool import Spool
from pipeline.params import NormalizeParams


def draw_splits(spool: Spool, *, class_names: tuple[str, ...], params: NormalizeParams) -> dict[str, Indices]:
    """Return the ascending image indices of train, validation and test.

    Splits that the source has stay as they are. Missing ones are drawn from train, the same fraction of each class:
    first test, then validation from the rest, at least one image of each class. Images are drawn in the order of a hash
    of their pixels and the seed. The result therefore depends on neither names nor order, a new image changes the split
    of few others, and identical images of a class stay together, except for those at the border between two splits.

    Raises UserError where a class has too few images for that, or none in a split.
    """
    labels, splits = spool.labels, {split: spool.images_of(split) for split in SPLITS}
    missing = {
        split: fraction
        for split, fraction in (("test", params.test_fraction), ("validation", params.validation_fraction))
        if not len(splits[split])
    }
    ranks = _ranks(spool.digests, seed=params.seed)
    drawn: dict[str, list[Indices]] = {split: [] for split in ("train", *missing)}
    for label, name in enumerate(class_names):
        members = splits["train"][labels[splits["train"]] == label]
        if len(members) <= len(missing):
            raise UserError(
                f"class {name!r}: {len(members)} readable images in train; needed: {len(missing) + 1} "
                f"({', '.join(('train', *missing))}: one each); add images or remove the class"
            )
        for split, chosen in _divide(members[np.argsort(ranks[members], kind="stable")], missing).items():
            drawn[split].append(chosen)
    joined = {split: np.sort(np.concatenate(pieces)) for split, pieces in drawn.items()}
    result = {**splits, **joined}
    _check_splits(result, labels=labels, class_names=class_names)
    return result


def _divide(members: Indices, fractions: Mapping[str, float]) -> dict[str, Indices]:
    """Divide the images of a class into splits, none of them empty.

    Each split gets its fraction of the images that the splits before it left; train gets the rest.
    """
    divided = {}
    for number, (split, fraction) in enumerate(fractions.items(), start=1):
        most = len(members) - 1 - (len(fractions) - number)
        count = min(max(1, math.floor(len(members) * fraction + 0.5)), most)
        divided[split], members = members[:count], members[count:]
    return {"train": members, **divided}


def _ranks(found: Digests, *, seed: int) -> npt.NDArray[np.uint64]:
    """Return a hash (N,) uint64 of the seed and the pixels of each image, which decides the order of the draw."""
    key = seed.to_bytes(4, "little")
    hashes = (hashlib.blake2b(digest.tobytes(), digest_size=8, key=key).digest() for digest in found.astype("<u8"))
    return np.frombuffer(b"".join(hashes), "<u8").astype(np.uint64)


def _check_splits(splits: Mapping[str, Indices], *, labels: Labels, class_names: tuple[str, ...]) -> None:
    """Raise UserError where there are fewer than two classes, or a class has no image in a split."""
    if len(class_names) < 2:
        raise UserError(
            f"classes: found only {', '.join(class_names) or 'none'}; needed: at least 2; add a folder for another"
        )
    for split, indices in splits.items():
        counts = np.bincount(labels[indices], minlength=len(class_names))
        if not counts.all():
            name = class_names[int(counts.argmin())]
            raise UserError(f"class {name!r}: 0 readable images in {split}; needed: 1; add images or remove the class")
