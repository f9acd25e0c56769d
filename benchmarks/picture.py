"""Draw the picture of the README: the test accuracy of each seed in docs/results.json."""

import statistics
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from benchmarks.table import mean_and_deviation
from pipeline.figures import to_png


def accuracy_picture(accuracies: Mapping[str, Sequence[float]]) -> bytes:
    """Return a PNG with a row for each recipe: a dot for each seed, and mean and standard deviation.

    `accuracies` holds fractions of the test images, by recipe, one for each seed.
    """
    figure = Figure(figsize=(7.5, 0.8 + 0.6 * len(accuracies)), layout="constrained")
    axes = figure.subplots()
    names = []
    for row, (recipe, values) in enumerate(accuracies.items()):
        percent = [100 * value for value in values]
        axes.plot(percent, [row] * len(percent), "o", color="tab:blue", alpha=0.5)
        axes.errorbar(statistics.mean(percent), row - 0.3, xerr=statistics.stdev(percent), fmt="k|", capsize=3)
        names.append(f"{recipe}\n" + mean_and_deviation(percent, ".1f").replace(" ±", " % ±"))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.7)
    axes.set_xlabel("test accuracy (%): a dot for each seed; the bar is mean ± standard deviation")
    axes.grid(axis="x", alpha=0.3)
    return to_png(figure)
