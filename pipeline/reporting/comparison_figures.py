"""Draw the figures of a comparison as SVG: how far A is ahead of B, and the accuracies of the seeds of two recipes."""

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pipeline.comparison.models import Difference, ModelComparison
from pipeline.comparison.recipes import RecipeComparison
from pipeline.reporting.svg import ACCENT, INK, LINE, MUTED, STYLE, new_axes, new_panels, to_svg
from pipeline.reporting.text import NO_BREAK_SPACE, percent

Ahead = tuple[str, float, float, float]  # what is better, how much A is ahead, and the ends of its interval
SEED_OFFSETS = (0.0, 0.17, -0.17)  # of the dots of a recipe in rows, so that equal accuracies stay apart


def advantages(comparison: ModelComparison, *, a: str, b: str, name: str) -> Markup:
    """Plot how far model A is ahead in each metric, with the intervals: to the right of 0, A is better.

    The gray band has the differences of accuracies that are smaller than what the images can show.
    """
    fractions = [
        _ahead("higher accuracy", comparison.accuracy, scale=100),
        _ahead("higher macro F1", comparison.macro_f1, scale=100),
        _ahead("better calibration", comparison.calibration_error, scale=-100),
    ]
    losses = [_ahead("lower cross-entropy", comparison.loss, scale=-1)]
    with matplotlib.rc_context(STYLE):
        figure, (upper, lower) = new_panels(size=(4.8, 3.3), heights=(3, 1))
        if comparison.detectable is not None:
            size = 100 * comparison.detectable
            upper.fill_between([-size, size], -0.36, 0.36, color=MUTED, alpha=0.22, linewidth=0)
        _draw_rows(upper, fractions, label="points")
        _draw_rows(lower, losses, label="nats")
        upper.set_title(f"← {b} better", loc="left", fontsize=9, color=MUTED)
        upper.set_title(f"{a} better →", loc="right", fontsize=9, color=MUTED)
        values = "; ".join(f"{each[0]}: {_in_words(each)}" for each in (*fractions, *losses))
        text = f"How far {a} is ahead of {b}, in points and for the loss in nats: {values}."
        return to_svg(figure, name=name, text=text)


def _ahead(name: str, difference: Difference, *, scale: float) -> Ahead:
    """Return how far A is ahead; `scale` is negative for a metric that is better if lower."""
    low, high = sorted((scale * difference.low, scale * difference.high))
    return name, scale * difference.difference, low, high


def _in_words(ahead: Ahead) -> str:
    value, low, high = (f"{each:+.3g}" for each in ahead[1:])
    return f"{value}, interval {low} to {high}"


def _draw_rows(axes: Axes, rows: list[Ahead], *, label: str) -> None:
    """Draw a dot with its interval for each row, pale where the interval has 0."""
    for position, (_, value, low, high) in enumerate(rows):
        color = MUTED if low <= 0 <= high else ACCENT
        axes.plot([low, high], [position, position], color=color, linewidth=2.2, solid_capstyle="butt")
        axes.plot(value, position, marker="o", color=color, markersize=6)
    axes.axvline(0, color=INK, linewidth=1)
    limit = 1.12 * max(abs(end) for row in rows for end in row[1:]) or 1.0
    axes.set(xlim=(-limit, limit), ylim=(len(rows) - 0.5, -0.5), xlabel=label)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows], color=INK)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, symmetric=True))


def seeds(comparison: RecipeComparison, *, a: str, b: str, name: str) -> Markup:
    """Plot the accuracy of each seed as a dot in the row of its recipe, with a line at the mean."""
    groups = ((a, comparison.accuracies_a, ACCENT), (b, comparison.accuracies_b, MUTED))
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(size=(4.8, 2.0))
        for row, (_, values, color) in enumerate(groups):
            heights = row + np.resize(SEED_OFFSETS, len(values))
            axes.vlines(np.mean(values), row - 0.36, row + 0.36, color=INK, linewidth=1.4)
            axes.scatter(sorted(values), heights, s=34, color=color, alpha=0.75, linewidths=0)
        axes.set(xlabel="accuracy of each seed; the lines are the means", ylim=(1.5, -0.5))
        axes.set_yticks([0, 1], [a, b], color=INK)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_color(LINE)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=f"{NO_BREAK_SPACE}%"))
        means = ", ".join(f"{label} {percent(float(np.mean(values)), 2)}" for label, values, _ in groups)
        return to_svg(figure, name=name, text=f"Strip plot of the accuracies of the seeds; means: {means}.")
