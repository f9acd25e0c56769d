"""Select the epoch whose weights become `best.safetensors`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.evaluation.intervals import wilson_interval
from pipeline.params import Metric, TrainParams
from pipeline.training.state import Epoch

# by `train.select_by`: what the best epoch has
BEST_VALUE: Mapping[Metric, str] = {
    "accuracy": "highest validation accuracy",
    "macro_f1": "highest validation macro F1",
    "loss": "lowest validation loss",
}


@dataclass(frozen=True)
class SelectedEpoch:
    """The number of the selected epoch (from 1), and the reason for the selection as text."""

    epoch: int
    reason: str


def best_epochs(history: Sequence[Epoch], *, params: TrainParams, num_images: int) -> list[Epoch]:
    """Return the epochs that count as the best by `train.selection`, in their order; the last one is selected.

    `best`: those of the best `train.select_by` in validation, and among these of lowest validation loss, since with few
    images many epochs have the same accuracy. `latest_equivalent`: those whose validation accuracy is inside the 95 %
    interval of the highest one on `num_images` images. The highest of many values is often so by chance, and where the
    learning rate falls, a later epoch is better.
    """
    if params.selection == "best":
        best = max(_score(epoch, select_by=params.select_by) for epoch in history)
        return [epoch for epoch in history if _score(epoch, select_by=params.select_by) == best]
    highest = max(epoch.validation_accuracy for epoch in history)
    lower, _ = wilson_interval(round(highest * num_images), num_images)
    return [epoch for epoch in history if epoch.validation_accuracy >= lower]


def _score(epoch: Epoch, *, select_by: Metric) -> tuple[float, float]:
    """Return what `best` compares: the value of `select_by`, larger for the better epoch, then the negative loss."""
    values = {
        "accuracy": epoch.validation_accuracy,
        "macro_f1": epoch.validation_macro_f1,
        "loss": -epoch.validation_loss,
    }
    return values[select_by], -epoch.validation_loss


def select_epoch(history: Sequence[Epoch], *, params: TrainParams, num_images: int) -> SelectedEpoch:
    """Select the last of the best epochs; `num_images` is the size of the validation split."""
    best = best_epochs(history, params=params, num_images=num_images)
    name = BEST_VALUE[params.select_by]
    values = [_score(epoch, select_by=params.select_by)[0] for epoch in history]
    num_highest = values.count(max(values))
    if params.selection == "latest_equivalent":
        reason = f"latest of {len(best)} in the 95% interval of the {name}, {max(values):.1%}"
    elif num_highest == 1:
        reason = name
    elif len(best) == 1:
        reason = f"lowest validation loss of {num_highest} with the {name}"
    elif params.select_by == "loss":
        reason = f"latest of {len(best)} with the {name}"
    else:
        reason = f"latest of {len(best)} with the {name} and the lowest loss"
    return SelectedEpoch(best[-1].epoch, reason)


def epochs_since_best(history: Sequence[Epoch], *, params: TrainParams, num_images: int) -> int:
    """Return the number of epochs since the last improvement; with `latest_equivalent`, since the last best epoch."""
    if not history:
        return 0
    best = best_epochs(history, params=params, num_images=num_images)
    return len(history) - best[0 if params.selection == "best" else -1].epoch


def is_finished(history: Sequence[Epoch], *, params: TrainParams, num_images: int) -> bool:
    """Return whether all epochs are done, or `train.early_stopping_epochs` have passed without an improvement."""
    patience = params.early_stopping_epochs
    num_stalled = epochs_since_best(history, params=params, num_images=num_images)
    return len(history) >= params.epochs or (patience is not None and num_stalled >= patience)
