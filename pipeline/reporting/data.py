"""Read what the steps wrote, as the typed content of the report."""

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.arrays import DatasetInfo
from pipeline.artifacts import (
    DOWNLOAD,
    EVALUATE,
    HISTORY,
    NORMALIZE,
    SELECTED_COLUMN,
    TRAIN,
    Images,
    Labels,
    missing_file_message,
    read_csv,
    read_json,
    read_split,
)
from pipeline.core.errors import UserError
from pipeline.evaluation.metrics import confusion_matrix
from pipeline.evaluation.predictions import Predictions, read_predictions
from pipeline.parquet import read_files

PREDICTIONS = EVALUATE / "predictions.parquet"
SURE = 0.9  # the probability from which the report calls the model sure
Row = Mapping[str, Any]

METRICS = ("accuracy", "accuracy_low", "accuracy_high", "loss", "test_images")
HISTORY_COLUMNS = (
    "epoch",
    "train_loss",
    "train_accuracy",
    "validation_loss",
    "validation_accuracy",
    SELECTED_COLUMN,
)
CLASS_COLUMNS = (
    "class",
    "images",
    *(f"{score}{end}" for score in ("recall", "precision", "f1") for end in ("", "_low", "_high")),
)


@dataclass(frozen=True)
class Content:
    """What the steps wrote: the description of the data, the arrays, the training's history and the evaluation."""

    info: DatasetInfo
    dataset: Row  # `dataset.json`
    source: Row  # `source.json`; empty where the raw data are not here
    history: Sequence[Row]
    metrics: Row
    per_class: Sequence[Row]
    calibration: Row
    predictions: Predictions
    test_images: Images
    train_images: Images
    train_labels: Labels
    train_names: Sequence[str]

    @property
    def selected(self) -> Row | None:
        """Return the row of the selected epoch, or None for a history of an earlier version."""
        return next((row for row in self.history if row.get(SELECTED_COLUMN)), None)

    @cached_property
    def confusion(self) -> npt.NDArray[np.int64]:
        """Return the number of images by actual (row) and predicted class (column)."""
        return confusion_matrix(self.predictions)


@dataclass(frozen=True)
class Confusion:
    """A frequent confusion: `images` of the `total` images of a class were predicted as another one."""

    actual: str
    predicted: str
    images: int
    total: int


@dataclass(frozen=True)
class ConfidenceSummary:
    """The `images` with a probability of at least `threshold` and the `correct` ones of them.

    `excess` is the mean probability of the predicted classes minus the accuracy, over all images.
    """

    threshold: float
    images: int
    correct: int
    excess: float


def read_content() -> Content:
    """Read the files of all steps; raises UserError where one is missing, damaged or does not fit the others."""
    info = DatasetInfo.read()
    test_images, test_labels = read_split("test")
    train_images, train_labels = read_split("train")
    predictions, dataset = read_predictions(PREDICTIONS), read_json(NORMALIZE / "dataset.json")
    if predictions.class_names != info.class_names or not np.array_equal(predictions.actual, test_labels):
        raise UserError(f"{PREDICTIONS}: not of the test images in {NORMALIZE}; run `dvc repro`")
    metrics = _read_values(
        EVALUATE / "metrics.json", ("accuracy", "accuracy_low", "accuracy_high", "loss", "test_images")
    )
    if metrics["test_images"] != len(predictions) or metrics["accuracy"] != float(predictions.is_correct.mean()):
        raise UserError(f"{EVALUATE / 'metrics.json'}: not of the predictions in {PREDICTIONS}; run `dvc repro`")
    source = DOWNLOAD / "source.json"
    return Content(
        info=info,
        dataset=dataset,
        source=_read_values(source, ()) if source.exists() else {},
        history=_read_table(TRAIN / HISTORY, columns=HISTORY_COLUMNS, text=(SELECTED_COLUMN,)),
        metrics=metrics,
        per_class=_read_table(EVALUATE / "per_class.csv", columns=CLASS_COLUMNS, text=("class",)),
        calibration=_read_values(EVALUATE / "calibration.json", ("temperature", "num_bins", "raw", "calibrated")),
        predictions=replace(predictions, names=shown_names(predictions.names, dataset=dataset)),
        test_images=test_images,
        train_images=train_images,
        train_labels=train_labels,
        train_names=shown_names(read_files("train")[0], dataset=dataset),
    )


