"""The summary of a flow run on Prefect's pages: a Markdown artifact with the curves and the confusion matrix."""

import base64
import re
from collections.abc import Iterable
from pathlib import Path

from flows.progress_page import markdown_table
from flows.reports import REPORTS
from flows.summary import Summary, describe_baseline, describe_results, describe_time
from pipeline.artifacts import EVALUATE, TRAIN
from pipeline.core.errors import escape_control_chars
from pipeline.tracking.links import REPORT

CURVES = TRAIN / "curves.png"
CONFUSION_MATRIX = EVALUATE / "confusion_matrix.png"
MAX_PICTURE_BYTES = 750_000  # Prefect's database holds each picture of each flow run


def as_title(summary: Summary) -> str:
    """Return the run's title and its test accuracy, as Markdown."""
    return f"{escape(summary.setup.title)}: {summary.metrics['accuracy']:.2%}"


def as_markdown(summary: Summary, *, folder: Path, mlflow_link: str, report_link: str, flow_run_link: str) -> str:
    """Return the Prefect artifact: results, what differs, pictures from `folder`, places; links may be empty."""
    validation = f"validation accuracy {summary.validation_accuracy:.2%} in epoch {summary.selected_epoch}"
    curves = f"Learning curves: loss and accuracy by epoch; {validation}, whose weights are selected"
    results = [*describe_results(summary), ("baseline", describe_baseline(summary))]
    matrix = (
        f"Confusion matrix: test images by actual and predicted class; {dict(results)['test accuracy']} are correct"
    )
    num_images = sum(each.test_images for each in summary.classes)
    parts = [
        f"# {summary.metrics['accuracy']:.2%} of {num_images:,} test images are correct",
        _list(f"**{name}**: {escape(value)}" for name, value in results),
        "## What differs",
        _differences(summary),
        "## Learning curves",
        _picture(folder, CURVES, text=curves),
        "## Confusion matrix",
        _picture(folder, CONFUSION_MATRIX, text=matrix),
        "## Where to find it",
        _list(_places(summary, mlflow_link=mlflow_link, report_link=report_link, flow_run_link=flow_run_link)),
    ]
    return "\n\n".join(parts) + "\n"


def _differences(summary: Summary) -> str:
    """Return a table of the parameters that differ from the recipe."""
    recipe = escape(summary.setup.recipe)
    rows = [
        (escape(name), escape(_format(old)), escape(_format(new)))
        for name, (old, new) in summary.setup.differences.items()
    ]
    return (
        markdown_table(["parameter", f"recipe {recipe}", "this run"], rows) if rows else f"nothing from recipe {recipe}"
    )


def _picture(folder: Path, path: Path, *, text: str) -> str:
    """Return a PNG file below `folder` as a picture with an alternative text, or a line if it is missing or large."""
    file = folder / path
    if not file.is_file():
        return f"`{path}` was not written"
    if file.stat().st_size > MAX_PICTURE_BYTES:
        return f"`{path}` is too large for this page: it is in the report and among the files of the MLflow run"
    return f"![{escape(text)}](data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()})"


def _places(summary: Summary, *, mlflow_link: str, report_link: str, flow_run_link: str) -> list[str]:
    """Return a line for each tool that has the run, and the command that lists all ids."""
    # in the text of a link, Prefect's page shows the backslash before characters that need none, such as `=`
    title = re.sub(r"\\([-_.,:=+%/() ])", r"\1", escape(summary.setup.title))
    run = "the earlier run that made this model" if summary.has_cached_model else title
    report = f"`{REPORTS / summary.report.name}` in the project" if summary.report else "none; the log has the reason"
    if report_link:
        report = f"[{REPORT}]({report_link}) in MLflow, and {report}"
    return [
        f"report: {report}",
        f"MLflow run with curves, model, files: {f'[{run}]({mlflow_link})' if mlflow_link else 'unknown'}",
        "`make ui` serves MLflow's pages",
        f"Prefect flow run: {f'[{title}]({flow_run_link})' if flow_run_link else title}",
        f"use this model in the checkout (replaces the files in `artifacts/`): `dvc exp apply {summary.experiment}`",
        f"list all ids and files: `python -m flows.trace {summary.experiment}`",
        f"time: {describe_time(summary)}",
    ]


def _format(value: object) -> str:
    """Return the value of a parameter as text."""
    if value is None:
        return "null"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def escape(text: str) -> str:
    """Return text as Markdown that shows it as it is: neither links, pictures nor HTML in it have an effect."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", escape_control_chars(text))


def _list(lines: Iterable[str]) -> str:
    """Return a Markdown list; Prefect's page wraps its lines, unlike those of a table."""
    return "\n".join(f"- {line}" for line in lines)
