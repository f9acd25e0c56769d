"""The summary of a flow run: a table for the terminal, and an artifact for Prefect's UI."""

import html
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.dvc_protocol import Outcome
from pipeline.artifacts import EVALUATE, HISTORY, NORMALIZE, SELECTED_COLUMN, TRAIN, read_csv, read_json
from pipeline.params import PARAMS_FILE, Params, load_params

SUGGESTED_RECIPE = "cifar10_lenet"
MAX_CLASSES_PRINTED = 20
UNEQUAL_CLASSES = 3.0  # train images of the largest class / those of the smallest one from which weights are suggested


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
    """The result for one class on the test split; precision and recall are fractions.

    The precision of a class that is never predicted is undefined: None.
    """

    name: str
    train_images: int
    test_images: int
    precision: float | None
    recall: float


@dataclass(frozen=True)
class Summary:
    """The result of a flow run, which took `seconds`; `params` are the parameters of the run.

    `validation_accuracy` is that of the epoch whose weights are selected, `selected_epoch`.
    """

    experiment: str
    steps: Sequence[Step]
    seconds: float
    metrics: Mapping[str, float]
    classes: Sequence[ClassResult]
    mlflow_run_id: str | None
    params: Params
    validation_accuracy: float
    selected_epoch: int


def read_summary(
    folder: Path, *, experiment: str, steps: Sequence[Step], seconds: float, mlflow_run_id: str | None
) -> Summary:
    """Return the summary with the metrics that `evaluate` wrote below `folder`, a checkout or a clone."""
    metrics = read_json(folder / EVALUATE / "metrics.json")
    train_images = read_json(folder / NORMALIZE / "dataset.json")["counts"]["train"]
    classes = [
        ClassResult(
            row["class"],
            train_images=train_images[row["class"]],
            test_images=int(row["images"]),
            precision=float(row["precision"]) if row["precision"] else None,
            recall=float(row["recall"]),  # each class has test images
        )
        for row in read_csv(folder / EVALUATE / "per_class.csv")
    ]
    selected = next(row for row in read_csv(folder / TRAIN / HISTORY) if row[SELECTED_COLUMN])
    return Summary(
        experiment,
        steps,
        seconds,
        metrics,
        classes,
        mlflow_run_id,
        params=load_params(folder / PARAMS_FILE),
        validation_accuracy=float(selected["validation_accuracy"]),
        selected_epoch=int(selected["epoch"]),
    )


def as_text(summary: Summary, *, recipe: str, images: str | None = None, overrides: Sequence[str] = ()) -> str:
    """Return the table at the end of `make run`, followed by suggested next commands.

    `images` is the folder of the user's own images, if the command named one, and `overrides` are its values of SET.
    """
    rows = [*_results(summary), ("steps", ", ".join(map(str, summary.steps))), ("took", f"{summary.seconds:.1f} s")]
    rows += [("MLflow run", summary.mlflow_run_id + _cached_model_hint(summary.steps))] if summary.mlflow_run_id else []
    rows += [("experiment", f"{summary.experiment} (your checkout is unchanged)")]
    commands = [
        (f".venv/bin/dvc exp apply {summary.experiment}", "copy the results into your checkout"),
        ("make ui", "open the curves, compare runs"),
    ]
    lines = ["", *_aligned(rows)]
    if recipe == "digits":
        commands.append((f"make run RECIPE={SUGGESTED_RECIPE}", "train on CIFAR-10 (downloads 170 MB)"))
    elif summary.params.download.dataset == "imagefolder":
        commands[1:1] = [(".venv/bin/python -m pipeline.predict photo.jpg", "then classify other images")]
        commands += _suggestions(summary, recipe=recipe, images=images, overrides=overrides)
        lines += ["", *_class_table(summary)]
    else:
        commands.append(("make experiments", "list the experiments since the last commit, with metrics and parameters"))
    return "\n".join([*lines, "", "Next:", *(f"  {line}" for line in _aligned(commands))])


