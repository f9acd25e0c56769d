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

    Splits that the source has stay as they are. What is missing is drawn from train, the same fraction of each class:
    first test, then validation from the rest, at least one image each. The draw ranks images by a hash of their
    pixels and the seed: it depends on neither names nor order, an image added moves few others, and identical
    images of a class stay together (but for one group that the border may divide).

    Raises UserError where a class has too few images for that, or none in a split.
    """
    labels, splits = spool.labels, {split: spool.given(split) for split in SPLITS}
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
    return _checked({**splits, **joined}, labels=labels, class_names=class_names)


def _divide(members: Indices, fractions: Mapping[str, float]) -> dict[str, Indices]:
    """Divide a class by the fractions, each of what the earlier ones left; the rest is train, and none is empty."""
    divided = {}
    for number, (split, fraction) in enumerate(fractions.items(), start=1):
        most = len(members) - 1 - (len(fractions) - number)
        count = min(max(1, math.floor(len(members) * fraction + 0.5)), most)
        divided[split], members = members[:count], members[count:]
    return {"train": members, **divided}


def _ranks(found: Digests, *, seed: int) -> npt.NDArray[np.uint64]:
    key = seed.to_bytes(4, "little")
    hashes = (hashlib.blake2b(digest.tobytes(), digest_size=8, key=key).digest() for digest in found.astype("<u8"))
    return np.frombuffer(b"".join(hashes), "<u8").astype(np.uint64)


def _checked(splits: dict[str, Indices], *, labels: Labels, class_names: tuple[str, ...]) -> dict[str, Indices]:
    if len(class_names) < 2:
        raise UserError(
            f"classes: found only {', '.join(class_names) or 'none'}; needed: at least 2; add a folder for another"
        )
    for split, indices in splits.items():
        counts = np.bincount(labels[indices], minlength=len(class_names))
        if not counts.all():
            name = class_names[int(counts.argmin())]
            raise UserError(f"class {name!r}: 0 readable images in {split}; needed: 1; add images or remove the class")
    return splits
