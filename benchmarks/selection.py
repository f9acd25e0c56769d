"""Compare rules that select an epoch by test accuracy, on the digits and on small data sets of a user's images.

`python -m benchmarks.selection [SEEDS] [--images FOLDER]` trains with seeds 0, 1, …, measures the test split after each
epoch, and applies the rules of `train.selection` afterwards, without and with `train.early_stopping_epochs: 5`. The
rule "earliest", which an earlier version had, selects the first epoch of the highest accuracy. The user's images are
the first few of some classes of CIFAR-10, with the recipe my_images and LeNet at 32 pixels; the seed also draws their
splits.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cifar10 import add_images, prepare_apart
from benchmarks.recipe import accuracy_on, load
from benchmarks.setting import options, scratch
from benchmarks.table import header, mean_and_deviation, table
from benchmarks.ways import CIFAR10_IMAGES
from pipeline.core.errors import report_errors
from pipeline.download import download
from pipeline.normalize import normalize
from pipeline.params import Params, Selection, TrainParams, check_params
from pipeline.recipes import compose
from pipeline.training.loop import train
from pipeline.training.selection import epochs_since_best, select_epoch
from pipeline.training.state import Epoch

PATIENCE = 5  # train.early_stopping_epochs
TEST_IMAGES_PER_CLASS = 200  # of the user's images
HEADING = [
    "data (validation images)",
    "selected epoch",
    "test accuracy",
    "gain over the last epoch (points)",
    "worst seed",
]
# classes, and training images of each
USER_DATA = {"10 classes of 60": (10, 60), "3 classes of 50": (3, 50), "2 classes of 30": (2, 30)}
USER_DATA_OVERRIDES = {
    "normalize.image_size": 32,
    "train.model": "lenet",
    "train.weights": None,
    "train.freeze": "none",
    "train.input_size": None,
    "train.flip": True,
    "train.learning_rate": 0.001,
    "train.epochs": 40,
    "train.batch_size": 16,
    "train.crop_padding": 2,
    "train.cpu_threads": 1,
}


@dataclass(frozen=True)
class Run:
    """A training: its parameters and epochs, the test accuracy after each, and the size of the validation split."""

    params: TrainParams
    history: list[Epoch]
    test_accuracies: list[float]
    num_images: int


Rule = Callable[[Run], int]  # returns the number of the selected epoch


def training_rule(selection: Selection, *, patience: int | None = None) -> Rule:
    """Return the rule of the training loop, which may stop early after `patience` epochs."""

    def rule(run: Run) -> int:
        """Return the epoch that the training would have selected if it had stopped early."""
        params = run.params.model_copy(update={"selection": selection})
        options: dict[str, Any] = {"params": params, "num_images": run.num_images}
        ends = range(1, len(run.history) + 1)
        stops = (end for end in ends if patience and epochs_since_best(run.history[:end], **options) >= patience)
        return select_epoch(run.history[: next(stops, len(run.history))], **options).epoch

    return rule


def earliest(run: Run) -> int:
    """Return the first epoch of the highest validation accuracy."""
    accuracies = [epoch.validation_accuracy for epoch in run.history]
    return accuracies.index(max(accuracies)) + 1


RULES: Mapping[str, Rule] = {
    "earliest": earliest,
    "best": training_rule("best"),
    "latest_equivalent": training_rule("latest_equivalent"),
    f"best, stopped after {PATIENCE}": training_rule("best", patience=PATIENCE),
    f"latest_equivalent, stopped after {PATIENCE}": training_rule("latest_equivalent", patience=PATIENCE),
    "last": lambda run: len(run.history),
}


def train_and_test(params: Params, folder: Path) -> Run:
    """Download, normalize, train, and evaluate after each epoch; `folder` may hold files of another seed."""
    download(params.download, folder=folder / "download")
    normalize(folder / "download", folder / "normalize", params=params.normalize)
    classifier, splits = load(params.train, folder / "normalize")
    history: list[Epoch] = []
    accuracies: list[float] = []

    def on_epoch(epoch: Epoch, _speed: float) -> None:
        history.append(epoch)
        accuracies.append(accuracy_on(splits["test"], classifier))

    train(
        classifier,
        params=params.train.model_copy(update={"early_stopping_epochs": None}),
        train_split=splits["train"],
        validation_split=splits["validation"],
        on_epoch=on_epoch,
    )
    return Run(params.train, history, accuracies, len(splits["validation"]))


def link_images(folder: Path, *, classes: int, images: int) -> None:
    """Make a tree `<split>/<class>/` of links to the first images of the first classes."""
    for source in sorted(path for path in (CIFAR10_IMAGES / "train").iterdir() if path.is_dir())[:classes]:
        for split, number in (("train", images), ("test", TEST_IMAGES_PER_CLASS)):
            target = folder / split / source.name
            target.mkdir(parents=True)
            for path in sorted((CIFAR10_IMAGES / split / source.name).glob("*.jpg"))[:number]:
                (target / path.name).symlink_to(path.resolve())


def differences(runs: Sequence[Run], rule: Rule) -> list[float]:
    """Return for each seed the test accuracy of the selected epoch minus that of the last epoch."""
    return [run.test_accuracies[rule(run) - 1] - run.test_accuracies[-1] for run in runs]


def rows_by_rule(name: str, runs: Sequence[Run]) -> list[list[str]]:
    """Return a row for each rule, with its accuracy over all seeds."""
    rows = []
    for label, rule in RULES.items():
        accuracies, gains = [run.test_accuracies[rule(run) - 1] for run in runs], differences(runs, rule)
        mean, worst = (f"{100 * value:+.2f}" for value in (statistics.mean(gains), min(gains)))
        size = f"{name} ({runs[0].num_images})"
        rows.append([size, label, mean_and_deviation(accuracies, ".2%"), mean, worst])
    return rows


def rows_by_seed(runs: Sequence[Run]) -> list[list[str]]:
    """Return a row for each seed: selected epoch and test accuracy of each rule that does not stop early."""
    rules = {label: rule for label, rule in RULES.items() if "stopped" not in label}
    rows = [["seed", *rules]]
    for seed, run in enumerate(runs):
        rows.append([str(seed), *(f"{rule(run)}: {run.test_accuracies[rule(run) - 1]:.2%}" for rule in rules.values())])
    return rows


def main() -> None:
    """Train with each seed, and print the tables."""
    parser = options("selection", __doc__, repeats="SEEDS", default=5)
    add_images(parser)
    arguments = parser.parse_args()
    prepare_apart(arguments.images)
    seeds = range(arguments.repeats)
    print(header(seeds=f"0 to {seeds[-1]}"))
    rows: list[list[str]] = []
    with scratch() as folder:
        for name, (classes, images) in USER_DATA.items():
            tree = Path(folder) / name
            link_images(tree, classes=classes, images=images)
            overrides = USER_DATA_OVERRIDES | {"download.folder": str(tree)}
            runs = []
            for seed in seeds:
                values = compose("my_images", {**overrides, "normalize.seed": seed, "train.seed": seed})
                runs.append(train_and_test(check_params(values, origin=name), Path(folder) / "user"))
            rows += rows_by_rule(name, runs)
        digits = []
        for seed in seeds:
            params = check_params(compose("digits", {"train.seed": seed}), origin="digits")
            digits.append(train_and_test(params, Path(folder) / "digits"))
    print(table([HEADING, *rows_by_rule("digits", digits), *rows]))
    print(f"\ndigits, selected epoch and its test accuracy:\n\n{table(rows_by_seed(digits))}")


if __name__ == "__main__":
    with report_errors():
        main()
