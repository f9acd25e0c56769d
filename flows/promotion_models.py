"""The models of a promotion: find the challenger, measure it, and let the champion predict the challenger's images."""

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from flows.candidates import Model, best_model, candidate, find_models
from flows.champion_ref import champion_commit
from flows.stored_models import Split, file_of
from flows.workspace import existing_store
from pipeline.arrays import DatasetInfo
from pipeline.artifacts import BEST_WEIGHTS, NORMALIZE, TRAIN, bytes_md5
from pipeline.comparison.pairing import Candidate, Pairing, pair
from pipeline.comparison.promotion import Challenger, TestSplit, describe_challenger, describe_test_split
from pipeline.core.errors import UserError
from pipeline.core.git import UNKNOWN
from pipeline.evaluation.predict_split import find_mismatch, load_to_evaluate, predict_split
from pipeline.evaluation.predictions import split_md5
from pipeline.models.config import ModelConfig
from pipeline.models.files import load_config
from pipeline.models.inference import class_probabilities
from pipeline.params import EvaluateParams, Params
from pipeline.tracking.registry import CHAMPION, Version, find_names, find_versions, versions_of_model
from pipeline.tracking.store import connect

WARM_UP, TIMED = 5, 31  # predictions of one image before the clock starts, and those that are timed
EVALUATION = ("checkpoint", "test_time_augmentation")  # parameters of `evaluate` that change predictions
EVALUATE_BEST = "evaluate it with `make run` and the same parameters, but `evaluate.checkpoint=best`"
NO_STORE = "no model has been evaluated yet; `make run` trains and evaluates one"


class NotComparableError(UserError):
    """The reason, in one sentence, for which two models cannot be compared on a split: the challenger is refused."""


def connect_store(project: Path) -> None:
    """Connect to the MLflow store of the project; raises UserError where it has none yet."""
    uri = existing_store(project)
    if uri is None:
        raise UserError(f"the MLflow store does not exist: {NO_STORE}")
    connect(uri)


def choose_name(dataset: str | None) -> str:
    """Return the registered model of a data set, by default the only one; raises UserError where that is unclear."""
    names = find_names()
    if not names:
        raise UserError(f"MLflow has no registered model: {NO_STORE}")
    if dataset is None and len(names) == 1:
        return names[0]
    if dataset in names:
        return str(dataset)
    found = "it is missing, and there are several" if dataset is None else f"found {dataset!r}"
    raise UserError(f"--dataset: {found}; allowed: {', '.join(names)}; name one of these")


def find_challenger(project: Path, text: str | None, *, dataset: str | None) -> Version:
    """Return the version that a text names, by default the newest one that is not the champion.

    `text` is the number of a version of the data set `dataset`, or any name of a model. Of the parent of several seeds,
    the version is that of the model that is best on validation. Raises UserError where there is none.
    """
    if text and not text.isdecimal():
        return _registered(best_model(find_models(project, text, registered=dataset)), text=text, dataset=dataset)
    name = choose_name(dataset)
    versions = find_versions(name)
    wanted = [one for one in versions if (one.number == text if text else CHAMPION not in one.aliases)]
    if wanted:
        return wanted[0]
    if text:
        numbers = ", ".join(one.number for one in versions)
        raise UserError(f"CHALLENGER: {name} has no version {text}; allowed: {numbers}; name one of these")
    if versions:  # only the champion: the decision says that nothing changes
        return versions[0]
    raise UserError(f"{name} has no versions: {NO_STORE}")


def _registered(model: Model, *, text: str, dataset: str | None) -> Version:
    """Return the version of a model; raises UserError where it is not registered."""
    names = [choose_name(dataset)] if dataset else find_names()
    for name in names:
        for version in versions_of_model(name, model.model_md5):
            if version.test_md5 == model.test_md5:
                return version
    if model.params.get("evaluate.checkpoint") == "last":
        raise UserError(
            f"CHALLENGER: {text} was evaluated with evaluate.checkpoint: last, and such a model is not registered; "
            f"allowed: best; {EVALUATE_BEST}"
        )
    raise UserError(
        f"CHALLENGER: {text} is not registered in MLflow ({', '.join(names) or 'which has no registered model'}); "
        "allowed: an evaluated model; `dvc exp apply` it, and run `dvc repro --force evaluate`"
    )


def model_of(project: Path, version: Version) -> Model:
    """Return the model of a version, with its files in DVC's cache."""
    return find_models(project, version.uri).models[0]


def known_commit(project: Path, version: Version) -> str | None:
    """Return the git commit with the `dvc.lock` of a version, or None where it is unknown here."""
    try:
        return champion_commit(project, model_md5=version.model_md5)
    except UserError:
        return None


def check_weights(model: Model) -> None:
    """Raise NotComparableError where the predictions of a model are not those of its registered weights."""
    if model.predictions.weights_md5 not in (None, model.model_md5):
        raise NotComparableError(
            f"{model.label}: its predictions are of other weights than the registered ones, {BEST_WEIGHTS} "
            f"(evaluate.checkpoint: {model.params.get('evaluate.checkpoint', UNKNOWN)}); allowed: best; {EVALUATE_BEST}"
        )


