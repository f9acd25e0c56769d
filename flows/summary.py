"""The result of a flow run, as read from its files: for the terminal (`summary_text`) and Prefect (`summary_page`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.dvc_protocol import Outcome
from pipeline.artifacts import EVALUATE, HISTORY, NORMALIZE, SELECTED_COLUMN, TRAIN, read_csv, read_json
from pipeline.core.errors import escape_control_chars
from pipeline.params import PARAMS_FILE, Params, load_params
from pipeline.reporting.baseline import METRICS_FILE, Baseline, find_baseline
from pipeline.tracking.run_title import RunSetup


@dataclass(frozen=True)
class Step:
    """The result of one stage: its outcome and its duration in seconds."""

    stage: str
    outcome: Outcome
    seconds: float

    def __str__(self) -> str:
        return f"{self.stage} {self.seconds:.1f} s" if self.outcome == "ran" else f"{self.stage} cached"


@dataclass(frozen=True)
class ClassResult:
    """The result for one class on the test split.

    Precision and recall are fractions. They are None where they are undefined: for a class that no image was predicted
    to be, or that has no test image.
    """

    name: str
    train_images: int
    test_images: int
    num_correct: int
    precision: float | None
    recall: float | None


@dataclass(frozen=True)
class Summary:
    """The result of a flow run, which took `seconds`; `params` are the parameters of the run.

    `validation_accuracy` is that of the epoch whose weights are selected, `selected_epoch`. `report` is the path of the
    report, or None where none was made.
    """

    experiment: str
    flow_run_id: str
    setup: RunSetup
    steps: Sequence[Step]
    seconds: float
    metrics: Mapping[str, Any]
    classes: Sequence[ClassResult]
    mlflow_run_id: str | None
    params: Params
    validation_accuracy: float
    selected_epoch: int
    baseline: Baseline
    report: Path | None

    @property
    def has_cached_model(self) -> bool:
        """Return whether an earlier run trained the model."""
        return any(step.stage == TRAIN.name and step.outcome != "ran" for step in self.steps)


def read_summary(
    folder: Path,
    *,
    experiment: str,
    flow_run_id: str,
    setup: RunSetup,
    steps: Sequence[Step],
    seconds: float,
    mlflow_run_id: str | None,
    report: Path | None,
) -> Summary:
    """Return the summary with the metrics that `evaluate` wrote below `folder`, a checkout or a clone."""
    selected = next(row for row in read_csv(folder / TRAIN / HISTORY) if row[SELECTED_COLUMN])
    metrics, dataset = read_json(folder / METRICS_FILE), read_json(folder / NORMALIZE / "dataset.json")
    return Summary(
        experiment,
        flow_run_id,
        setup,
        steps,
        seconds,
        metrics=metrics,
        classes=_read_classes(folder, train_images=dataset["counts"]["train"]),
        mlflow_run_id=mlflow_run_id,
        params=load_params(folder / PARAMS_FILE),
        validation_accuracy=float(selected["validation_accuracy"]),
        selected_epoch=int(selected["epoch"]),
        baseline=find_baseline(metrics, data_md5=dataset.get("md5", {}), folder=folder),
        report=report,
    )


def _read_classes(folder: Path, *, train_images: Mapping[str, int]) -> list[ClassResult]:
    """Return the result of each class."""
    classes = []
    for row in read_csv(folder / EVALUATE / "per_class.csv"):
        images, recall = int(row["images"]), _fraction(row["recall"])
        classes.append(
            ClassResult(
                row["class"],
                train_images=train_images[row["class"]],
                test_images=images,
                num_correct=int(row["num_correct"]),
                precision=_fraction(row["precision"]),
                recall=recall if images else None,
            )
        )
    return classes


def _fraction(cell: str) -> float | None:
    """Return the number in a cell of a table, or None where the cell is empty."""
    return float(cell) if cell else None


def describe_results(summary: Summary) -> list[tuple[str, str]]:
    """Return name and text of the results: test accuracy (and of which weights), worst class, validation accuracy."""
    metrics = summary.metrics
    interval = f"(95% interval {metrics['accuracy_low']:.2%} to {metrics['accuracy_high']:.2%})"
    validation = f"{summary.validation_accuracy:.2%} in epoch {summary.selected_epoch}, whose weights are selected"
    of = ", of the weights of the last epoch" if summary.params.evaluate.checkpoint == "last" else ""
    return [
        ("test accuracy", f"{metrics['accuracy']:.2%} {interval}{of}"),
        ("worst class", _describe_worst(summary.classes)),
        ("validation", validation),
    ]


def _describe_worst(classes: Sequence[ClassResult]) -> str:
    """Return the class of the lowest recall, and how many of its images were recognized."""
    worst = min((each for each in classes if each.recall is not None), key=lambda each: each.recall or 0, default=None)
    if worst is None:
        return "unknown: no class has test images"
    name = escape_control_chars(worst.name)
    return f"class '{name}': recall {worst.recall:.2%}, {worst.num_correct:,} of {worst.test_images:,} images"


def describe_baseline(summary: Summary) -> str:
    """Return the difference to the committed test accuracy in percentage points, or why there is none."""
    baseline, found = summary.baseline, summary.baseline.comparison
    if found is None:
        remedy = "" if baseline.is_this_model else "; apply this experiment and commit to have one"
        return f"none: {baseline.reason}{remedy}"
    low, high = found.difference_low, found.difference_high
    if found.is_significant:
        low, high = sorted((low, high), key=abs)
        interval = f"{100 * abs(low):.1f} to {_points(high, digits=1)}"
    else:
        interval = f"{_points(low, digits=1)} to {_points(high, digits=1)}: it may be chance"
    return (
        f"{_points(found.difference, digits=2)} the results committed with the project "
        f"({found.accuracy:.2%}; 95% interval of the difference {interval})"
    )


def _points(difference: float, *, digits: int) -> str:
    """Return a difference of two fractions in percentage points as text, such as `5.35 points below`."""
    return f"{100 * abs(difference):.{digits}f} points {'below' if difference < 0 else 'above'}"


def describe_time(summary: Summary) -> str:
    """Return the duration of the flow run and of its stages."""
    return f"{summary.seconds:.1f} s: {', '.join(map(str, summary.steps))}"
