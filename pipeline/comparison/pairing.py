"""Pair the predictions of two models on the same test images, without images that one of the models has seen."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pipeline.core.errors import UserError
from pipeline.evaluation.predictions import Predictions

Rows = npt.NDArray[np.int64]  # (M,) indices into the predictions of a model


@dataclass(frozen=True)
class Candidate:
    """A model in a comparison: its predictions for a split, and the images it must not be evaluated on.

    `leaked` holds the content hashes of images of the split that have a duplicate or near-duplicate among the images
    the model was trained or selected on; `trained_on` those of its train and validation splits.
    """

    label: str
    predictions: Predictions
    leaked: frozenset[str] = frozenset()
    trained_on: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Pairing:
    """The predictions of models for the same images, in the same order, with the same class names.

    `same_split` is whether all splits have the same images; `not_common` has for each model the number of images in its
    split that another split lacks. The other fields count common images that are left out: a model was trained on them,
    has a near-duplicate of them in its training data (`leaked`), or the data sets give them different classes
    (`relabeled`).
    """

    models: tuple[Predictions, ...]
    same_split: bool
    not_common: tuple[int, ...]
    trained_on: int
    leaked: int
    relabeled: int

    def __len__(self) -> int:
        return len(self.models[0])

    @property
    def a(self) -> Predictions:
        """Return the predictions of the first model."""
        return self.models[0]

    @property
    def b(self) -> Predictions:
        """Return the predictions of the second model."""
        return self.models[1]

    @property
    def is_calibrated(self) -> bool:
        """Return whether all models have calibrated probabilities."""
        return all(each.calibrated_probabilities is not None for each in self.models)


def pair(*candidates: Candidate) -> Pairing:
    """Return the predictions of two or more models for the images on which all can be compared, sorted by hash.

    Images are the same if they have the same content hash; of several with the same hash, the first of one split is
    paired with the first of the other, and so on. The order of the images in a split does not matter otherwise. Raises
    UserError where the classes differ or no image is left.
    """
    _check_classes(candidates)
    first = candidates[0].predictions
    positions = [{key: row for row, key in enumerate(_keys(each))} for each in candidates]
    common = sorted(key for key in positions[0] if all(key in each for each in positions))
    models = [
        _with_classes_of(first, take(each.predictions, np.array([rows[key] for key in common], np.int64)))
        for each, rows in zip(candidates, positions, strict=True)
    ]
    seen = frozenset[str]().union(*(each.trained_on for each in candidates))
    near = frozenset[str]().union(*(each.leaked for each in candidates))
    trained_on = np.array([key in seen for key, _ in common], bool)
    leaked = np.array([key in near for key, _ in common], bool) & ~trained_on
    relabeled = np.any([each.actual != models[0].actual for each in models], axis=0) & ~trained_on & ~leaked
    kept = np.flatnonzero(~(trained_on | leaked | relabeled))
    counts = {"trained_on": trained_on, "leaked": leaked, "relabeled": relabeled}
    pairing = Pairing(
        models=tuple(take(each, kept) for each in models),
        same_split=all(each.keys() == positions[0].keys() for each in positions),
        not_common=tuple(len(each) - len(common) for each in positions),
        **{name: int(found.sum()) for name, found in counts.items()},
    )
    if not len(kept):
        raise UserError(_nothing_left(candidates, pairing, common=len(common)))
    return pairing


def take(predictions: Predictions, rows: Rows) -> Predictions:
    """Return the predictions for some images, in the order of `rows`."""
    calibrated = predictions.calibrated_probabilities
    return replace(
        predictions,
        names=[predictions.names[row] for row in rows],
        content_hashes=[predictions.content_hashes[row] for row in rows],
        actual=predictions.actual[rows],
        predicted=predictions.predicted[rows],
        probabilities=predictions.probabilities[rows],
        calibrated_probabilities=None if calibrated is None else calibrated[rows],
    )


def _check_classes(candidates: Sequence[Candidate]) -> None:
    first = candidates[0]
    for other in candidates[1:]:
        only = sorted(set(first.predictions.class_names) ^ set(other.predictions.class_names))
        if only:
            raise UserError(
                f"{first.label} and {other.label} know different classes: {', '.join(only[:5])}"
                f"{', …' if len(only) > 5 else ''} belong to one of them only; allowed: models of the same classes; "
                "name such models"
            )


def _keys(candidate: Candidate) -> list[tuple[str, int]]:
    """Return for each image its content hash and how many images before it have the same one."""
    seen: Counter[str] = Counter()
    keys = []
    for each in candidate.predictions.content_hashes:
        if not each:
            raise UserError(
                f"{candidate.label}: its predictions have no content hashes, so its images cannot be recognized; "
                "evaluate it again with `dvc repro`"
            )
        keys.append((each, seen[each]))
        seen[each] += 1
    return keys


def _with_classes_of(model: Predictions, predictions: Predictions) -> Predictions:
    """Return the predictions with the class names in the order of another model's."""
    if predictions.class_names == model.class_names:
        return predictions
    order = [predictions.class_names.index(name) for name in model.class_names]
    new_index = np.argsort(order)
    calibrated = predictions.calibrated_probabilities
    return replace(
        predictions,
        class_names=model.class_names,
        actual=new_index[predictions.actual],
        predicted=new_index[predictions.predicted],
        probabilities=predictions.probabilities[:, order],
        calibrated_probabilities=None if calibrated is None else calibrated[:, order],
    )


def _nothing_left(candidates: Sequence[Candidate], pairing: Pairing, *, common: int) -> str:
    """Return the error for models that share no image on which they can be compared."""
    reasons = [
        f"{number} {text}"
        for number, text in (
            (pairing.trained_on, "were used to train one of them"),
            (pairing.leaked, "nearly equal an image used to train one of them"),
            (pairing.relabeled, "have different classes in the data sets"),
        )
        if number
    ]
    found = f"{common} in common" + (f", of which {', '.join(reasons)}" if reasons else "")
    names = " and ".join(each.label for each in candidates)
    return (
        f"{names} have no test image on which all can be compared: found {found}; "
        "allowed: one test split on which none was trained; evaluate them on such a split"
    )