def _class_table(summary: Summary) -> list[str]:
    """Return a table of the classes, those of the lowest recall first where there are many."""
    classes = summary.classes
    if more := max(0, len(classes) - MAX_CLASSES_PRINTED):
        classes = sorted(classes, key=lambda each: each.recall)[:MAX_CLASSES_PRINTED]
    width = max(len("class"), *(len(each.name) for each in classes))
    lines = [f"{'class':<{width}}  test images   recall  precision"]
    lines += [
        f"{each.name:<{width}}  {each.test_images:>11,}  {each.recall:>7.1%}  "
        + ("undefined" if each.precision is None else f"{each.precision:>9.1%}")
        for each in classes
    ]
    return (
        [*lines, f"{more} more classes, of higher recall, are in artifacts/evaluate/per_class.csv"] if more else lines
    )


def _suggestions(
    summary: Summary, *, recipe: str, images: str | None, overrides: Sequence[str]
) -> list[tuple[str, str]]:
    """Return what to try next on the user's own images, as commands and what they do."""

    def command(recipe: str, *more: str) -> str:
        values = " ".join([*overrides, *more])
        return f"make run RECIPE={recipe}{folder}" + (f' SET="{values}"' if values else "")

    folder = f" IMAGES={shlex.quote(images)}" if images else ""
    counts = [each.train_images for each in summary.classes]
    train = summary.params.train
    suggestions = []
    if recipe == "my_images":
        suggestions.append((command("my_images_finetune"), "train the whole network (a GPU helps): docs/own-images.md"))
    if (train.class_weights, train.sampler) == ("none", "shuffle") and max(counts) >= UNEQUAL_CLASSES * min(counts):
        suggestions.append((command(recipe, "train.class_weights=balanced"), "give rare classes more weight"))
    return suggestions


def as_markdown(
    summary: Summary, *, changes: Mapping[str, tuple[Any, Any]], flow_run_id: str, mlflow_link: str | None = None
) -> str:
    """Return the Prefect artifact: results, all metrics, changed parameters, and the names to find the run by."""
    changed = [(name, f"`{old}`", f"`{new}`") for name, (old, new) in changes.items()]
    parts = [
        f"# {summary.experiment}",
        _table(["result", "value"], _results(summary)),
        "## Metrics",
        _table(["metric", "value"], [(name, f"{value:.6g}") for name, value in summary.metrics.items()]),
        "## Parameters that differ from the committed ones",
        _table(["parameter", "committed", "this run"], changed) if changed else "none",
        "## Where to find it",
        _table(["what", "name or command"], _places(summary, flow_run_id, mlflow_link)),
    ]
    return "\n\n".join(parts) + "\n"


def _results(summary: Summary) -> list[tuple[str, str]]:
    """Return name and text of accuracy, recall and loss."""
    metrics = summary.metrics
    worst, best = (extreme(summary.classes, key=lambda each: each.recall) for extreme in (min, max))
    range_of_recalls = f"{worst.recall:.2%} (class {worst.name}) to {best.recall:.2%} (class {best.name})"
    if worst.recall == best.recall:
        range_of_recalls = f"{worst.recall:.2%} in every class"
    interval = f"(95% interval {metrics['accuracy_low']:.2%} to {metrics['accuracy_high']:.2%})"
    validation = f"{summary.validation_accuracy:.2%} in epoch {summary.selected_epoch}, whose weights are selected"
    return [
        ("validation", validation),
        ("test accuracy", f"{metrics['accuracy']:.2%} {interval}"),
        ("recall", range_of_recalls),
        ("test loss", f"{metrics['loss']:.4f}"),
    ]


def _cached_model_hint(steps: Sequence[Step]) -> str:
    """Return the hint that an earlier MLflow run made the model, if `train` was cached."""
    cached = any(step.stage == TRAIN.name and step.outcome != "ran" for step in steps)
    return " (an earlier one, which made this model)" if cached else ""


def _places(summary: Summary, flow_run_id: str, mlflow_link: str | None) -> list[tuple[str, str]]:
    """Return the names by which each tool has the run, and the command that lists all of them."""
    return [
        ("DVC experiment", f"`dvc exp apply {summary.experiment}`"),
        ("MLflow run", f"[{summary.mlflow_run_id}]({mlflow_link})" if mlflow_link else "none"),
        ("Prefect flow run", f"`{flow_run_id}`"),
        ("all ids and files", f"`python -m flows.trace {summary.experiment}`"),
        ("steps", ", ".join(map(str, summary.steps))),
    ]


def _aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Return the rows as lines with the second column aligned."""
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(html.escape(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
