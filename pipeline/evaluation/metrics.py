"""Metrics of a classifier on a split: from logits and labels to figures, per class and per image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.artifacts import Labels
from pipeline.evaluation.intervals import wilson_interval
from pipeline.models.losses import loss_function

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """What the test split says: single figures, a row a class, a row an image, and the confusion matrix."""

    metrics: dict[str, float]
    per_class: list[Row]
    predictions: list[Row]
    confusion: npt.NDArray[np.int64]
    """(num_classes, num_classes), actual by predicted."""


def evaluate(
    logits: torch.Tensor,
    labels: Labels,
    *,
    loss: str,
    class_names: Sequence[str],
    top_k: int,
    duplicates: Sequence[int],
) -> Evaluation:
    """From logits (N, num_classes) float32 and labels (N,) int64; `duplicates` are test images also found in train."""
    probabilities = logits.softmax(1).numpy()
    predicted = probabilities.argmax(1)
    confusion = np.zeros((len(class_names), len(class_names)), dtype=np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    hits = predicted == labels
    per_class = _per_class(confusion, class_names=class_names)
    low, high = wilson_interval(int(hits.sum()), len(hits))
    metrics: dict[str, float] = {
        "loss": loss_function(loss)(logits, torch.from_numpy(np.asarray(labels))).item(),
        "accuracy": float(hits.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "macro_f1": float(np.mean([row["f1"] for row in per_class])),
    }
    if len(class_names) > top_k:
        ranks = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
        metrics[f"top_{top_k}_accuracy"] = float((ranks == labels[:, None]).any(1).mean())
    alone = np.ones(len(hits), dtype=bool)
    alone[list(duplicates)] = False
    if alone.any():
        metrics["accuracy_without_duplicates"] = float(hits[alone].mean())
    metrics |= {"test_images": len(hits), "test_duplicates": len(duplicates)}
    predictions: list[Row] = [
        {
            "image": index,
            "actual": class_names[actual],
            "predicted": class_names[guess],
            "probability": f"{row[guess]:.6f}",
        }
        for index, (actual, guess, row) in enumerate(zip(labels, predicted, probabilities, strict=True))
    ]
    return Evaluation(metrics=metrics, per_class=per_class, predictions=predictions, confusion=confusion)


def _per_class(confusion: npt.NDArray[np.int64], *, class_names: Sequence[str]) -> list[Row]:
    """Precision, recall and F1 of each class; 0 where nothing was predicted or nothing was there."""
    hits, actual, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    precision = hits / np.maximum(predicted, 1)
    recall = hits / np.maximum(actual, 1)
    f1 = 2 * hits / np.maximum(actual + predicted, 1)
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
