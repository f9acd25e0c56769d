"""Select the epoch whose weights become `best.safetensors`."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.evaluation.intervals import wilson_interval
from pipeline.params import Selection, TrainParams
from pipeline.training.state import Epoch


@dataclass(frozen=True)
class SelectedEpoch:
    """The number of the selected epoch (from 1), and the reason for the selection as text."""

    epoch: int
    reason: str


def best_epochs(history: Sequence[Epoch], *, selection: Selection, num_images: int) -> list[Epoch]:
    """Return the epochs that count as the best by `train.selection`, in their order; the last one is selected.

    `best`: those of highest validation accuracy, and among these of lowest validation loss, since with few
    images many epochs have the same accuracy. `latest_equivalent`: those whose validation accuracy is inside the 95 %
    interval of the highest one on `num_images` images. The highest of many values is often so by chance, and where the
    learning rate falls, a later epoch is better.
    """
    top = max(history, key=_score)
    if selection == "best":
        return [epoch for epoch in history if _score(epoch) == _score(top)]
    lower, _ = wilson_interval(round(top.validation_accuracy * num_images), num_images)
    return [epoch for epoch in history if epoch.validation_accuracy >= lower]


def _score(epoch: Epoch) -> tuple[float, float]:
    """Return what `best` compares: the higher accuracy wins, then the lower loss."""
    return epoch.validation_accuracy, -epoch.validation_loss


def select_epoch(history: Sequence[Epoch], *, selection: Selection, num_images: int) -> SelectedEpoch:
    """Select the last of the best epochs; `num_images` is the size of the validation split."""
    best = best_epochs(history, selection=selection, num_images=num_images)
    highest = max(epoch.validation_accuracy for epoch in history)
    num_highest = sum(epoch.validation_accuracy == highest for epoch in history)
    if selection == "latest_equivalent":
        reason = f"latest of {len(best)} in the 95% interval of the highest validation accuracy, {highest:.1%}"
    elif num_highest == 1:
        reason = "highest validation accuracy"
    elif len(best) == 1:
        reason = f"lowest validation loss of {num_highest} with the highest validation accuracy"
    else:
        reason = f"latest of {len(best)} with the highest validation accuracy and the lowest loss"
    return SelectedEpoch(best[-1].epoch, reason)


def epochs_since_best(history: Sequence[Epoch], *, selection: Selection, num_images: int) -> int:
    """Return the number of epochs since the last improvement; with `latest_equivalent`, since the last best epoch."""
    if not history:
        return 0
    best = best_epochs(history, selection=selection, num_images=num_images)
    return len(history) - best[0 if selection == "best" else -1].epoch


def is_finished(history: Sequence[Epoch], *, params: TrainParams, num_images: int) -> bool:
    """Return whether all epochs are done, or `train.early_stopping_epochs` have passed without an improvement."""
    patience = params.early_stopping_epochs
    num_stalled = epochs_since_best(history, selection=params.selection, num_images=num_images)
    return len(history) >= params.epochs or (patience is not None and num_stalled >= patience)