def describe_differences(challenger: Model, champion: Model) -> list[str]:
    """Return the parameters of evaluation that change predictions and that the models differ in, with both values."""
    names = [f"evaluate.{field}" for field in EVALUATION]
    values = [(name, challenger.params.get(name, UNKNOWN), champion.params.get(name, UNKNOWN)) for name in names]
    return [f"{name} is {own}, that of the champion {other}" for name, own, other in values if own != other]


def identify_predictions(challenger: Model, champion: Candidate) -> str:
    """Return an MD5 of what two models predict for test images, and of the images on which they are not compared."""
    parts = []
    for each in (candidate(challenger), champion):
        known, unfit = each.predictions, each.leaked | each.trained_on
        is_unfit = [one in unfit for one in known.content_hashes]
        labels = known.actual.tolist(), known.predicted.tolist()
        parts.append([list(known.class_names), list(known.content_hashes), is_unfit, *labels])
    return bytes_md5(json.dumps(parts).encode())


def describe(model: Model, *, params: Params) -> Challenger:
    """Return the figures of a challenger that need no champion, with its size and its time for one image.

    The time is measured only where the policy limits it.
    """
    is_limited = params.promote.max_latency_milliseconds is not None
    return describe_challenger(
        candidate(model),
        model_md5=model.model_md5,
        megabytes=file_of(model, str(TRAIN / BEST_WEIGHTS)).stat().st_size / 1e6,
        latency_milliseconds=measure_latency(model, params=params.evaluate) if is_limited else None,
    )


def measure_latency(model: Model, *, params: EvaluateParams) -> float:
    """Return the median time in milliseconds in which the model predicts a single image on the CPU.

    The image has random pixels, since the time does not depend on them. `params` has the threads and kernels.
    """
    with _linked(model, TRAIN / "model.json", TRAIN / BEST_WEIGHTS) as folder:
        loaded = load_to_evaluate(folder, params=params.model_copy(update={"checkpoint": "best"}))
    config = loaded.config
    shape = (1, config.image_size, config.image_size, config.channels)
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    times = []
    for _ in range(WARM_UP + TIMED):
        start = time.perf_counter()
        class_probabilities(loaded.classifier, image, config=config)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[WARM_UP:])


def champion_on(champion: Model, challenger: Model, split: Split, *, params: Params) -> Candidate:
    """Return the champion's predictions for the challenger's images of a split.

    They are those of its own evaluation where the images are the same, else the weights predict the challenger's
    arrays. Raises NotComparableError where the champion takes other images or knows other classes.
    """
    own, other = candidate(champion, split), candidate(challenger, split)
    if split_md5(own.predictions) == split_md5(other.predictions):
        return own
    values = {field: champion.params.get(f"evaluate.{field}", getattr(params.evaluate, field)) for field in EVALUATION}
    evaluate = EvaluateParams.model_validate({**params.evaluate.model_dump(), **values})
    weights = TRAIN / f"{evaluate.checkpoint}.safetensors"
    arrays = [NORMALIZE / f"{split}_{part}" for part in ("images.npy", "labels.npy", "files.parquet")]
    with (
        _linked(champion, TRAIN / "model.json", weights) as model,
        _linked(challenger, NORMALIZE / "dataset.json", *arrays) as data,
    ):
        _check_fit(load_config(model), DatasetInfo.read(data), labels=(champion.label, challenger.label))
        predictions, _ = predict_split(load_to_evaluate(model, params=evaluate), split, data=data)
    return replace(own, predictions=predictions, leaked=frozenset())


def _check_fit(config: ModelConfig, info: DatasetInfo, *, labels: tuple[str, str]) -> None:
    """Raise NotComparableError where a model was not made for the images or the classes of a data set."""
    if found := find_mismatch(config, info):
        raise NotComparableError(
            f"the test split changed, and the champion ({labels[0]}) cannot predict its images: its {found.field} is "
            f"{found.of_model}, that of {labels[1]} {found.of_data}"
        )


def pair_on(challenger: Model, champion: Candidate, split: Split) -> Pairing:
    """Return the predictions of both models for the images of a split on which both can be compared.

    Raises NotComparableError where there are none.
    """
    try:
        return pair(candidate(challenger, split), champion)
    except UserError as error:
        raise NotComparableError(str(error)) from None


def read_test_split(challenger: Model, champion: Candidate) -> TestSplit:
    """Return how many test images both can be compared on, and the champion's errors there.

    What the challenger predicts for them is not used.
    """
    other = candidate(challenger)
    leaked, trained_on = champion.leaked | other.leaked, champion.trained_on | other.trained_on
    return describe_test_split(replace(champion, leaked=leaked, trained_on=trained_on))


@contextmanager
def _linked(model: Model, *names: Path) -> Iterator[Path]:
    """Yield a temporary folder with links to files of a model in DVC's cache, all of one folder, by their names."""
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            (Path(folder) / name.name).symlink_to(file_of(model, str(name)).resolve())
        yield Path(folder)
