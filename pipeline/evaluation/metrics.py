"""Compute the metrics of a classifier on a split: overall, for each class and for each image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.artifacts import Labels
from pipeline.evaluation.intervals import wilson_interval
from pipeline.evaluation.scores import f1_scores
from pipeline.models.losses import loss_function

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a split, with one row for each class, one row for each image, and the confusion matrix.

    `confusion` (num_classes, num_classes) int64 has the number of images by actual (row) and predicted class (column).
    """

    metrics: dict[str, float]
    per_class: list[Row]
    predictions: list[Row]
    confusion: npt.NDArray[np.int64]


def evaluate(
    logits: torch.Tensor,
    labels: Labels,
    *,
    loss: str,
    class_names: Sequence[str],
    top_k: int,
    duplicates: Sequence[int],
) -> Evaluation:
    """Compute all metrics from logits (N, num_classes) float32 on the CPU and labels (N,) int64.

    The loss is that of the training, of which `loss` is the name, without label smoothing and class weights. The
    balanced accuracy is the mean recall of the classes that have images. `duplicates` are the indices of test images
    that have a duplicate or near-duplicate in another split.
    """
    probabilities = logits.softmax(1).numpy()
    predicted = probabilities.argmax(1)
    confusion = np.zeros((len(class_names), len(class_names)), dtype=np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    is_correct = predicted == labels
    per_class = _per_class(confusion, class_names=class_names)
    num_correct, actual = np.diag(confusion), confusion.sum(1)
    recalls = num_correct[actual > 0] / actual[actual > 0]
    low, high = wilson_interval(int(is_correct.sum()), len(labels))
    metrics: dict[str, float] = {
        "loss": loss_function(loss)(logits, torch.from_numpy(np.asarray(labels))).item(),
        "accuracy": float(is_correct.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "balanced_accuracy": float(recalls.mean()),
        "macro_f1": float(_f1_scores(confusion).mean()),
    }
    if len(class_names) > top_k:
        ranks = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
        metrics[f"top_{top_k}_accuracy"] = float((ranks == labels[:, None]).any(1).mean())
    is_unique = np.ones(len(labels), dtype=bool)
    is_unique[list(duplicates)] = False
    if is_unique.any():
        metrics["accuracy_without_duplicates"] = float(is_correct[is_unique].mean())
    metrics |= {"test_images": len(labels), "test_duplicates": len(duplicates)}
    predictions: list[Row] = [
        {
            "image": index,
            "actual": class_names[actual],
            "predicted": class_names[prediction],
            "probability": f"{row[prediction]:.6f}",
        }
        for index, (actual, prediction, row) in enumerate(zip(labels, predicted, probabilities, strict=True))
    ]
    return Evaluation(metrics=metrics, per_class=per_class, predictions=predictions, confusion=confusion)


def _f1_scores(confusion: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Return the F1 score of each class: (num_classes,) float64."""
    return f1_scores(num_correct=np.diag(confusion), actual=confusion.sum(1), predicted=confusion.sum(0))


def _per_class(confusion: npt.NDArray[np.int64], *, class_names: Sequence[str]) -> list[Row]:
    """Return precision, recall and F1 of each class; a value whose divisor is 0 is 0."""
    num_correct, actual, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    precision = num_correct / np.maximum(predicted, 1)
    recall = num_correct / np.maximum(actual, 1)
    f1 = _f1_scores(confusion)
    return [
        {
            "class": name,
            "images": int(actual[index]),
            "precision": round(float(precision[index]), 6),
            "recall": round(float(recall[index]), 6),
            "f1": round(float(f1[index]), 6),
        }
        for index, name in enumerate(class_names)
    ]
