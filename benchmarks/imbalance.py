"""Measure what balancing the classes does to the rarest of four unequal classes, and what it costs the others.

`python -m benchmarks.imbalance [SEEDS] [--images FOLDER]` trains LeNet on 2,000 airplanes, 400 automobiles, 100 birds
and 20 cats of CIFAR-10: without balancing, with `train.class_weights: balanced`, and with `train.sampler: balanced`.
Seed 0, 1, … draws the images, their splits and the first weights, and is the same for the three ways. A fifth of the
images is the validation split, 4 cats among them, which selects an epoch by `train.select_by: accuracy` or `macro_f1`.
The test split has 1,000 images of each class. A p-value is that of the paired t-test against no balancing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cifar10 import add_images, prepare_apart
from benchmarks.paired import p_value
from benchmarks.recipe import BATCH_SIZE, load
from benchmarks.setting import options, scratch
from benchmarks.table import header, mean_and_deviation, table
from benchmarks.ways import CIFAR10_IMAGES, RECIPE
from pipeline.arrays import Split
from pipeline.core.errors import report_errors
from pipeline.download import download
from pipeline.evaluation.logits import predictions_of
from pipeline.evaluation.metrics import evaluate
from pipeline.models.build import Classifier
from pipeline.models.inference import logits_of
from pipeline.normalize import normalize
from pipeline.params import Metric, Params, TrainParams, check_params
from pipeline.recipes import compose
from pipeline.training.loop import train
from pipeline.training.selection import select_epoch
from pipeline.training.state import copy_weights

CLASSES = {"airplane": 2000, "automobile": 400, "bird": 100, "cat": 20}  # images of each for training and validation
RAREST = "cat"
WAYS: Mapping[str, Mapping[str, str]] = {
    "no balancing": {},
    "class_weights": {"class_weights": "balanced"},
    "sampler": {"sampler": "balanced"},
}
SELECT_BY: tuple[Metric, ...] = ("accuracy", "macro_f1")
OVERRIDES = {
    "download.dataset": "imagefolder",
    "normalize.validation_fraction": 0.2,
    "train.epochs": 40,
    "train.batch_size": 32,
    # an image of the rarest class has 100 times the weight of one of the largest: without this, some trainings diverge
    "train.gradient_clip_norm": 1.0,
    "train.log_every_steps": 1000,
    "train.cpu_threads": 1,
}


@dataclass(frozen=True)
class Result:
    """The figures of the selected epoch on the test split; `recalls` are by class."""

    recalls: Mapping[str, float]
    accuracy: float
    macro_f1: float


Results = Mapping[tuple[str, Metric], Sequence[Result]]  # by way and `train.select_by`: a result for each seed


def link_images(folder: Path, *, seed: int) -> None:
    """Make a tree `<split>/<class>/` of links to images that the seed draws, and to all test images of the classes."""
    random = np.random.default_rng(seed)
    for name, number in CLASSES.items():
        paths = {split: sorted((CIFAR10_IMAGES / split / name).glob("*.jpg")) for split in ("train", "test")}
        drawn = [paths["train"][index] for index in random.permutation(len(paths["train"]))[:number]]
        for split, chosen in (("train", drawn), ("test", paths["test"])):
            target = folder / split / name
            target.mkdir(parents=True)
            for path in chosen:
                (target / path.name).symlink_to(path.resolve())


def normalized(folder: Path, *, seed: int) -> Params:
    """Prepare the images of a seed in `folder / "normalize"`; return the parameters without balancing."""
    link_images(folder / "images", seed=seed)
    changes = {"download.folder": str(folder / "images"), "normalize.seed": seed, "train.seed": seed}
    params = check_params(compose(RECIPE, OVERRIDES | changes), origin="imbalance")
    download(params.download, folder=folder / "download")
    normalize(folder / "download", folder / "normalize", params=params.normalize)
    return params


def train_and_test(params: TrainParams, folder: Path) -> dict[Metric, Result]:
    """Train once; return the result of the epoch that each `train.select_by` selects."""
    classifier, splits = load(params, folder)
    weights = []
    trained = train(
        classifier,
        params=params,
        train_split=splits["train"],
        validation_split=splits["validation"],
        on_epoch=lambda _epoch, _speed: weights.append(copy_weights(classifier)),
    )
    found = {}
    for select_by in SELECT_BY:
        chosen = params.model_copy(update={"select_by": select_by})
        selected = select_epoch(trained.history, params=chosen, num_images=len(splits["validation"]))
        classifier.load_state_dict(weights[selected.epoch - 1])
        found[select_by] = test(classifier, splits["test"])
    return found


def test(classifier: Classifier, split: Split) -> Result:
    """Evaluate a network on the test split."""
    logits = logits_of(classifier, split, batch_size=BATCH_SIZE)
    names = tuple(CLASSES)
    predictions = predictions_of(logits, split.labels.numpy(), class_names=names)
    found = evaluate(predictions, top_k=len(names), duplicates=())
    recalls = {row["class"]: row["recall"] for row in found.per_class}
    return Result(recalls, found.metrics["accuracy"], found.metrics["macro_f1"])


def measure(seeds: Sequence[int]) -> Results:
    """Train each way with each seed, and return the results."""
    found: dict[tuple[str, Metric], list[Result]] = {(way, by): [] for way in WAYS for by in SELECT_BY}
    for seed in seeds:
        with scratch() as name:
            folder = Path(name)
            params = normalized(folder, seed=seed).train
            for way, changes in WAYS.items():
                results = train_and_test(params.model_copy(update=changes), folder / "normalize")
                for select_by, result in results.items():
                    found[way, select_by].append(result)
    return found


def rows(results: Results) -> list[list[str]]:
    """Return the table of the results, with its heading."""
    others = [name for name in CLASSES if name != RAREST]
    heading = ["way", "select_by", f"recall of {RAREST} ({CLASSES[RAREST]})", "gain (points)", "p"]
    heading += [f"recall of {name} ({CLASSES[name]})" for name in others]
    return [[*heading, "accuracy", "macro F1"], *(row(results, *key, others=others) for key in results)]


def row(results: Results, way: str, select_by: Metric, *, others: Sequence[str]) -> list[str]:
    """Return the row of a way: means and standard deviations over the seeds, and the test against no balancing."""
    found, base = results[way, select_by], results[next(iter(WAYS)), select_by]

    def cell(values: Any) -> str:
        return mean_and_deviation(list(values), ".1%")

    gains = [one.recalls[RAREST] - other.recalls[RAREST] for one, other in zip(found, base, strict=True)]
    compared = [f"{100 * sum(gains) / len(gains):+.1f}", f"{p_value(gains):.3f}"] if found is not base else ["", ""]
    recalls = [cell(result.recalls[name] for result in found) for name in (RAREST, *others)]
    overall = [cell(result.accuracy for result in found), cell(result.macro_f1 for result in found)]
    return [way, select_by, recalls[0], *compared, *recalls[1:], *overall]


def main() -> None:
    """Measure with each seed, and print the table."""
    parser = options("imbalance", __doc__, repeats="SEEDS", default=5)
    add_images(parser)
    arguments = parser.parse_args()
    if arguments.repeats < 2:
        parser.error("SEEDS: found 1; allowed: from 2, since one seed has no standard deviation")
    prepare_apart(arguments.images)
    seeds = range(arguments.repeats)
    print(header(seeds=f"0 to {seeds[-1]}"))
    print(table(rows(measure(seeds))))


if __name__ == "__main__":
    with report_errors():
        main()
