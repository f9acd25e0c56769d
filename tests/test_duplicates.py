"""Exact and near duplicates that are planted in the data are found, and no others."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.images import duplicates
from pipeline.images.duplicates import (
    Match,
    _gathered,
    digests,
    exact_duplicates,
    features,
    mirrored,
    most_similar,
    similar_images,
)
from tests.raw_folders import encoded, noise


def photos(count: int, *, seed: int = 0) -> Any:
    return np.stack([noise(seed + number) for number in range(count)])


def as_jpeg(pixels: Any) -> Any:
    return np.asarray(Image.open(io.BytesIO(encoded(pixels, "JPEG", quality=60))))


def near(test: Any, others: Any, *, correlation: float = 0.9, block: int = 5000) -> list[Match]:
    def blocks(images: Any) -> Any:
        numbers = np.arange(len(images))
        for start in range(0, len(images), block):
            yield numbers[start : start + block], features(images[start : start + block])

    return most_similar(similar_images(blocks(test), lambda _: blocks(others), correlation=correlation))


def test_identical_images_are_counted_within_and_between_splits() -> None:
    a, b, c, d = photos(4)
    images = np.stack([a, a, a, b, c, a, b, d, d, c])
    splits = {"train": np.arange(5), "validation": np.arange(5, 7), "test": np.arange(7, 10)}
    found = exact_duplicates(digests(images), splits, examples=20)
    assert found.within == {"train": 2, "validation": 0, "test": 1}
    assert found.across == {"train-validation": 2, "train-test": 1, "validation-test": 0}
    assert found.test.tolist() == [9]
    assert found.pairs == [(0, 5), (3, 6), (4, 9), (0, 1), (0, 2), (7, 8)]


def test_examples_are_limited() -> None:
    images = np.zeros((9, 8, 8, 1), np.uint8)
    splits = {"train": np.arange(5), "validation": np.arange(5, 7), "test": np.arange(7, 9)}
    assert len(exact_duplicates(digests(images), splits, examples=3).pairs) == 3


def test_images_that_differ_in_one_pixel_have_different_digests() -> None:
    images = np.stack([noise(1), noise(1)])
    images[1, 31, 31, 2] ^= 1
    first, second = digests(images)
    assert (first != second).any()


def test_a_recompressed_and_a_mirrored_copy_are_found() -> None:
    others = photos(50)
    test = np.stack([noise(900), as_jpeg(others[7]), as_jpeg(others[31][:, ::-1]), noise(901)])
    assert [(match.test, match.other) for match in near(test, others)] == [(1, 7), (2, 31)]


def test_a_brighter_copy_with_less_contrast_is_found() -> None:
    others = photos(20)
    (match,) = near((others[3:4] // 2 + 90).astype(np.uint8), others)
    assert match.other == 3
    assert match.correlation > 0.99


def test_an_identical_image_correlates_fully() -> None:
    (match,) = near(photos(3)[1:2], photos(3), correlation=1.0)
    assert match == Match(0, 1, 1.0)


def test_images_of_one_color_are_left_out() -> None:
    flat = np.full((2, 32, 32, 3), 80, np.uint8)
    assert near(flat, flat, correlation=0.01) == []


def test_features_of_the_mirror_image_follow_from_those_of_the_image() -> None:
    images = photos(5)
    assert (mirrored(features(images)) == features(images[:, :, ::-1])).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 20, 96])
def test_features_correlate_as_the_differences_between_cells_do(size: int, channels: int) -> None:
    """Sizes that are multiples of 8 are compared with a computation in floating point."""
    images = np.random.default_rng(0).integers(0, 256, (6, size, size, channels), dtype=np.uint8)
    values = features(images).astype(float)
    assert values.shape == (6, 112 * channels)
    assert np.allclose(np.linalg.norm(values, axis=1), 4000, atol=10)
    if size % 8 == 0:
        cells = images.reshape(6, 8, size // 8, 8, size // 8, channels).mean(axis=(2, 4))
        plain = np.concatenate([np.diff(cells, axis=axis).reshape(6, -1) for axis in (1, 2)], axis=1)
        assert np.allclose(np.corrcoef(values), np.corrcoef(plain), atol=0.002)


def correlations(test: Any, others: Any) -> Any:
    """Return the correlation of each image with each other one or its mirror image, from all products."""
    values, sides = features(others).astype(int), [features(test), mirrored(features(test))]
    products = np.maximum(*(side.astype(int) @ values.T for side in sides))
    norms = [(each.astype(int) ** 2).sum(axis=1) for each in (sides[0], values)]
    return products / np.sqrt(np.multiply.outer(*norms).astype(float))


@pytest.mark.parametrize("correlation", [0.3, 0.7, 0.95])
def test_the_bound_excludes_no_pair(monkeypatch: pytest.MonkeyPatch, correlation: float) -> None:
    """The images have all degrees of similarity; few axes and many blocks make the bound weak."""
    for name, value in (("_AXES", 4), ("_BLOCK_ROWS", 8), ("ROWS_IN_MEMORY", 16)):
        monkeypatch.setattr(duplicates, name, value)
    draw = np.random.default_rng(0)
    base = draw.integers(0, 256, (60, 32, 32, 3)).astype(float)
    base[30:] = photos(5).repeat(6, axis=0)
    mixed = base + draw.uniform(0, 3, (60, 1, 1, 1)) * draw.permuted(base, axis=0)
    images = (mixed * (255 / mixed.max(axis=(1, 2, 3), keepdims=True))).astype(np.uint8)
    expected = correlations(images[::2], images[1::2])
    found = np.zeros_like(expected)
    rows = [(np.arange(start, start + 7)[: 30 - start], images[::2][start : start + 7]) for start in range(0, 30, 7)]
    columns = [(np.arange(start, start + 5), images[1::2][start : start + 5]) for start in range(0, 30, 5)]
    for similar in similar_images(
        ((indices, features(values)) for indices, values in rows),
        lambda _: ((indices, features(values)) for indices, values in columns),
        correlation=correlation,
    ):
        cell = np.ix_(similar.rows, similar.columns)
        found[cell] = np.maximum(found[cell], similar.correlations)
    assert 0 < (expected >= correlation).sum() < expected.size
    assert (found == np.where(expected >= correlation, expected, 0)).all()
    matches = near(images[::2], images[1::2], correlation=correlation, block=7)
    rows_found = np.flatnonzero(expected.max(axis=1) >= correlation)
    assert matches == [Match(int(row), int(expected[row].argmax()), float(expected[row].max())) for row in rows_found]


def test_rows_are_gathered_into_blocks_of_equal_length() -> None:
    def blocks() -> Any:
        for start in range(0, 49, 7):
            yield np.arange(start, start + 7), np.arange(start, start + 7)[:, np.newaxis]

    found = list(_gathered(blocks(), rows=5))
    assert [len(indices) for indices, _ in found] == [5] * 9 + [4]
    assert np.concatenate([indices for indices, _ in found]).tolist() == list(range(49))
    assert all((values[:, 0] == indices).all() for indices, values in found)


def test_matches_do_not_depend_on_the_size_of_blocks() -> None:
    test, others = photos(7, seed=50), photos(40)
    assert near(test, others, correlation=0.05, block=3) == near(test, others, correlation=0.05, block=1000)