def shown_names(names: Sequence[str], *, dataset: Row) -> list[str]:
    """Return the names of images for people: the path in the user's folder, or the number in a public data set.

    Where the test split was drawn, all names begin with `train/` in the archive of the images, test images included.
    """
    if dataset["dataset"] != "imagefolder":
        return [re.sub(r"^(.*)/0*(\d+)$", _image_number, name) for name in names]
    is_drawn = "test" in dataset.get("groups", {}).get("drawn_splits", [])
    return [name.removeprefix("train/") if is_drawn else name for name in names]


def _image_number(found: re.Match[str]) -> str:
    """Return `image 1573` for `digits/01573`, and `image 12 of test_batch` for `cifar10/test_batch/00012`."""
    batch = found[1].rpartition("/")[2] if "batch" in found[1] else ""
    return f"image {found[2]}{f' of {batch}' if batch else ''}"


def confidence_summary(predictions: Predictions) -> ConfidenceSummary:
    """Return how often the model is right where it is sure, and how much its confidence exceeds its accuracy."""
    confidences = predictions.confidences(predictions.best_probabilities).astype(np.float64)
    is_sure = confidences >= SURE
    return ConfidenceSummary(
        threshold=SURE,
        images=int(is_sure.sum()),
        correct=int(predictions.is_correct[is_sure].sum()),
        excess=float(confidences.mean() - predictions.is_correct.mean()),
    )


def frequent_confusions(
    confusion: npt.NDArray[np.int64], class_names: Sequence[str], *, number: int
) -> list[Confusion]:
    """Return the confusions of most images, at most `number` of them."""
    wrong = confusion - np.diag(np.diag(confusion))
    order = np.argsort(-wrong, axis=None, kind="stable")[:number]
    pairs = [divmod(int(index), len(class_names)) for index in order]
    return [
        Confusion(class_names[row], class_names[column], int(wrong[row, column]), int(confusion[row].sum()))
        for row, column in pairs
        if wrong[row, column]
    ]


def _read_values(path: Path, required: Sequence[str]) -> Row:
    """Return the values of a JSON file; raises UserError where it is missing, damaged or lacks a required one."""
    values = read_json(path)
    if not isinstance(values, dict) or not values.keys() >= set(required):
        raise UserError(_incomplete(path, required))
    return values


def _incomplete(path: Path, required: Sequence[str]) -> str:
    """Return the error message for a file that lacks some of the required values, such as one of an earlier version."""
    return f"{path}: lacks some of {', '.join(required) or 'its values'}; run `dvc repro` to make it again"


def _read_table(path: Path, *, columns: Sequence[str], text: Sequence[str]) -> list[Row]:
    """Return the rows of a table, with numbers but in the columns `text`; an empty value is None.

    Raises UserError where the table is missing or damaged, or lacks one of the columns.
    """
    try:
        rows = read_csv(path)
        table: list[Row] = [
            {name: value if name in text else _number(value) for name, value in row.items()} for row in rows
        ]
    except FileNotFoundError:
        raise UserError(missing_file_message(path)) from None
    except (ValueError, TypeError, csv.Error):
        table = []
    if not table:
        raise UserError(f"{path}: damaged; remove it and run `dvc repro` to make it again")
    if not table[0].keys() >= set(columns):
        raise UserError(_incomplete(path, columns))
    return table


def _number(value: str) -> float | int | None:
    """Return the number that a text has, None for an empty one; raises ValueError."""
    if not value:
        return None
    return int(value) if value.isdecimal() else float(value)
