"""The committed test accuracy as the baseline of a flow run, if it is of the same test images."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts import EVALUATE, NORMALIZE
from pipeline.core.errors import UserError
from pipeline.core.git import read_committed
from pipeline.core.yaml import parse_yaml

METRICS_FILE = EVALUATE / "metrics.json"
LOCK = "dvc.lock"
TEST_ARRAYS = {str(NORMALIZE / f"test_{name}.npy") for name in ("images", "labels")}


@dataclass(frozen=True)
class Baseline:
    """The committed test accuracy on the same test images, as a fraction with its 95% interval."""

    accuracy: float
    low: float
    high: float

    def compare(self, metrics: Mapping[str, Any]) -> str:
        """Return the difference of the accuracy in `metrics` to this one in percentage points, with its certainty."""
        points = 100 * (metrics["accuracy"] - self.accuracy)
        committed = f"{self.accuracy:.2%} is committed, on the same test images"
        if points == 0:
            return f"the same: {committed}"
        overlap = metrics["accuracy_low"] <= self.high and self.low <= metrics["accuracy_high"]
        meaning = "overlap, so this may be chance" if overlap else "do not overlap"
        return f"{points:+.2f} points: {committed}; the 95% intervals {meaning}"


def read_baseline(folder: Path) -> Baseline | None:
    """Return the committed test accuracy, or None where there is none on the test images of the files in `folder`.

    The test images are the same if the committed dvc.lock and that of the folder have the same hashes of them.
    """
    try:
        lock, metrics = (read_committed(folder, "HEAD", name) or "{}" for name in (LOCK, str(METRICS_FILE)))
        values = json.loads(metrics)
        baseline = Baseline(*(float(values[f"accuracy{end}"]) for end in ("", "_low", "_high")))
        committed, ours = _test_split(lock), _test_split((folder / LOCK).read_text(encoding="utf-8"))
    except (UserError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return baseline if committed == ours and committed.keys() == TEST_ARRAYS else None


def _test_split(lock: str) -> dict[str, str]:
    """Return the MD5 of each array of the test split that, by the text of a dvc.lock, `evaluate` has used."""
    deps = parse_yaml(lock, origin=LOCK)["stages"]["evaluate"]["deps"]
    return {dep["path"]: dep["md5"] for dep in deps if dep["path"] in TEST_ARRAYS}
