"""Render the report as one HTML page, which needs no other file and no network."""

import json
import math
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.artifacts import SELECTED_COLUMN
from pipeline.core.errors import escape_control_chars
from pipeline.core.progress import format_bytes
from pipeline.images.blocks import SPLITS
from pipeline.params import Params
from pipeline.reporting import figures, gallery
from pipeline.reporting.baseline import Baseline
from pipeline.reporting.data import Content, Row, frequent_confusions
from pipeline.reporting.facts import RunFacts
from pipeline.reporting.model import ModelFacts

FOLDER = Path(__file__).parent
MAX_CLASSES_IN_TABLE = 20  # more of them are a heat map, and tables show the first of them and fold the others
MAX_CONFUSIONS = 12
MAX_FILES_LISTED = 20
UNKNOWN = "unknown"
NO_BREAK_SPACE = "\u00a0"
MINUS = "\u2212"


@dataclass(frozen=True)
class Report:
    """All that the page shows."""

    content: Content
    model: ModelFacts
    baseline: Baseline
    facts: RunFacts
    params: Params


def render(report: Report) -> str:
    """Return the page as text; names from files and from the run are escaped."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., Any]] = {
        "bytes": format_bytes,
        "duration": duration,
        "label": label,
        "milliseconds": milliseconds,
        "parameter": _as_yaml,
        "percent": percent,
        "points": points,
        "web_link": web_link,
    }
    environment.filters |= filters
    environment.globals |= {"metric": metric, "UNKNOWN": UNKNOWN, "SPLITS": SPLITS}
    return environment.get_template("report.html.j2").render(
        content=report.content,
        model=report.model,
        baseline=report.baseline,
        facts=report.facts,
        params=report.params,
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        title=report.facts.title or report.content.info.dataset,
        commands=commands(report.facts),
        max_files=MAX_FILES_LISTED,
        max_rows=MAX_CLASSES_IN_TABLE,
        **_views(report.content),
    )


def _views(content: Content) -> dict[str, Any]:
    """Return what the page shows in figures, tables and galleries."""
    names, predictions = content.info.class_names, content.predictions
    selected, is_small = content.selected, len(names) <= MAX_CLASSES_IN_TABLE
    epoch = selected["epoch"] if selected else None
    return {
        "curves": [figures.curve(content.history, quantity, selected=epoch) for quantity in ("loss", "accuracy")],
        "selected": selected,
        "selected_reason": selected[SELECTED_COLUMN] if selected else "",
        "per_class": sorted(content.per_class, key=_badness),
        "class_numbers": {name: number for number, name in enumerate(names, start=1)},
        "confusions": frequent_confusions(content.confusion, names, number=MAX_CONFUSIONS),
        "matrix": _matrix(content) if is_small else None,
        "heat_map": None if is_small else figures.heat_map(content.confusion),
        "reliability": _reliability(content.calibration),
        "mistakes": gallery.mistakes(predictions, content.test_images),
        "num_mistakes": int((~predictions.is_correct).sum()),
        "doubtful": gallery.doubtful(predictions, content.test_images),
        "examples": gallery.examples(
            content.train_images, content.train_labels, file_names=content.train_names, class_names=names
        ),
    }


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


def _reliability(calibration: Row) -> list[tuple[str, str, Row, Markup]]:
    """Return title, name, figures and diagram before the temperature and, if it is known, after it."""
    titles = {"raw": "before the temperature", "calibrated": "after the temperature"}
    return [
        (title, name, found, figures.reliability(found["bins"], title=title, ece=found["expected_calibration_error"]))
        for name, title in titles.items()
        if (found := calibration[name]) is not None
    ]


def metric(name: str, value: float | None, text: str | None = None) -> Markup | str:
    """Return a figure of the model with its exact value, so that a program can read it; `text` is what people read.

    The default of `text` is the value as a percentage, or as a number with separators if it is whole.
    """
    if value is None:
        return UNKNOWN
    shown = text or (f"{value:,}" if isinstance(value, int) else percent(value))
    return Markup('<data class="metric" data-name="{}" value="{}">{}</data>').format(label(name), repr(value), shown)


def percent(fraction: float | None, decimals: int = 1) -> str:
    """Return a fraction as a percentage; one that is not quite 0 or 1 is never shown as such."""
    if fraction is None:
        return UNKNOWN
    smallest = 10.0**-decimals
    if 0 < fraction < smallest / 200:
        text = f"<{NO_BREAK_SPACE}{smallest:g}"
    elif 1 - smallest / 200 <= fraction < 1:
        text = f">{NO_BREAK_SPACE}{100 - smallest:g}"
    else:
        text = f"{100 * fraction:.{decimals}f}"
    return f"{text}{NO_BREAK_SPACE}%"


def points(difference: float) -> str:
    """Return a difference of fractions in percentage points, with its sign."""
    text = f"{100 * difference:+.1f}".replace("-", MINUS)
    return f"{text[1:] if text[1:] == '0.0' else text}"


def duration(seconds: float | None) -> str:
    """Return a duration in the largest fitting unit."""
    if seconds is None:
        return UNKNOWN
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f}{NO_BREAK_SPACE}{unit}"
    return f"{seconds:.1f}{NO_BREAK_SPACE}s"


def milliseconds(seconds: float) -> str:
    """Return a short duration in milliseconds, with three digits."""
    return f"{float(f'{1000 * seconds:.3g}'):g}{NO_BREAK_SPACE}ms"


def label(name: object) -> str:
    """Return a name with control characters and direction marks escaped, as in `\\x1b`."""
    return escape_control_chars(str(name))


def web_link(address: str) -> str:
    """Return the address if it is one of the web, else an empty text: no other scheme may be a link."""
    try:
        return address if urlsplit(address).scheme in ("http", "https") else ""
    except ValueError:
        return ""


def commands(facts: RunFacts) -> Sequence[tuple[str, str]]:
    """Return what the commands that make the model again do, and the commands."""
    python = ".venv/bin/python"
    found = []
    if facts.recorded:
        found.append(
            (
                "run the steps again as they were recorded, and compare every file",
                f"{python} -m flows.reproduce {shlex.quote(facts.recorded.run_id)}",
            )
        )
    if facts.setup and facts.setup.recipe:
        changes = "".join(f" --set {shlex.quote(f'{name}={_as_yaml(value)}')}" for name, value in _new(facts).items())
        command = f"{python} -m flows.train_classifier --recipe {shlex.quote(facts.setup.recipe)}{changes}"
        found.append(("run it as a new experiment", command))
    found.append(("reproduce this checkout in place", ".venv/bin/dvc repro"))
    found.append(("make this page again", f"{python} -m pipeline.report"))
    return found


def _new(facts: RunFacts) -> Mapping[str, Any]:
    """Return the values of the run that differ from the recipe."""
    return {name: pair[1] for name, pair in facts.setup.differences.items()} if facts.setup else {}


def _as_yaml(value: Any) -> str:
    """Return the value of a parameter in one line of YAML."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
