"""Assign images to train, validation and test: groups as a whole, by a hash that no other image changes."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.artifacts import Labels
from pipeline.core.errors import UserError
from pipeline.images.blocks import SPLITS
from pipeline.images.duplicates import Indices
from pipeline.images.spool import Hashes, Spool
from pipeline.params import NormalizeParams

_LARGEST = np.uint64(2**64 - 1)
_SMALL_GROUP = 5  # images of a class; a group of so few is too large for no split


def draw_splits(
    spool: Spool, groups: Indices, *, class_names: tuple[str, ...], params: NormalizeParams
) -> dict[str, Indices]:
    """Return the ascending image indices of train, validation and test.

    Splits that the source has stay as they are. Missing ones are drawn from train, whole groups at a time; `groups`,
    (N,) int64, is equal for images of one group. A hash in [0, 1) of the seed and the group decides: below
    `test_fraction` it is test, in the next `validation_fraction * (1 - test_fraction)` validation, and otherwise train.
    The hash is that of the group's name or, without one, of the smallest content hash of its images. It depends on
    neither the names of files, their order nor other groups: an image keeps its split when others are added, with four
    exceptions:

    - A group with an image in a split of the source, or with more than half of the images of a class, stays in train.
    - So does a group with more than twice the images of a class that are expected in its split, and more than five.
    - Where a class has no image in a split, the group with the hash nearest to the split's range is moved.
    - A new image that joins groups, or has the smallest hash in its group, may move them as a whole.

    Raises UserError where a class has too few images or groups for that, or no image in a split of the source.
    """
    labels, splits = spool.labels, {split: spool.images_of(split) for split in SPLITS}
    edges = _edges(splits, params=params)
    pool = splits["train"]
    if len(edges) > 1:
        _check_number_of_images(labels[pool], tuple(edges), class_names=class_names)
        units = _units(spool, groups, pool=pool, num_classes=len(class_names), seed=params.seed)
        draw = _Draw(units, edges, num_classes=len(class_names))
        if missing := draw.cover_classes():
            split, class_name = list(edges)[missing[0]], class_names[missing[1]]
            raise UserError(
                _describe_missing(
                    units, label=missing[1], class_name=class_name, split=split, needed=edges, params=params
                )
            )
        splits |= {split: pool[draw.split_indices[units.of_image] == index] for index, split in enumerate(edges)}
    _check_splits(splits, labels=labels, class_names=class_names)
    return splits


def touches_other_splits(groups: Indices, splits: Mapping[str, Indices]) -> npt.NDArray[np.bool_]:
    """Return for each image (N,) whether its group has an image in the test or validation split of the source."""
    touched = np.zeros(len(groups), np.bool_)
    touched[groups[np.concatenate([splits["validation"], splits["test"]])]] = True
    result: npt.NDArray[np.bool_] = touched[groups]
    return result


def _edges(splits: Mapping[str, Indices], *, params: NormalizeParams) -> dict[str, float]:
    """Return the upper bound of each split's hash range, missing splits first, train last."""
    edges, end = dict[str, float](), 0.0
    for split, fraction in (("test", params.test_fraction), ("validation", params.validation_fraction)):
        if not len(splits[split]):
            end += fraction * (1 - end)
            edges[split] = end
    return {**edges, "train": 1.0}


@dataclass(frozen=True)
class _Units:
    """The groups from which splits are drawn, G of them, and the classes of their images."""

    of_image: Indices  # the group of each image in the pool
    hashes: npt.NDArray[np.float64]  # (G,) in [0, 1)
    movable: npt.NDArray[np.bool_]  # (G,); False: stays in train
    # pairs of a group and one of its classes, (P,) each, by ascending group
    group_of_pair: Indices
    class_of_pair: Indices
    # (P,): the fraction of the images of the class that the group has, 0 in a small group
    fraction_of_pair: npt.NDArray[np.float64]

    def larger_than(self, fraction: float) -> npt.NDArray[np.bool_]:
        """Return for each group (G,) whether it has more than this fraction of the images of a class."""
        result = np.zeros(len(self.hashes), np.bool_)
        result[self.group_of_pair[self.fraction_of_pair > fraction]] = True
        return result

    def classes(self, group: int) -> Indices:
        """Return the classes of the images in a group."""
        return self.class_of_pair[slice(*np.searchsorted(self.group_of_pair, [group, group + 1]))]


def _units(spool: Spool, groups: Indices, *, pool: Indices, num_classes: int, seed: int) -> _Units:
    """Return the groups of the images in the pool."""
    labels, others = spool.labels[pool], {split: spool.images_of(split) for split in ("validation", "test")}
    _, of_image = np.unique(groups[pool], return_inverse=True)
    pairs, counts = np.unique(of_image * num_classes + labels, return_counts=True)
    group_of_pair, class_of_pair = np.divmod(pairs, num_classes)
    movable = np.ones(int(of_image.max()) + 1, np.bool_)
    movable[of_image[touches_other_splits(groups, others)[pool]]] = False
    fractions = counts / np.bincount(labels)[class_of_pair]
    movable[group_of_pair[fractions > 0.5]] = False
    fractions[counts <= _SMALL_GROUP] = 0
    keys = _keys(of_image, names=spool.group_hashes[pool], contents=spool.content_hashes[pool])
    return _Units(of_image, _positions(keys, seed=seed), movable, group_of_pair, class_of_pair, fractions)


