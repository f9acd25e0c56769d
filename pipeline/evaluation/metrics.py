"""Compute the figures of an evaluation from its predictions alone: overall, for each class, for each image."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.evaluation.calibration import calibration
from pipeline.evaluation.intervals import Interval, f1_interval, wilson_interval
from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.scores import f1_scores

Row = Mapping[str, Any]
Confusion = npt.NDArray[np.int64]  # (num_classes, num_classes): images by actual (row) and predicted class (column)


@dataclass(frozen=True)
class Evaluation:
    """The figures of a split: the metrics, a row for each class, the calibration, and the confusion matrix.

    `calibrated` is None where the temperature of the model is unknown.
    """

    metrics: dict[str, float]
    per_class: list[Row]
    raw: Mapping[str, Any]
    calibrated: Mapping[str, Any] | None
    confusion: Confusion


def evaluate(predictions: Predictions, *, top_k: int, duplicates: Sequence[int]) -> Evaluation:
    """Compute all figures except the loss, which needs the logits.

    `duplicates` are the indices of test images that have a duplicate or near-duplicate in another split.
    """
    confusion = confusion_matrix(predictions)
    raw, calibrated = calibration(predictions, predictions.probabilities), None
    metrics = overall(predictions, top_k=top_k, duplicates=duplicates)
    metrics["expected_calibration_error"] = raw["expected_calibration_error"]
    if predictions.calibrated_probabilities is not None:
        calibrated = calibration(predictions, predictions.calibrated_probabilities)
        metrics["expected_calibration_error_calibrated"] = calibrated["expected_calibration_error"]
    return Evaluation(metrics, per_class(confusion, predictions.class_names), raw, calibrated, confusion)


def confusion_matrix(predictions: Predictions) -> Confusion:
    """Return the number of images by actual (row) and predicted class (column): (num_classes, num_classes)."""
    num_classes = len(predictions.class_names)
    counts = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(counts, (predictions.actual, predictions.predicted), 1)
    return counts


def overall(predictions: Predictions, *, top_k: int, duplicates: Sequence[int]) -> dict[str, float]:
    """Return accuracy with its 95 % interval, balanced accuracy, macro F1, top-k accuracy and numbers of images.

    The balanced accuracy is the mean recall of the classes that have images. The top-k accuracy is left out where there
    are only k classes or fewer.
    """
    confusion, is_correct = confusion_matrix(predictions), predictions.is_correct
    num_correct, actual = np.diag(confusion), confusion.sum(1)
    recalls = num_correct[actual > 0] / actual[actual > 0]
    low, high = wilson_interval(int(is_correct.sum()), len(predictions))
    f1 = f1_scores(num_correct=num_correct, actual=actual, predicted=confusion.sum(0))
    metrics: dict[str, float] = {
        "accuracy": float(is_correct.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "balanced_accuracy": float(recalls.mean()),
        "macro_f1": float(f1.mean()),
    }
    if len(predictions.class_names) > top_k:
        metrics[f"top_{top_k}_accuracy"] = float((ranks(predictions) < top_k).mean())
    is_unique = np.ones(len(predictions), dtype=bool)
    is_unique[list(duplicates)] = False
    if is_unique.any():
        metrics["accuracy_without_duplicates"] = float(is_correct[is_unique].mean())
    return metrics | {"test_images": len(predictions), "test_duplicates": len(duplicates)}


def ranks(predictions: Predictions) -> npt.NDArray[np.int64]:
    """Return how many classes come before the actual one: (N,), 0 for the most probable class.

    Of classes with the same raw probability, that with the smaller index comes first.
    """
    probabilities, actual = predictions.probabilities, predictions.actual[:, None]
    of_actual = np.take_along_axis(probabilities, actual, axis=1)
    is_earlier = np.arange(len(predictions.class_names)) < actual
    found: npt.NDArray[np.int64] = ((probabilities > of_actual) | ((probabilities == of_actual) & is_earlier)).sum(1)
    return found


def per_class(confusion: Confusion, class_names: Sequence[str]) -> list[Row]:
    """Return precision, recall and F1 of each class with their 95 % intervals, rounded to 6 decimals.

    Precision and recall have Wilson intervals, F1 that of `f1_interval`. The recall of a class without images is
    undefined, and so is the precision of a class that is never predicted: these values are empty, as is the F1 score of
    a class that is neither in the images nor in the predictions.
    """
    rows: list[Row] = []
    for index, name in enumerate(class_names):
        num_correct, images = int(confusion[index, index]), int(confusion[index].sum())
        predicted = int(confusion[:, index].sum())
        involved = images + predicted - num_correct
        counts = {"images": images, "predicted_images": predicted, "num_correct": num_correct}
        f1 = 2 * num_correct / (images + predicted) if involved else None
        rows.append(
            {"class": name, **counts}
            | _with_interval("precision", num_correct, predicted)
            | _with_interval("recall", num_correct, images)
            | _with_interval("f1", num_correct, involved, value=f1, interval=f1_interval)
        )
    return rows


def _with_interval(
    name: str,
    num_correct: int,
    number: int,
    *,
    value: float | None = None,
    interval: Callable[[int, int], Interval] = wilson_interval,
) -> Row:
    """Return a value, by default the fraction of correct images, with its interval; empty where there is no image."""
    names = (name, f"{name}_low", f"{name}_high")
    if not number:
        return dict.fromkeys(names, "")
    values = (num_correct / number if value is None else value, *interval(num_correct, number))
    return dict(zip(names, (round(each, 6) for each in values), strict=True))


def prediction_rows(predictions: Predictions) -> Iterator[Row]:
    """Yield the name, the actual and the predicted class, and the predicted class's probability of each image.

    The probability is calibrated where the temperature of the model is known.
    """
    confidences = predictions.confidences(predictions.best_probabilities)
    columns = predictions.names, predictions.actual, predictions.predicted, confidences
    for name, actual, predicted, confidence in zip(*columns, strict=True):
        yield {
            "name": name,
            "actual": predictions.class_names[actual],
            "predicted": predictions.class_names[predicted],
            "probability": f"{confidence:.6f}",
        }
