"""Draw the figures of the report as SVG in the colors of the page, light or dark."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pipeline.reporting.text import NO_BREAK_SPACE, percent

# Matplotlib draws in these colors, which `_to_svg` replaces by the variables of the page's style.
COLORS = {"#010101": "ink", "#020202": "muted", "#030303": "accent", "#040404": "line"}
INK, MUTED, ACCENT, LINE = COLORS
ACCENT_RGB = (47, 111, 208)  # of the heat map, whose pixels cannot use variables; readable on light and dark
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
FEW_IMAGES = 10  # of a bar of the reliability diagram: with fewer ones, it is pale


def curve(history: Sequence[Mapping[str, Any]], quantity: str, *, selected: int | None) -> Markup:
    """Plot `loss` or `accuracy` of train and validation by epoch, with a line at the selected epoch.

    `history` has the numbers of each epoch: `epoch`, `train_<quantity>`, `validation_<quantity>`.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes()
        epochs = [row["epoch"] for row in history]
        for split, color in (("train", MUTED), ("validation", ACCENT)):
            values = [row[f"{split}_{quantity}"] for row in history]
            marker = "o" if len(epochs) <= 20 else ""
            axes.plot(epochs, values, color=color, label=split, linewidth=1.8, marker=marker, markersize=3)
        if selected is not None:
            axes.axvline(selected, color=INK, linewidth=1, linestyle=(0, (2, 3)), label=f"selected: epoch {selected}")
        axes.set(xlabel="epoch", ylabel=quantity)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(epochs) == 1:
            axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
        if quantity == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=f"{NO_BREAK_SPACE}%"))
        axes.legend(frameon=False, loc="best", fontsize=8.5)
        return _to_svg(figure, name=quantity, text=_curve_text(history, quantity, selected=selected))


def _curve_text(history: Sequence[Mapping[str, Any]], quantity: str, *, selected: int | None) -> str:
    """Return what a curve shows, as its text alternative."""
    first, last = history[0], history[-1]
    parts = [
        f"{split} {quantity} from {first[f'{split}_{quantity}']:.3g} to {last[f'{split}_{quantity}']:.3g}"
        for split in ("train", "validation")
    ]
    chosen = "" if selected is None else f"; epoch {selected} is selected"
    return f"Curves of {quantity} from epoch {first['epoch']} to {last['epoch']}: {', '.join(parts)}{chosen}."


def reliability(bins: Sequence[Mapping[str, Any]], *, title: str, ece: float) -> Markup:
    """Plot the accuracy of each bin of confidence, against the diagonal on which a calibrated model lies.

    Each bar has its number of images, and is pale if these are few. A bin has `lower`, `upper`, `images`,
    `mean_confidence` and `accuracy` (None without images).
    """
    name = "reliability-" + re.sub("[^a-z]+", "-", title.lower())
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(size=(4.4, 3.6))
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
        filled = [each for each in bins if each["images"]]
        for each in filled:
            _reliability_bar(axes, each)
        axes.set(xlabel="confidence: probability of the predicted class", ylabel="accuracy", title=title)
        axes.set(xlim=(0, 1.03), ylim=(-0.09, 1.05))
        axes.title.set_fontsize(9.5)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=f"{NO_BREAK_SPACE}%"))
        points = "; ".join(
            f"confidence {percent(each['mean_confidence'], 0)}: accuracy {percent(each['accuracy'], 0)} "
            f"of {each['images']:,} images"
            for each in filled
        )
        text = f"Reliability diagram, {title}: expected calibration error {percent(ece)}. {points}."
        return _to_svg(figure, name=name, text=text)


def _reliability_bar(axes: Axes, each: Mapping[str, Any]) -> None:
    """Draw the accuracy of a bin with its number of images below it, and a dot at its mean confidence."""
    strength = 1.0 if each["images"] >= FEW_IMAGES else 0.35
    center, width = (each["upper"] + each["lower"]) / 2, 0.9 * (each["upper"] - each["lower"])
    axes.bar(center, each["accuracy"], width=width, color=ACCENT, alpha=0.3 * strength)
    axes.scatter(each["mean_confidence"], each["accuracy"], s=22, color=ACCENT, alpha=strength)
    number = each["images"]
    text = f"{number}" if number < 10_000 else f"{number / 1000:.0f}k"
    axes.text(center, -0.045, text, ha="center", va="center", fontsize=6.5)


def heat_map(confusion: npt.NDArray[np.int64]) -> Markup:
    """Draw counts (num_classes, num_classes) by actual (row) and predicted class (column), numbered from 1.

    The opacity of a cell is the fraction of its row, with a square root, so that rare confusions are visible.
    """
    number = len(confusion)
    fractions = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    pixels = np.zeros((number, number, 4))
    pixels[..., :3] = np.array(ACCENT_RGB) / 255
    pixels[..., 3] = np.sqrt(fractions)
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(size=(4.8, 4.6))
        axes.imshow(pixels, interpolation="none", extent=(0.5, number + 0.5, number + 0.5, 0.5))
        axes.set(xlabel="number of the predicted class", ylabel="number of the actual class")
        axes.grid(visible=False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True, nbins=11))
        correct = np.trace(confusion) / max(confusion.sum(), 1)
        text = (
            f"Heat map of the confusion matrix of {number} classes: {percent(correct)} of the images lie on the "
            "diagonal. The table of the most frequent confusions has the numbers."
        )
        return _to_svg(figure, name="confusion", text=text)


def _axes(size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    """Return a transparent figure with axes that have a light grid."""
    figure = Figure(figsize=size, layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    axes.grid(color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _to_svg(figure: Figure, *, name: str, text: str) -> Markup:
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