def _keys(of_image: Indices, *, names: Hashes, contents: Hashes) -> Hashes:
    """Return for each group (G,) the smallest hash of a name or, where no image has one, of a content."""
    by_name, by_content = (np.full(int(of_image.max()) + 1, _LARGEST) for _ in range(2))
    named = names != 0
    np.minimum.at(by_name, of_image[named], names[named])
    np.minimum.at(by_content, of_image, contents)
    return np.where(by_name < _LARGEST, by_name, by_content)


def _positions(keys: Hashes, *, seed: int) -> npt.NDArray[np.float64]:
    """Return a number in [0, 1) for each key, as good as random, that depends on the key and the seed only."""
    secret = seed.to_bytes(4, "little")
    hashes = (hashlib.blake2b(key, digest_size=8, key=secret).digest() for key in keys.astype("<u8"))
    numbers = np.fromiter((int.from_bytes(value, "little") >> 11 for value in hashes), np.int64, len(keys))
    positions: npt.NDArray[np.float64] = numbers.astype(np.float64) * 2.0**-53
    return positions


class _Draw:
    """The split of each group while splits are drawn; a split's index is its position in `edges`."""

    def __init__(self, units: _Units, edges: Mapping[str, float], *, num_classes: int) -> None:
        self.units = units
        self.ends = np.array([*edges.values()])
        self.starts = np.r_[0, self.ends[:-1]]
        # (splits, G): whether a group has more than twice the images that are expected in the split; train takes any
        self.too_large = np.stack([units.larger_than(2 * width) for width in self.ends - self.starts])
        self.too_large[-1] = False
        # (G,): the index of the split of each group
        self.split_indices = np.searchsorted(self.ends, units.hashes, side="right")
        too_large = self.too_large[self.split_indices, np.arange(len(self.split_indices))]
        self.split_indices[too_large | ~units.movable] = len(edges) - 1
        # (splits, classes): the number of groups of each class in each split
        cells = self.split_indices[units.group_of_pair] * num_classes + units.class_of_pair
        self.counts = np.bincount(cells, minlength=len(edges) * num_classes).reshape(len(edges), num_classes)
        self._movable = units.movable.copy()

    def cover_classes(self) -> tuple[int, int] | None:
        """Move groups, each at most once, so that every split has every class.

        Returns None or, where no group may be moved any more, the indices of a split and of a class missing in it.
        """
        while not self.counts.all():
            split_index, label = np.argwhere(self.counts == 0)[0].tolist()
            group = self._nearest(split_index, label)
            if group is None:
                return split_index, label
            self._move(group, split_index)
        return None

    def _nearest(self, split_index: int, label: int) -> int | None:
        """Return the group of a class whose hash is nearest to the range of a split; None where no group may be moved.

        A group that is too large comes after those that are not; one that its split needs for a class comes last.
        """
        groups = self.units.group_of_pair[self.units.class_of_pair == label]
        groups = groups[self._movable[groups]]
        hashes = self.units.hashes[groups]
        distances = np.maximum(self.starts[split_index] - hashes, hashes - self.ends[split_index])
        ordered: list[int] = groups[np.lexsort((hashes, distances, self.too_large[split_index, groups]))].tolist()
        spare = (
            group for group in ordered if (self.counts[self.split_indices[group], self.units.classes(group)] > 1).all()
        )
        return next(spare, ordered[0] if ordered else None)

    def _move(self, group: int, split_index: int) -> None:
        classes = self.units.classes(group)
        self.counts[self.split_indices[group], classes] -= 1
        self.counts[split_index, classes] += 1
        self.split_indices[group], self._movable[group] = split_index, False


def _describe_missing(
    units: _Units, *, label: int, class_name: str, split: str, needed: Iterable[str], params: NormalizeParams
) -> str:
    """Return the message for a class that has too few groups, or too few that may leave train."""
    groups = units.group_of_pair[units.class_of_pair == label]
    fixed = int((~units.movable[groups]).sum())
    return (
        f"class {class_name!r}: its images in train are {len(groups)} groups (of one group name, or near-duplicates at "
        f"correlation {params.near_duplicate_correlation:g}), {fixed} of them have to stay in train, and none is left "
        f"for {split}; needed: one group for each of {', '.join(needed)}; raise normalize.near_duplicate_correlation, "
        "add images, or give all splits yourself, as folders or in the table"
    )


def _check_number_of_images(labels: Labels, needed: tuple[str, ...], *, class_names: tuple[str, ...]) -> None:
    """Raise UserError where a class has fewer images than splits that are needed."""
    for name, count in zip(class_names, np.bincount(labels, minlength=len(class_names)).tolist(), strict=True):
        if count < len(needed):
            raise UserError(
                f"class {name!r}: {count} readable images in train; needed: {len(needed)} "
                f"({', '.join(needed)}: one each); add images or remove the class"
            )


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
