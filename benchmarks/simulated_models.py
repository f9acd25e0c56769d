"""Simulate models that are equally good, or better by a known amount, on images of a test and a validation split.

Whether a model is right on an image is drawn with a probability p that belongs to the image, independently of the other
models and images. All such models are exactly equal in distribution, and two of them differ on the fraction
`2 E[p (1 - p)]` of the images (their discordance). The p are those of a population of real models, or Beta-distributed.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from pipeline.core.errors import UserError
from pipeline.evaluation.predictions import Predictions

ACCURACY = 0.75  # of models with Beta-distributed p
NUM_CLASSES = 10  # of their images
LOWEST_CONFIDENCE = 0.11  # of the predicted one of these classes
LABELS_FILE = "labels.npz"

Generator = np.random.Generator
Fractions = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Outputs:
    """The probabilities (models, images, classes) of real models for a split, and the actual classes: (images,)."""

    probabilities: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]

    @cached_property
    def predicted(self) -> npt.NDArray[np.int16]:
        """Return the predicted classes: (models, images)."""
        predicted: npt.NDArray[np.int16] = self.probabilities.argmax(2).astype(np.int16)
        return predicted


@dataclass(frozen=True)
class RealSplit:
    """Images drawn with replacement from a split for which real models have outputs; `rows` (N,) are the drawn ones."""

    class_names: tuple[str, ...]
    outputs: Outputs
    rows: npt.NDArray[np.int64]

    @cached_property
    def hashes(self) -> list[str]:
        """Return a content hash for each drawn image."""
        return [f"{row:016x}" for row in range(len(self.rows))]

    @cached_property
    def actual(self) -> npt.NDArray[np.int64]:
        """Return the actual classes of the drawn images: (N,)."""
        return self.outputs.labels[self.rows]

    def draw(self, generator: Generator, *, has_probabilities: bool = True) -> Predictions:
        """Return the predictions of a new model: for each image, those of a random model of the population.

        The probabilities, which take most of the time, have no column where they are not wanted.
        """
        models = generator.integers(0, len(self.outputs.probabilities), len(self.rows))
        probabilities = self.outputs.probabilities[models, self.rows] if has_probabilities else None
        return Predictions(
            self.class_names,
            self.hashes,
            self.hashes,
            actual=self.actual,
            predicted=self.outputs.predicted[models, self.rows].astype(np.int64),
            probabilities=_no_probabilities(len(self.rows)) if probabilities is None else probabilities,
            calibrated_probabilities=None,
        )


@dataclass(frozen=True)
class BetaSplit:
    """Images of NUM_CLASSES classes on which a model is right with these probabilities: (N,) both.

    The probability of the predicted class is the p of the image, so that the models are calibrated.
    """

    right_probabilities: Fractions
    labels: npt.NDArray[np.int64]

    @classmethod
    def make(cls, number: int, *, discordance: float, generator: Generator) -> Self:
        """Return a split on which two equal models have ACCURACY and this discordance.

        With the mean m and the sum s of the parameters of the Beta distribution, E[p (1 - p)] = m (1 - m) s / (s + 1).
        """
        ratio = discordance / (2 * ACCURACY * (1 - ACCURACY))
        total = ratio / (1 - ratio)
        probabilities = generator.beta(ACCURACY * total, (1 - ACCURACY) * total, number)
        return cls(probabilities, generator.integers(0, NUM_CLASSES, number))

    def better(self, gain: float) -> "BetaSplit":
        """Return the same images for models that are right on any image that others get wrong equally often."""
        factor = _factor(gain)
        return BetaSplit(self.right_probabilities + factor * (1 - self.right_probabilities), self.labels)

    @cached_property
    def hashes(self) -> list[str]:
        """Return a content hash for each image."""
        return [f"{row:016x}" for row in range(len(self.labels))]

    @cached_property
    def confidences(self) -> npt.NDArray[np.float32]:
        """Return the probability of the predicted class of each image: (N,)."""
        return np.maximum(self.right_probabilities, LOWEST_CONFIDENCE).astype(np.float32)

    @cached_property
    def others(self) -> npt.NDArray[np.float32]:
        """Return the probability of each other class: (N, NUM_CLASSES)."""
        return np.repeat((1 - self.confidences[:, None]) / np.float32(NUM_CLASSES - 1), NUM_CLASSES, axis=1)

    def draw(self, generator: Generator, *, has_probabilities: bool = True) -> Predictions:
        """Return the predictions of a new model; the probabilities have no column where they are not wanted."""
        return self._predictions(self._right(generator), generator, has_probabilities=has_probabilities)

    def draw_ranked(self, percentile: int, generator: Generator) -> Predictions:
        """Return the predictions of that of 99 new models whose accuracy has this rank, from 1 (worst) to 99 (best)."""
        each = np.stack([self._right(generator) for _ in range(99)])
        return self._predictions(each[np.argsort(each.sum(1), kind="stable")[percentile - 1]], generator)

    def _right(self, generator: Generator) -> npt.NDArray[np.bool_]:
        return generator.random(len(self.labels)) < self.right_probabilities

    def _predictions(
        self, right: npt.NDArray[np.bool_], generator: Generator, *, has_probabilities: bool = True
    ) -> Predictions:
        number = len(self.labels)
        others = (self.labels + generator.integers(1, NUM_CLASSES, number)) % NUM_CLASSES
        predicted = np.where(right, self.labels, others)
        probabilities = self.others.copy() if has_probabilities else _no_probabilities(number)
        if has_probabilities:
            probabilities[np.arange(number), predicted] = self.confidences
        names = tuple(map(str, range(NUM_CLASSES)))
        return Predictions(names, self.hashes, self.hashes, self.labels, predicted, probabilities, None)


Split = RealSplit | BetaSplit


def discordance_of_equals(discordance: float, *, gain: float) -> float:
    """Return the discordance of two equal models if a better one and one of them have `discordance`.

    The better one is right with the probability p + t (1 - p); so E[p (1 - p')] + E[p' (1 - p)] is
    (1 - t) 2 E[p (1 - p)] + t E[1 - p], of which the last term is the gain.
    """
    return (discordance - gain) / (1 - _factor(gain))


def _no_probabilities(number: int) -> npt.NDArray[np.float32]:
    return np.empty((number, 0), np.float32)


def _factor(gain: float) -> float:
    """Return the fraction of the others' errors that a better model avoids."""
    return gain / (1 - ACCURACY)


@dataclass(frozen=True)
class Population:
    """The outputs of real models of a recipe for both splits."""

    recipe: str
    class_names: tuple[str, ...]
    test: Outputs
    validation: Outputs

    def draw_splits(self, generator: Generator) -> tuple[RealSplit, RealSplit]:
        """Return a test and a validation split of as many images as the population's, drawn with replacement."""
        test, validation = (
            RealSplit(self.class_names, each, generator.integers(0, len(each.labels), len(each.labels)))
            for each in (self.test, self.validation)
        )
        return test, validation


def read_populations(folder: Path) -> list[Population]:
    """Read a population for each recipe that has two or more files `<recipe>-<seed>.npz` in the folder.

    Each file has `test_probabilities` (N, classes) and `validation_probabilities` (M, classes), float16 or float32;
    `labels.npz` has `test_labels`, `validation_labels` and `class_names`. Raises UserError where there are none.
    """
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*-*.npz")):
        files.setdefault(path.stem.rpartition("-")[0], []).append(path)
    files = {recipe: paths for recipe, paths in files.items() if len(paths) > 1}
    if not files or not (folder / LABELS_FILE).is_file():
        raise UserError(
            f"--models: found {'no labels.npz' if files else 'no recipe with two or more models'} in {str(folder)!r}; "
            "allowed: a folder with labels.npz and files <recipe>-<seed>.npz; make them by benchmarks/population.py"
        )
    with np.load(folder / LABELS_FILE) as labels:
        class_names = tuple(map(str, labels["class_names"]))
        actual = {split: labels[f"{split}_labels"].astype(np.int64) for split in ("test", "validation")}
    return [
        Population(
            recipe,
            class_names,
            test=Outputs(_read(paths, "test_probabilities"), actual["test"]),
            validation=Outputs(_read(paths, "validation_probabilities"), actual["validation"]),
        )
        for recipe, paths in files.items()
    ]


def _read(paths: list[Path], name: str) -> npt.NDArray[np.float32]:
    """Return an array of all files: (models, images, classes); raises UserError where one lacks it."""
    arrays = []
    for path in paths:
        with np.load(path) as file:
            if name not in file:
                raise UserError(f"{path}: found {', '.join(file)}; allowed: an array {name}; make the file again")
            arrays.append(file[name].astype(np.float32))
    return np.stack(arrays)
