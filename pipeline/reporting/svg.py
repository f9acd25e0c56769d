"""Make Matplotlib's figures parts of a page: SVG in the colors and the font of the page, light or dark."""

import io
import math
import re
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Matplotlib draws in these colors, which `to_svg` replaces by the variables of the page's style.
COLORS = {"#010101": "ink", "#020202": "muted", "#030303": "accent", "#040404": "line"}
INK, MUTED, ACCENT, LINE = COLORS
SIZE = (4.4, 2.9)  # inches: wide enough for half of a page, or for the whole width of a phone
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it uses the fonts of the page, and can be selected
    "svg.hashsalt": "report",
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "font.size": 9,
    "text.parse_math": False,
}


def new_axes(size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    """Return a transparent figure with axes that have a light grid."""
    figure, [axes] = new_panels(size=size, heights=(1,))
    return figure, axes


def new_panels(*, size: tuple[float, float], heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """Return a transparent figure with axes one below another, of these relative heights, that have a light grid."""
    figure = Figure(figsize=size, layout="constrained")
    figure.patch.set_alpha(0)
    panels = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0].tolist()
    for axes in panels:
        axes.patch.set_alpha(0)
        axes.grid(color=LINE, linewidth=0.7)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure, panels


def to_svg(figure: Figure, *, name: str, text: str) -> Markup:
    """Return the figure as an element `svg` with a text alternative, whose ids begin with `name`."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = stream.getvalue()
    width, height = (math.ceil(float(value)) for value in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0])
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<(metadata|style)\b.*?</\1>", "", body, flags=re.DOTALL)
    body = re.sub(r"\bxlink:href=", "href=", body)
    body = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", body)
    body = re.sub(r"#0[1-4]0[1-4]0[1-4]\b", lambda found: f"var(--{COLORS[found[0]]})", body)
    body = re.sub(r"font(-family)?: [^;\"]*;? ?", _with_page_font, body)
    label = escape(text)
    start = f'<svg role="img" aria-label="{label}" viewBox="0 0 {width} {height}" class="figure">'
    return Markup(f"{start}{body}")  # noqa: S704  # only `text` is from outside


def _with_page_font(found: re.Match[str]) -> str:
    """Return a declaration of Matplotlib's font with the font of the page, and its size as it was."""
    size = re.search(r"[\d.]+px", found[0])
    return f"font-size: {size[0]}; " if size else ""
