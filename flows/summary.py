"""What a flow run reports at its end: a table for the terminal, and the artifact that Prefect shows."""

import csv
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.dvc_protocol import Outcome
from pipeline.artifacts import EVALUATE, TRAIN, read_json
from pipeline.core.errors import redact_url

NEXT_RECIPE = "cifar10_lenet"


@dataclass(frozen=True)
class Step:
    """One stage: what DVC did for it, in how many seconds."""

    stage: str
    outcome: Outcome
    seconds: float

    def __str__(self) -> str:
        return f"{self.stage} {self.seconds:.1f} s" if self.outcome == "ran" else f"{self.stage} cached"


@dataclass(frozen=True)
class Summary:
    """The result of a flow run; `recalls` is the share of a class's test images classified as it, by class."""

    experiment: str
    steps: Sequence[Step]
    seconds: float
    metrics: Mapping[str, float]
    recalls: Mapping[str, float]
    mlflow_run_id: str | None


def read_summary(
    folder: Path, *, experiment: str, steps: Sequence[Step], seconds: float, mlflow_run_id: str | None
) -> Summary:
    """Read what `evaluate` wrote in `folder`, a checkout or a clone."""
    metrics = read_json(folder / EVALUATE / "metrics.json")
    with (folder / EVALUATE / "per_class.csv").open(encoding="utf-8", newline="") as file:
        recalls = {row["class"]: float(row["recall"]) for row in csv.DictReader(file)}
    return Summary(experiment, steps, seconds, metrics, recalls, mlflow_run_id)


def as_text(summary: Summary, *, recipe: str) -> str:
    """The table at the end of `make run`, and what to try next."""
    rows = [*_results(summary), ("steps", ", ".join(map(str, summary.steps))), ("took", f"{summary.seconds:.1f} s")]
    rows += [("MLflow run", summary.mlflow_run_id + _of_earlier(summary.steps))] if summary.mlflow_run_id else []
    rows += [("experiment", f"{summary.experiment} (this checkout is as it was; the first command brings the files)")]
    commands = [
        (f".venv/bin/dvc exp apply {summary.experiment}", "bring model and metrics into this checkout: artifacts/"),
        ("make ui", "see the curves, compare runs"),
        (f"make run RECIPE={NEXT_RECIPE}", "the tutorial's network on CIFAR-10 (170 MB to fetch)")
        if recipe == "digits"
        else ("make experiments", "the experiments since the last commit, with metrics and parameters"),
    ]
    return "\n".join(["", *_aligned(rows), "", "Next:", *(f"  {line}" for line in _aligned(commands))])


def as_markdown(
    summary: Summary, *, changes: Mapping[str, tuple[Any, Any]], flow_run_id: str, mlflow_link: str | None = None
) -> str:
    """The Prefect artifact: results, all metrics, changed parameters, and where to go from here."""
    changed = [(name, f"`{old}`", f"`{new}`") for name, (old, new) in changes.items()]
    parts = [
        f"# {summary.experiment}",
        _table(["result", "value"], _results(summary)),
        "## Metrics",
        _table(["metric", "value"], [(name, f"{value:.6g}") for name, value in summary.metrics.items()]),
        "## Parameters that differ from the committed ones",
        _table(["parameter", "committed", "here"], changed) if changed else "none",
        "## Where it is",
        _table(["what", "name"], _places(summary, flow_run_id, mlflow_link)),
    ]
    return "\n\n".join(parts) + "\n"


def changed_params(committed: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`{"train.epochs": (20, 3)}`: each parameter that is not as committed."""
    pairs = {
        f"{section}.{field}": (committed.get(section, {}).get(field), value)
        for section, fields in params.items()
        for field, value in fields.items()
    }
    return {name: (_without_secrets(old), _without_secrets(new)) for name, (old, new) in pairs.items() if old != new}


def _without_secrets(value: Any) -> Any:
    """Remove passwords and tokens from addresses; other values stay."""
    if isinstance(value, list):
        return [_without_secrets(part) for part in value]
    return redact_url(value) if isinstance(value, str) else value


def _results(summary: Summary) -> list[tuple[str, str]]:
    metrics, recalls = summary.metrics, summary.recalls
    worst, best = min(recalls, key=recalls.__getitem__), max(recalls, key=recalls.__getitem__)
    range_of_recalls = f"{recalls[worst]:.2%} (class {worst}) to {recalls[best]:.2%} (class {best})"
    if recalls[worst] == recalls[best]:
        range_of_recalls = f"{recalls[worst]:.2%} in every class"
    interval = f"(95% interval {metrics['accuracy_low']:.2%} to {metrics['accuracy_high']:.2%})"
    return [
        ("test accuracy", f"{metrics['accuracy']:.2%} {interval}"),
        ("recall", range_of_recalls),
        ("test loss", f"{metrics['loss']:.4f}"),
    ]


def _of_earlier(steps: Sequence[Step]) -> str:
    cached = any(step.stage == TRAIN.name and step.outcome != "ran" for step in steps)
    return " (an earlier one, which made this model)" if cached else ""


def _places(summary: Summary, flow_run_id: str, mlflow_link: str | None) -> list[tuple[str, str]]:
    return [
        ("DVC experiment", f"`dvc exp apply {summary.experiment}`"),
        ("MLflow run", f"[{summary.mlflow_run_id}]({mlflow_link})" if mlflow_link else "none made this model"),
        ("Prefect flow run", f"`{flow_run_id}`"),
        ("all that belongs to it", f"`python -m flows.trace {summary.experiment}`"),
        ("steps", ", ".join(map(str, summary.steps))),
    ]


def _aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(html.escape(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
