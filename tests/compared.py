"""Predictions of models for the tests of comparisons."""

from collections.abc import Sequence

import numpy as np

from pipeline.comparison.pairing import Candidate, take
from pipeline.evaluation.predictions import Predictions


def predictions(
    actual: Sequence[int], predicted: Sequence[int], *, classes: Sequence[str] = ("cat", "dog"), confidence: float = 0.8
) -> Predictions:
    """Return predictions with this probability of the predicted class; image i has the hash `<i in hexadecimal>`."""
    rest = (1 - confidence) / max(1, len(classes) - 1)
    probabilities = np.full((len(actual), len(classes)), rest, np.float32)
    probabilities[np.arange(len(actual)), predicted] = confidence
    return Predictions(
        class_names=tuple(classes),
        names=[f"{index}.png" for index in range(len(actual))],
        content_hashes=[f"{index:016x}" for index in range(len(actual))],
        actual=np.array(actual, np.int64),
        predicted=np.array(predicted, np.int64),
        probabilities=probabilities,
        calibrated_probabilities=None,
    )


def random_predictions(number: int, *, num_classes: int, accuracy: float, seed: int) -> Predictions:
    """Return predictions of a model that is right with this probability; the actual classes do not depend on it."""
    actual = np.random.default_rng(0).integers(0, num_classes, number)
    random = np.random.default_rng(seed)
    guessed = random.integers(0, num_classes, number)
    predicted = np.where(random.random(number) < accuracy, actual, guessed)
    classes = [f"class {index:03}" for index in range(num_classes)]
    return predictions(list(actual), list(predicted), classes=classes)


def shuffled(predictions: Predictions, *, seed: int = 0) -> Predictions:
    """Return the predictions with the images in another order."""
    return take(predictions, np.random.default_rng(seed).permutation(len(predictions)))


def candidate(predictions: Predictions, label: str = "model", **seen: Sequence[int]) -> Candidate:
    """Return a candidate; `leaked` and `trained_on` are the numbers of images."""
    return Candidate(label, predictions, **{key: frozenset(f"{i:016x}" for i in value) for key, value in seen.items()})
