"""Render the report as one HTML page, which needs no other file and no network."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipeline.artifacts import SELECTED_COLUMN
from pipeline.params import Params
from pipeline.reporting import coverage, figures, gallery
from pipeline.reporting.baseline import Baseline
from pipeline.reporting.commands import REPORT, commands
from pipeline.reporting.data import Content, Row, confidence_summary, frequent_confusions
from pipeline.reporting.facts import RunFacts
from pipeline.reporting.model import ModelFacts
from pipeline.reporting.template import render_template
from pipeline.tracking.run_title import FOLDER_PARAM

MAX_CLASSES_IN_TABLE = 20  # more of them are a heat map, and tables show the first of them and fold the others
MAX_CONFUSIONS = 12
MAX_FILES_LISTED = 20
MAX_MISTAKES_LISTED = 300
MAX_DIFFERENCES_LISTED = 6  # in the line below the verdict
STEPS = ("download", "normalize", "train", "evaluate")


@dataclass(frozen=True)
class Report:
    """All that the page shows; `output` is its file, relative to the project if it is below it."""

    content: Content
    model: ModelFacts
    baseline: Baseline
    facts: RunFacts
    params: Params
    output: Path = REPORT


def render(report: Report) -> str:
    """Return the page as text; names from files and from the run are escaped."""
    return render_template(
        "report.html.j2",
        content=report.content,
        model=report.model,
        baseline=report.baseline,
        facts=report.facts,
        params=report.params,
        title=report.facts.title or report.content.info.dataset,
        output=report.output,
        commands=commands(report.facts, output=report.output),
        differences=_differences(report.facts),
        times={step: report.facts.seconds.get(step) for step in STEPS} | {"train": report.facts.train_seconds},
        few_images=figures.FEW_IMAGES,
        max_differences=MAX_DIFFERENCES_LISTED,
        max_files=MAX_FILES_LISTED,
        max_mistakes=MAX_MISTAKES_LISTED,
        max_rows=MAX_CLASSES_IN_TABLE,
        **_views(report.content),
        **_coverage_views(report.content, report.model),
    )


def _views(content: Content) -> dict[str, Any]:
    """Return what the page shows in figures, tables and galleries."""
    names, predictions = content.info.class_names, content.predictions
    selected, is_small = content.selected, len(names) <= MAX_CLASSES_IN_TABLE
    epoch = selected["epoch"] if selected else None
    mistakes, doubtful = gallery.mistakes(predictions), gallery.doubtful(predictions)
    return {
        "curves": [figures.curve(content.history, quantity, selected=epoch) for quantity in ("loss", "accuracy")],
        "selected": selected,
        "selected_reason": selected[SELECTED_COLUMN] if selected else "",
        "confidence": confidence_summary(predictions),
        "per_class": sorted(content.per_class, key=_badness),
        "class_numbers": {name: number for number, name in enumerate(names, start=1)},
        "confusions": frequent_confusions(content.confusion, names, number=MAX_CONFUSIONS),
        "matrix": _matrix(content) if is_small else None,
        "heat_map": None if is_small else figures.heat_map(content.confusion),
        "reliability": _reliability(content.calibration),
        "mistakes": mistakes,
        "mistake_pictures": gallery.with_pictures(mistakes, content.test_images),
        "doubtful_pictures": gallery.with_pictures(doubtful, content.test_images),
        "is_pixelated": gallery.is_lossless(content.test_images[0]),
        "examples": gallery.examples(
            content.train_images, content.train_labels, file_names=content.train_names, class_names=names
        ),
    }


def _coverage_views(content: Content, model: ModelFacts) -> dict[str, Any]:
    """Return the curve of coverage against accuracy, and what the thresholds of the model give on the test split."""
    thresholds = model.config.thresholds
    results = coverage.threshold_results(content.predictions, thresholds or {})
    return {
        "coverage_curve": figures.coverage(coverage.coverage_curve(content.predictions), results),
        "has_thresholds": thresholds is not None,
        "threshold_results": results,
        "typical": coverage.typical_result(results),
        "few_in_split": coverage.FEW_IMAGES,
    }


def _differences(facts: RunFacts) -> list[tuple[str, Any, Any]]:
    """Return name, value in the recipe and value of the model of what differs; own images are in the title."""
    found = facts.setup.differences if facts.setup else {}
    return [(name, before, after) for name, (before, after) in found.items() if name != FOLDER_PARAM]


def _badness(row: Row) -> tuple[float, float]:
    """Return the key that sorts classes by F1, then by recall; those without images come last."""
    f1, recall = (math.inf if row[name] is None else row[name] for name in ("f1", "recall"))
    return f1, recall


def _matrix(content: Content) -> list[tuple[str, list[tuple[str, int, float]]]]:
    """Return the rows of the confusion matrix: the actual class, and predicted class, images and fraction of each."""
    names = content.info.class_names
    return [
        (name, [(names[column], int(count), count / max(1, row.sum())) for column, count in enumerate(row)])
        for name, row in zip(names, content.confusion, strict=True)
    ]


def _reliability(calibration: Row) -> list[Markup]:
    """Return the diagram before the correction of the probabilities and, if the temperature is known, after it."""
    titles = {"raw": "before correction", "calibrated": "after correction"}
    return [
        figures.reliability(found["bins"], title=title, ece=found["expected_calibration_error"])
        for name, title in titles.items()
        if (found := calibration[name]) is not None
    ]
