"""Plot the losses and accuracies of a training by epoch."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.figures import to_png


def curves(history: Sequence[Mapping[str, Any]], *, selected: int, reason: str, with_macro_f1: bool) -> bytes:
    """Plot loss and accuracy of train and validation by epoch, side by side, with the selected epoch and the reason.

    With `with_macro_f1`, the accuracies are plotted together with the macro F1 of the validation split.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    epochs = [row["epoch"] for row in history]
    figure.suptitle(f"epoch {selected} is selected: {reason}", fontsize="medium")
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for split, color in (("train", "#1f77b4"), ("validation", "#d62728")):
            axes.plot(epochs, [row[f"{split}_{quantity}"] for row in history], color=color, label=split, marker=".")
        label = quantity
        if with_macro_f1 and quantity == "accuracy":
            label = "accuracy, macro F1"
            scores = [row["validation_macro_f1"] for row in history]
            axes.plot(epochs, scores, color="#2ca02c", label="validation macro F1", marker=".")
        axes.axvline(selected, color="#999999", linestyle=":", label=f"selected epoch ({selected})")
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    return to_png(figure)
