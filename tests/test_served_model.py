"""A served model accepts images of whole numbers, and refuses anything else in one line."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.tracking.served_model import InvalidImages, as_images

SHAPE = (4, 4, 1)
IMAGES = np.arange(32, dtype=np.uint8).reshape(2, *SHAPE) * 8
BIG = 10**400

ACCEPTED: dict[str, Any] = {
    "uint8": IMAGES,
    "int64": IMAGES.astype(np.int64),
    "whole numbers as floats": IMAGES.astype(np.float32),
    "nested lists": IMAGES.tolist(),
    "a list of arrays": list(IMAGES),
    "objects": IMAGES.astype(object),
    "a column of nested lists": pd.DataFrame({"image": IMAGES.tolist()}),
    "a column of arrays": pd.DataFrame({"image": list(IMAGES)}),
    "a column of flat lists": pd.DataFrame({"image": IMAGES.reshape(2, -1).tolist()}),
    "a series": pd.Series(IMAGES.tolist()),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_whole_numbers_from_0_to_255_are_accepted_unchanged(name: str) -> None:
    found = as_images(ACCEPTED[name], shape=SHAPE)
    assert found.dtype == np.uint8
    assert np.array_equal(found, IMAGES)


def changed(value: Any, dtype: Any = np.float64) -> Any:
    images = IMAGES.astype(dtype)
    images[1, 2, 3, 0] = value
    return images


REFUSED: dict[str, tuple[Any, str]] = {
    "a fraction": (
        changed(0.5),
        r"found the value 0\.5 \(image 1, row 2, column 3, channel 0\); allowed: images as they",
    ),
    "scaled to 0 to 1": (IMAGES / 255, r"found the value 0\.03\d* \(image 0, row 0, column 1, channel 0\)"),
    "normalized": ((IMAGES / 255 - 0.2) / 0.3, r"found the value -0\.6"),
    "a negative number": (changed(-1, np.int64), r"found the value -1 \(image 1"),
    "too large a number": (changed(256, np.int64), r"found the value 256 \(image 1"),
    "too large a fraction": (changed(255.5), r"found the value 255\.5"),
    "nan": (changed(np.nan), r"found the value nan"),
    "infinity": (changed(np.inf), r"found the value inf"),
    "null": (changed(None, object).tolist(), "found null among the values"),
    "text among numbers": (changed("7", object), "found str among the values"),
    "an integer beyond 64 bits": (changed(2**70, object).tolist(), r"found the value 1\.18\d*e\+21"),
    "an integer beyond floats": (changed(BIG, object).tolist(), "found a value beyond all floating-point numbers"),
    "text": (["aGVsbG8="], "found text instead of numbers"),
    "one text": ("aGVsbG8=", "found text instead of numbers"),
    "bytes": ([b"abc"], "found bytes instead of numbers"),
    "booleans": (IMAGES > 3, "found true and false instead of numbers"),
    "complex numbers": (IMAGES * 1j, "found complex numbers instead of numbers"),
    "no image": ([], "found no image"),
    "no image of the right size": (IMAGES[:0], "found no image"),
    "an image without a batch": (IMAGES[0], r"found an array of shape \(4, 4, 1\); allowed: images .* \(N, 4, 4, 1\)"),
    "channels first": (IMAGES.transpose(0, 3, 1, 2), r"found an array of shape \(2, 1, 4, 4\)"),
    "no channels": (IMAGES[..., 0], r"found an array of shape \(2, 4, 4\)"),
    "another size": (IMAGES[:, 1:, 1:], r"found an array of shape \(2, 3, 3, 1\)"),
    "one number": (3, "found the single number 3"),
    "nothing": (None, "found null among the values"),
    "ragged": ([IMAGES[0].tolist(), [[1]]], "found images or rows of different lengths"),
    "ragged cells": (pd.DataFrame({"image": [[[1], [2, 3]], [1]]}), "found images or rows of different lengths"),
    "a named input": ({"image": IMAGES}, "found named inputs 'image' instead of one array"),
    "a table of pixels": (pd.DataFrame(IMAGES.reshape(2, -1)), "found a table of 16 columns instead of one"),
    "an empty table": (pd.DataFrame({"image": []}), "found no image"),
    "a table of text": (pd.DataFrame({"image": ["a", "b"]}), "found text instead of numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_refused_in_one_line(name: str) -> None:
    value, message = REFUSED[name]
    with pytest.raises(InvalidImages, match=message) as error:
        as_images(value, shape=SHAPE)
    assert "\n" not in error.value.message
    assert error.value.error_code == "INVALID_PARAMETER_VALUE"  # MLflow answers with status 400


def test_the_server_cannot_prepend_the_input_to_the_message() -> None:
    error = InvalidImages("no image", shape=SHAPE)
    before = error.message
    error.message = f"Failed to predict data '{IMAGES}'. \nError: {before}"
    assert error.message == before
