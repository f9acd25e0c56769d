"""A served model accepts images of whole numbers, and refuses anything else in one line."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.models.build import build
from pipeline.models.files import save_config, save_weights
from pipeline.tracking.served_model import InvalidImages, InvalidRequest, ServedModel, as_images, find_threshold
from tests.conftest import colored_images
from tests.test_model import config

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
    "an image without a batch": (
        IMAGES[0],
        r"found one image of shape \(4, 4, 1\), without a batch axis: send it as \[image\]; allowed: images ",
    ),
    "a larger image without a batch": (np.zeros((9, 9, 1)), r"found one image of shape \(9, 9, 1\), without a batch"),
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


CONFIG = config(class_names=("cat", "dog"), thresholds={0.5: 0.9, 0.95: 0.4})


@pytest.mark.parametrize(("coverage", "threshold"), [(None, None), (0.5, 0.9), (0.95, 0.4)])
def test_a_coverage_has_the_threshold_of_the_model(coverage: float | None, threshold: float | None) -> None:
    assert find_threshold(CONFIG, coverage) == threshold


@pytest.mark.parametrize(
    ("changes", "coverage", "message"),
    [
        ({}, 0.94, "params: coverage is 0.94; allowed: 0.5, 0.95; choose one of these$"),
        ({}, float("nan"), "params: coverage is nan; allowed: 0.5, 0.95; choose one of these$"),
        (
            {"thresholds": None},
            0.5,
            "the model has no thresholds, since an earlier version trained it; allowed: no cov",
        ),
        ({"class_names": ("cat", "is_unknown")}, 0.5, "a class has the name of the column is_unknown"),
    ],
)
def test_a_coverage_without_a_threshold_is_refused(changes: dict[str, Any], coverage: float, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as error:
        find_threshold(CONFIG.model_copy(update=changes), coverage)
    assert "\n" not in error.value.message
    assert error.value.error_code == "INVALID_PARAMETER_VALUE"


def test_a_class_called_unknown_is_distinguished_from_an_image_of_unknown_class(tmp_path: Path) -> None:
    chosen = config(class_names=("dog", "unknown"), thresholds={0.5: 1.0, 0.95: 0.0})
    save_config(chosen, tmp_path)
    save_weights(build(chosen), tmp_path / "best.safetensors")
    model = ServedModel()
    model.load_context(SimpleNamespace(artifacts={"weights": str(tmp_path / "best.safetensors")}))
    images = colored_images(2, size=chosen.image_size, channels=chosen.channels)[0]
    unknown, covered = (model.predict(None, images, {"coverage": coverage}) for coverage in (0.5, 0.95))
    assert unknown[["predicted_class", "is_unknown"]].values.tolist() == [["unknown", True]] * 2
    assert covered["is_unknown"].tolist() == [False, False]
    assert set(covered["predicted_class"]) <= {"dog", "unknown"}
