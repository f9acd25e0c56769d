"""Compare the accuracy with that of the committed results, which are the baseline."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts import EVALUATE, NORMALIZE
from pipeline.core.errors import UserError
from pipeline.core.git import git, read_committed
from pipeline.core.yaml import parse_yaml
from pipeline.evaluation.intervals import wilson_interval

TEST_FILES = ("test_images.npy", "test_labels.npy")
METRICS_FILE = EVALUATE / "metrics.json"


@dataclass(frozen=True)
class Comparison:
    """The difference of two accuracies on the same number of images, with its 95 % interval."""

    commit: str
    accuracy: float  # of the baseline
    difference: float  # accuracy of the model minus that of the baseline
    difference_low: float
    difference_high: float

    @property
    def is_significant(self) -> bool:
        """Return whether the interval of the difference leaves out 0: only then one of the two is better."""
        return not self.difference_low <= 0 <= self.difference_high


@dataclass(frozen=True)
class Baseline:
    """The comparison with the committed results, or the reason why there is none, as the end of a sentence.

    There is none where the committed results are those of this model, `is_this_model`.
    """

    comparison: Comparison | None = None
    reason: str = ""
    is_this_model: bool = False


def find_baseline(metrics: Mapping[str, Any], *, data_md5: Mapping[str, str], folder: Path = Path()) -> Baseline:
    """Compare `metrics` with the committed `metrics.json`, if that is of another model and the same test images.

    `data_md5` has the MD5 of the arrays by name, as in `dataset.json`.
    """
    try:
        commit = git(folder, "rev-parse", "--short=10", "HEAD")
        text = read_committed(folder, "HEAD", str(METRICS_FILE))
        lock = read_committed(folder, "HEAD", "dvc.lock")
    except UserError:
        return Baseline(reason="git has no commit here")
    if text is None or lock is None:
        return Baseline(reason=f"the commit {commit} has no results")
    try:
        committed = json.loads(text)
        same_data = _committed_md5(lock) == {name: data_md5.get(name) for name in TEST_FILES}
        accuracy, number = float(committed["accuracy"]), int(committed["test_images"])
    except (UserError, ValueError, KeyError, TypeError, AttributeError):
        return Baseline(reason=f"the results in the commit {commit} cannot be read")
    if not same_data:
        return Baseline(reason=f"the results in the commit {commit} are of other test images")
    if all(committed.get(name) == metrics.get(name) for name in ("accuracy", "loss")):
        return Baseline(reason=f"these are the results in the commit {commit}", is_this_model=True)
    return Baseline(compare(metrics, accuracy=accuracy, number=number, commit=commit))


def _committed_md5(lock: str) -> dict[str, str]:
    """Return the MD5 of the test split that `dvc.lock` has as dependencies of `evaluate`, by name."""
    stage = parse_yaml(lock, origin="dvc.lock")["stages"]["evaluate"]
    paths = {str(NORMALIZE / name): name for name in TEST_FILES}
    return {paths[each["path"]]: each["md5"] for each in stage["deps"] if each["path"] in paths}


def compare(metrics: Mapping[str, Any], *, accuracy: float, number: int, commit: str) -> Comparison:
    """Compare an accuracy with that of a baseline on `number` images.

    The interval of the difference is that of independent proportions (Newcombe 1998, method 10). The images are the
    same, and models agree on most of them, so that the true interval is narrower: the statement is cautious.
    """
    low, high = wilson_interval(round(accuracy * number), number)
    own, own_low, own_high = (metrics[name] for name in ("accuracy", "accuracy_low", "accuracy_high"))
    difference = own - accuracy
    return Comparison(
        commit,
        accuracy,
        difference,
        difference - math.hypot(own - own_low, high - accuracy),
        difference + math.hypot(own_high - own, accuracy - low),
    )
