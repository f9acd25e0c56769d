"""Splits are drawn by groups: no group is in two splits, every class is in each, and an image keeps its split."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import UserError
from pipeline.images import duplicates
from pipeline.images.blocks import SPLITS, Block, hash_content
from pipeline.images.data_report import report
from pipeline.images.decode import decode
from pipeline.images.disjoint_sets import DisjointSets, set_sizes
from pipeline.images.duplicate_search import describe_duplicates, find_duplicates
from pipeline.images.duplicates import Similar
from pipeline.images.splits import draw_splits
from pipeline.images.spool import Spool
from pipeline.normalize import normalize
from tests.raw_folders import encoded, image_folder, noise, params, plain_files
from tests.test_duplicates import as_jpeg

CLASS_NAMES = ("cat", "dog", "eel")
VARIANTS: dict[str, Callable[[Any], Any]] = {
    "same": lambda image: image,
    "mirrored": lambda image: image[:, ::-1],
    "brighter": lambda image: (image // 2 + 90).astype(np.uint8),
    "recompressed": as_jpeg,
    "recompressed and mirrored": lambda image: as_jpeg(image[:, ::-1]),
}


class Item(NamedTuple):
    """An image of a test: the picture that it shows, and how, its class, group and split."""

    picture: int
    label: int = 0
    group: str = ""
    variant: str = "same"
    split: str = "train"


def pixels(item: Item) -> Any:
    return VARIANTS[item.variant](noise(item.picture))


def singles(label: int, count: int, *, split: str = "train") -> list[Item]:
    """Return images of a class without a group, each of a picture of its own."""
    start = 10_000 * (1 + label + 10 * SPLITS.index(split))
    return [Item(start + number, label, split=split) for number in range(count)]


def all_classes(count: int, **more: Any) -> list[Item]:
    return [item for label in range(len(CLASS_NAMES)) for item in singles(label, count, **more)]


class Drawn(NamedTuple):
    """The splits of images by their number, and the fields of dataset.json about them."""

    splits: list[str]
    description: dict[str, Any]


def draw(items: Sequence[Item], **changes: Any) -> Drawn:
    """Draw the splits of images, which are read in the order of their splits as from any source."""
    values = params(**{"near_duplicate_correlation": 0.9, **changes})
    order = sorted(range(len(items)), key=lambda number: items[number].split)
    with tempfile.TemporaryDirectory() as folder, Spool(Path(folder)) as spool:
        for number in order:
            item = items[number]
            image = pixels(item)
            hashes = [hash_content(image.tobytes())]
            spool.add(Block(item.split, image[None], np.array([item.label]), [str(number)], [], hashes, [item.group]))
        found = find_duplicates(spool, params=values)
        splits = draw_splits(spool, found.groups, class_names=CLASS_NAMES, params=values)
        description = describe_duplicates(found, spool, splits, params=values)
    result = {order[index]: split for split, indices in splits.items() for index in indices.tolist()}
    return Drawn([result[number] for number in range(len(items))], description)


def components(items: Sequence[Item]) -> list[set[int]]:
    """Return the planted groups: images of one picture or one name, directly or through others."""
    groups: list[tuple[set[int], set[Any]]] = []
    for number, item in enumerate(items):
        keys = {item.picture} | ({item.group} if item.group else set())
        joined = [group for group in groups if group[1] & keys]
        groups = [group for group in groups if not group[1] & keys]
        groups.append((set().union({number}, *(g[0] for g in joined)), keys.union(*(g[1] for g in joined))))
    return [numbers for numbers, _ in groups]


def crossing(items: Sequence[Item], splits: Sequence[str]) -> list[set[int]]:
    return [group for group in components(items) if len({splits[number] for number in group}) > 1]


planted = st.builds(
    Item,
    picture=st.integers(0, 9),
    label=st.integers(0, 2),
    group=st.sampled_from(["", "", "p1", "p2", "p3", "p4"]),
    variant=st.sampled_from(sorted(VARIANTS)),
    split=st.just("train"),
)


@settings(max_examples=60, deadline=None)
@given(items=st.lists(planted, max_size=25), seed=st.integers(0, 2**32 - 1), fraction=st.sampled_from([0.1, 0.3, 0.6]))
def test_no_planted_group_is_in_two_splits(items: list[Item], seed: int, fraction: float) -> None:
    """The groups span classes, and are joined by names, copies, mirror images, brightness and compression."""
    items = [*items, *all_classes(6)]
    splits, description = draw(items, seed=seed, test_fraction=fraction, validation_fraction=fraction)
    assert crossing(items, splits) == []
    assert {(item.label, split) for item, split in zip(items, splits, strict=True)} == {
        (label, split) for label in range(3) for split in SPLITS
    }
    assert not any(description["exact_duplicates"]["across"].values())
    assert description["groups"]["across_splits"] == 0


def test_planted_groups_go_to_each_split() -> None:
    """Without this, a draw that leaves all groups in train would pass the test above."""
    items = [Item(picture, picture % 3, f"p{picture // 6}") for picture in range(240)]
    splits = draw(items, test_fraction=0.3, validation_fraction=0.3).splits
    assert crossing(items, splits) == []
    assert min(splits.count(split) for split in SPLITS) >= 30


@settings(max_examples=15, deadline=None)
@given(items=st.lists(planted, max_size=12), order=st.randoms(use_true_random=False))
def test_the_order_of_images_does_not_matter(items: list[Item], order: Any) -> None:
    items = [*items, *all_classes(4)]
    shuffled = list(range(len(items)))
    order.shuffle(shuffled)
    splits = draw(items).splits
    assert draw([items[number] for number in shuffled]).splits == [splits[number] for number in shuffled]


@pytest.mark.slow
def test_an_image_keeps_its_split_when_others_are_added() -> None:
    first, others = all_classes(40), [item for item in all_classes(60) if item not in all_classes(40)]
    named = [Item(number, number % 3, f"p{number // 8}") for number in range(64)]
    before = draw([*first, *named])
    assert {(i.label, s) for i, s in zip(first, before.splits, strict=False)} == {
        (c, s) for c in range(3) for s in SPLITS
    }
    for count in range(0, len(others) + 1, 4):
        assert draw([*first, *named, *others[:count]]).splits[: len(before.splits)] == before.splits
    wider = [*first, *named, *(Item(5000 + number, 0, f"p{number}") for number in range(8))]
    assert draw(wider).splits[: len(before.splits)] == before.splits  # each group gets one more image


@pytest.mark.slow
def test_only_where_a_split_would_lack_a_class_an_image_changes_its_split() -> None:
    by_rule = dict(zip(all_classes(200), draw(all_classes(200)).splits, strict=True))
    num_moved = 0
    for count in range(3, 31):
        splits = dict(zip(all_classes(count), draw(all_classes(count)).splits, strict=True))
        for label in range(3):
            items = [item for item in splits if item.label == label]
            assert {splits[item] for item in items} == set(SPLITS)
            moved = [item for item in items if splits[item] != by_rule[item]]
            assert len(moved) == len(set(SPLITS) - {by_rule[item] for item in items})
            num_moved += len(moved)
    assert num_moved


@pytest.mark.slow
def test_a_new_near_duplicate_moves_its_group_only_as_a_whole() -> None:
    items = all_classes(30)
    before, moved = draw(items).splits, 0
    for number in range(30):
        after = draw([*items, items[number]._replace(variant="mirrored")]).splits
        assert after[number] == after[-1]
        assert after[:number] + after[number + 1 : -1] == before[:number] + before[number + 1 :]
        moved += after[number] != before[number]
    assert 0 < moved < 15  # only where the newcomer has the smaller hash, and that gives another split


def test_the_counts_are_near_the_fractions() -> None:
    items = all_classes(500)
    splits = draw(items, test_fraction=0.2, validation_fraction=0.1).splits
    for split, fraction in (("test", 0.2), ("validation", 0.08), ("train", 0.72)):
        assert abs(splits.count(split) - 1500 * fraction) < 4 * np.sqrt(1500 * fraction * (1 - fraction))


def test_the_seed_decides_the_split() -> None:
    items = all_classes(40)
    assert len({tuple(draw(items, seed=seed).splits) for seed in range(5)}) == 5


def test_a_group_with_more_than_half_of_a_class_stays_in_train() -> None:
    chain = [Item(number, 0, "one patient") for number in range(12)]
    for seed in range(20):
        splits = draw([*chain, *all_classes(8)], seed=seed, test_fraction=0.5, validation_fraction=0.5).splits
        assert set(splits[:12]) == {"train"}


def test_a_group_of_more_than_twice_the_expected_images_is_not_drawn() -> None:
    """Of 100 images, 10 are expected in test: a group of 30 is never in it, one of 15 is in it with some seeds."""
    large, small = [Item(n, 0, "large") for n in range(30)], [Item(100 + n, 0, "small") for n in range(15)]
    items = [*large, *small, *singles(0, 55), *singles(1, 20), *singles(2, 20)]
    found = [draw(items, seed=seed, test_fraction=0.1, validation_fraction=0.1).splits for seed in range(20)]
    assert {splits[0] for splits in found} == {"train"}
    assert "test" in {splits[30] for splits in found}


@pytest.mark.parametrize("patients", [3, 4, 5, 8])
def test_few_large_groups_are_divided_among_all_splits(patients: int) -> None:
    items = [Item(number, number % 3, f"p{number % patients}") for number in range(30 * patients)]
    items = [item._replace(group=f"p{(item.picture // 3) % patients}") for item in items]
    for seed in range(10):
        splits = draw(items, seed=seed).splits
        assert crossing(items, splits) == []
        assert {(item.label, split) for item, split in zip(items, splits, strict=True)} == {
            (label, split) for label in range(3) for split in SPLITS
        }


def test_a_class_with_too_few_groups_is_reported() -> None:
    two = [Item(number, 0, f"p{number % 2}") for number in range(20)]
    with pytest.raises(UserError) as caught:
        draw([*two, *singles(1, 5), *singles(2, 5)])
    message = str(caught.value)
    assert message.startswith("class 'cat': its images in train are 2 groups (of one group name, or near-duplicates at")
    assert "needed: one group for each of test, validation, train" in message
    assert "raise normalize.near_duplicate_correlation, add images, or give all splits yourself" in message
    assert "p0" not in message


def test_a_drawn_split_shares_no_group_with_a_split_of_the_source() -> None:
    """Images of train that a test image is like or has the group of cannot leave train; they are counted."""
    test = [*all_classes(5, split="test"), Item(1, 0, "p1", split="test"), Item(2, 1, split="test")]
    leaks = [Item(3, 0, "p1"), Item(2, 2, variant="mirrored"), Item(4, 2, "p2"), Item(4, 2, "p1", "brighter")]
    for seed in range(10):
        items = [*test, *leaks, *all_classes(12)]
        splits, description = draw(items, seed=seed, validation_fraction=0.5)
        assert splits[: len(test)] == ["test"] * len(test)
        assert splits[len(test) : len(test) + 4] == ["train"] * 4
        groups = description["groups"]
        assert (groups["drawn_splits"], groups["kept_in_train"]) == (["validation"], 4)
        assert (groups["named"], groups["across_splits"], groups["images_across_splits"]) == (2, 1, 3)
        assert description["near_duplicates"]["test_images_with_one_in_train"] == 1


def test_a_drawn_test_split_shares_no_group_with_the_validation_split_of_the_source() -> None:
    items = [*all_classes(5, split="validation"), Item(1, 0, "p1", split="validation"), Item(2, 0, "p1")]
    items += [Item(20000, 1, variant="mirrored"), *all_classes(12)]
    items.append(items[5]._replace(split="train", variant="recompressed"))
    splits, description = draw(items, test_fraction=0.5)
    assert (splits[16], splits[-1]) == ("train", "train")
    assert description["test_duplicates"] == []
    assert description["groups"]["drawn_splits"] == ["test"]


def test_splits_of_the_source_stay_and_the_groups_in_several_are_counted() -> None:
    items = [item for split in SPLITS for item in all_classes(3, split=split)]
    items += [Item(1, 0, "p1"), Item(2, 0, "p1", split="test"), Item(3, 0, "p2"), Item(4, 0, "p2"), Item(5, 1, "p1")]
    splits, description = draw(items)
    assert splits == [item.split for item in items]
    groups = description["groups"]
    assert groups["drawn_splits"] == []
    assert (groups["named"], groups["named_images"]) == (2, 5)
    assert (groups["across_splits"], groups["images_across_splits"]) == (1, 3)


def test_the_report_has_the_numbers_of_groups_and_no_name() -> None:
    items = [*all_classes(10), Item(1, 0, "Jane Doe"), Item(2, 1, "Jane Doe"), Item(2, 1, variant="mirrored")]
    found = draw(items).description
    counts = {split: dict.fromkeys(CLASS_NAMES, 1) for split in SPLITS}
    nothing: dict[str, Any] = {"unreadable_files": [], "ignored_files": []}
    text = report({"class_names": list(CLASS_NAMES), "counts": counts, **nothing, **found})
    assert "named groups: 1 (2 images); in more than one split: 0 (0 images)" in text
    assert (
        "images kept together: 3 of 33, in 1 groups, the largest of 3; because of duplicates or near-duplicates: 2"
        in text
    )
    assert "Jane" not in text + str(found)


def test_many_near_duplicates_are_remarked() -> None:
    items = [*all_classes(8), *(item._replace(variant="mirrored") for item in all_classes(8))]
    counts = {split: dict.fromkeys(CLASS_NAMES, 1) for split in SPLITS}
    nothing: dict[str, Any] = {"unreadable_files": [], "ignored_files": []}
    text = report({"class_names": list(CLASS_NAMES), "counts": counts, **nothing, **draw(items).description})
    assert "raise normalize.near_duplicate_correlation" in text


@pytest.mark.parametrize("image_size", [16, 24])
def test_the_split_of_a_file_does_not_depend_on_the_size_of_the_arrays(tmp_path: Path, image_size: int) -> None:
    files = plain_files(per_class=40)
    names = []
    for size in (32, image_size):
        raw, out = tmp_path / f"raw{size}", tmp_path / f"out{size}"
        normalize(image_folder(raw, files), out, params=params(image_size=size))
        name_of = {
            decode(content, image_size=size, channels=3, resize="crop").tobytes(): name
            for name, content in files.items()
        }
        names.append([{name_of[image.tobytes()] for image in np.load(out / f"{split}_images.npy")} for split in SPLITS])
    assert names[0] == names[1]


@settings(max_examples=100, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 14), st.integers(0, 14)), max_size=20))
def test_sets_are_joined_through_others(pairs: list[tuple[int, int]]) -> None:
    sets, expected = DisjointSets(15), [{number} for number in range(15)]
    for first, second in pairs:
        sets.join_similar(Similar(np.array([first]), np.array([second]), np.array([[0.95]])))
        union = expected[first] | expected[second]
        for number in union:
            expected[number] = union
    assert sets.labels().tolist() == [min(group) for group in expected]
    assert set_sizes(sets.labels()).tolist() == [len(group) for group in expected]


def test_blocks_of_few_rows_give_the_same_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [*all_classes(8), *(item._replace(variant="mirrored") for item in all_classes(8)[::3])]
    expected = draw(items)
    for name, value in (("_AXES", 4), ("_BLOCK_ROWS", 4)):
        monkeypatch.setattr(duplicates, name, value)
    monkeypatch.setattr(duplicates, "ROWS_IN_MEMORY", 8)
    monkeypatch.setattr("pipeline.images.duplicate_search.ROWS_IN_MEMORY", 8)
    assert draw(items) == expected


def test_identical_pixels_in_different_files_stay_together(tmp_path: Path) -> None:
    files = plain_files(per_class=30)
    for number in range(30):
        files[f"train/dog/copy{number}.bmp"] = encoded(noise(number), "BMP")
    description = normalize(image_folder(tmp_path / "raw", files), tmp_path / "out", params=params())
    assert not any(description["exact_duplicates"]["across"].values())
    assert description["groups"]["joined_duplicates"] == 60
