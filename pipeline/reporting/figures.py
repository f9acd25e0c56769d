"""Draw the figures of the report as SVG in the colors of the page, light or dark."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pipeline.reporting.coverage import CoverageCurve, ThresholdResult
from pipeline.reporting.svg import ACCENT, INK, MUTED, STYLE, new_axes, to_svg
from pipeline.reporting.text import NO_BREAK_SPACE, percent

ACCENT_RGB = (47, 111, 208)  # of the heat map, whose pixels cannot use variables; readable on light and dark
FEW_IMAGES = 10  # of a bar or of a point of a curve: with fewer ones, it is pale
MAX_POINTS = 400  # of a curve


def curve(history: Sequence[Mapping[str, Any]], quantity: str, *, selected: int | None) -> Markup:
    """Plot `loss` or `accuracy` of train and validation by epoch, with a line at the selected epoch.

    `history` has the numbers of each epoch: `epoch`, `train_<quantity>`, `validation_<quantity>`.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes()
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
        return to_svg(figure, name=quantity, text=_curve_text(history, quantity, selected=selected))


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
        figure, axes = new_axes(size=(4.4, 3.6))
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
        return to_svg(figure, name=name, text=text)


def _reliability_bar(axes: Axes, each: Mapping[str, Any]) -> None:
    """Draw the accuracy of a bin with its number of images below it, and a dot at its mean confidence."""
    strength = 1.0 if each["images"] >= FEW_IMAGES else 0.35
    center, width = (each["upper"] + each["lower"]) / 2, 0.9 * (each["upper"] - each["lower"])
    axes.bar(center, each["accuracy"], width=width, color=ACCENT, alpha=0.3 * strength)
    axes.scatter(each["mean_confidence"], each["accuracy"], s=22, color=ACCENT, alpha=strength)
    number = each["images"]
    text = f"{number}" if number < 10_000 else f"{number / 1000:.0f}k"
    axes.text(center, -0.045, text, ha="center", va="center", fontsize=6.5)


def coverage(curve: CoverageCurve, results: Sequence[ThresholdResult]) -> Markup:
    """Plot the accuracy of the reported classes by coverage, with the thresholds of the model and their intervals."""
    chosen = np.unique(np.linspace(0, len(curve.images) - 1, MAX_POINTS).round().astype(int))
    coverages, accuracies = curve.coverages[chosen], curve.accuracies[chosen]
    is_firm = curve.images[chosen] >= min(FEW_IMAGES, curve.images[-1])
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(size=(4.8, 3.2))
        axes.plot(coverages, accuracies, color=ACCENT, linewidth=1.8, alpha=0.35)
        axes.plot(coverages[is_firm], accuracies[is_firm], color=ACCENT, linewidth=1.8, label="all thresholds")
        lows = [accuracies[is_firm].min(), *(_threshold_mark(axes, each) for each in results if each.reported)]
        if results:
            axes.scatter([], [], color=INK, s=18, label=f"of the model (95{NO_BREAK_SPACE}% intervals)")
        axes.set(xlabel="coverage: test images whose class is reported", ylabel="accuracy of the reported classes")
        margin = 0.06 * (1 - min(lows)) or 0.01
        axes.set(xlim=(0, 1.02), ylim=(min(lows) - margin, 1 + margin))
        axes.set_yticks([tick for tick in MaxNLocator(5).tick_values(min(lows), 1) if min(lows) <= tick <= 1])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{100 * value:.4g}{NO_BREAK_SPACE}%")
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=8.5)
        return to_svg(figure, name="coverage", text=_coverage_text(curve, results))


def _threshold_mark(axes: Axes, result: ThresholdResult) -> float:
    """Draw a threshold with the interval of its accuracy, and return the lower end of the interval."""
    assert result.accuracy is not None
    assert result.accuracy_interval is not None
    low, high = result.accuracy_interval
    axes.vlines(result.coverage, low, high, color=INK, linewidth=0.8)
    axes.scatter(result.coverage, result.accuracy, color=INK, s=18, zorder=3)
    return low


def _coverage_text(curve: CoverageCurve, results: Sequence[ThresholdResult]) -> str:
    """Return what the curve shows, as its text alternative."""
    half = int(np.searchsorted(curve.coverages, 0.5))
    points = "; ".join(
        f"coverage {percent(each.coverage)} at the threshold for {percent(each.stated, 0)}: accuracy "
        f"{percent(each.accuracy)}"
        for each in results
        if each.reported
    )
    marked = f" Thresholds of the model: {points}." if points else ""
    return (
        f"Curve of the accuracy of the reported classes by coverage, of {curve.images[-1]:,} test images: "
        f"{percent(curve.accuracies[-1])} at a coverage of 100{NO_BREAK_SPACE}%, {percent(curve.accuracies[half])} at "
        f"{percent(curve.coverages[half])}.{marked}"
    )


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
        figure, axes = new_axes(size=(4.8, 4.6))
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
        return to_svg(figure, name="confusion", text=text)
