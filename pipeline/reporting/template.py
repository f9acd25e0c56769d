"""Fill the templates of the pages: filters, figures that a program can read, and the time of making."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from pipeline.images.blocks import SPLITS
from pipeline.reporting import text
from pipeline.reporting.text import UNKNOWN, label, percent

FOLDER = Path(__file__).parent


def render_template(template: str, **values: Any) -> str:
    """Return a page as text; every value that is no markup is escaped."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., Any]] = {
        "bytes": text.size,
        "confidence": text.confidence,
        "distance": text.distance,
        "duration": text.duration,
        "label": label,
        "milliseconds": text.milliseconds,
        "parameter": text.as_yaml,
        "percent": percent,
        "percentage": text.percentage,
        "points": text.points,
        "probability": text.probability,
        "reason": text.reason,
        "signed": text.signed,
        "web_link": text.web_link,
        "with_code": with_code,
    }
    environment.filters |= filters
    environment.globals |= {"metric": metric, "UNKNOWN": UNKNOWN, "SPLITS": SPLITS}
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return environment.get_template(template).render(made=made, **values)


def with_code(message: str) -> Markup:
    """Return a message with the parts between backquotes as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(message))))  # noqa: S704  # escaped before


def metric(name: str, value: float | None, shown: str | None = None) -> Markup | str:
    """Return a figure of the model with its exact value, so that a program can read it; `shown` is what people read.

    The default of `shown` is the value as a percentage, or as a number with separators if it is whole.
    """
    if value is None:
        return UNKNOWN
    shown = shown or (f"{value:,}" if isinstance(value, int) else percent(value))
    return Markup('<data class="metric" data-name="{}" value="{}">{}</data>').format(label(name), repr(value), shown)
