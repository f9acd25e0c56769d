"""Measure the test accuracy of the recipe cifar10_lenet over several seeds: mean and standard deviation.

`python -m benchmarks.accuracy [SEEDS] [--images FOLDER]` trains with seeds 0, 1, … and evaluates the epoch that was
best on the validation split on the test split, once each, as the steps train and evaluate do. Data and splits are the
same for all seeds.
"""

import time

from benchmarks.cifar10 import add_images, prepare_apart
from benchmarks.recipe import accuracy_on, load
from benchmarks.setting import options
from benchmarks.table import header, mean_and_deviation, table
from benchmarks.ways import RECIPE, arrays
from pipeline.core.errors import report_errors
from pipeline.params import check_params, compose
from pipeline.training.loop import train


def train_and_evaluate(seed: int) -> tuple[float, float]:
    """Return the test accuracy and the seconds of the training."""
    params = check_params(compose(RECIPE, {"train.seed": seed}), origin=RECIPE).train
    classifier, splits = load(params, arrays())
    classifier.to(splits["train"].labels.device)
    start = time.perf_counter()
    trained = train(classifier, params=params, train_split=splits["train"], validation_split=splits["validation"])
    seconds = time.perf_counter() - start
    classifier.load_state_dict(trained.best)
    return accuracy_on(splits["test"], classifier), seconds


def main() -> None:
    """Train, evaluate and print."""
    parser = options("accuracy", __doc__, repeats="SEEDS", default=5)
    add_images(parser)
    arguments = parser.parse_args()
    prepare_apart(arguments.images)
    print(header(seeds=f"0 to {arguments.repeats - 1}"))
    found = [train_and_evaluate(seed) for seed in range(arguments.repeats)]
    rows = [["seed", "test accuracy", "training (s)"]]
    rows += [[str(seed), f"{accuracy:.2%}", f"{seconds:.0f}"] for seed, (accuracy, seconds) in enumerate(found)]
    rows += [["mean ± sd", mean_and_deviation([accuracy for accuracy, _ in found], ".2%"), ""]]
    print(table(rows))


if __name__ == "__main__":
    with report_errors():
        main()
