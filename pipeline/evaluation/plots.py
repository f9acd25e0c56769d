"""Plot the metrics of an evaluation, as PNG bytes that are the same for the same numbers."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from pipeline.figures import to_png

MAX_LABELED_CLASSES = 30
MAX_LABEL_LENGTH = 24


def confusion_matrix(counts: npt.NDArray[np.int64], *, class_names: Sequence[str]) -> bytes:
    """Plot counts (num_classes, num_classes) by actual (row) and predicted class (column).

    The color shows the fraction of the row.
    """
    size = min(max(5.0, 0.55 * len(class_names) + 2), 16.0)
    figure = Figure(figsize=(size, size * 0.9), layout="constrained")
    axes = figure.subplots()
    fractions = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure.colorbar(axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1), label="fraction of the row", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="actual")
    if len(class_names) <= MAX_LABELED_CLASSES:
        ticks = range(len(class_names))
        axes.set_xticks(ticks, [_label(name) for name in class_names], rotation=45, ha="right")
        axes.set_yticks(ticks, [_label(name) for name in class_names])
        for (row, column), count in np.ndenumerate(counts):
            color = "white" if fractions[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=8)
    return to_png(figure)


def _label(name: str) -> str:
    """Return a class name as a label: long ones are shortened, since they would leave no room for the matrix.

    Dollar signs are escaped, since Matplotlib reads text between two of them as a formula.
    """
    short = name if len(name) <= MAX_LABEL_LENGTH else f"{name[: MAX_LABEL_LENGTH - 1]}…"
    return short.replace("$", r"\$")
