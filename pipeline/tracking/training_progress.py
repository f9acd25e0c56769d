"""Report the progress of a training to the flow run that displays it."""

from pipeline.core.step_progress import EpochProgress, TrainingProgress, best_of, reporter
from pipeline.params import TrainParams
from pipeline.training.checkpoints import Checkpoint
from pipeline.training.state import Epoch


def announce_training(start: Checkpoint | None, *, params: TrainParams, num_train_images: int) -> None:
    """Report the length of the training and, from the checkpoint `start`, what was done before it resumed."""
    history = [Epoch(**row) for row in start.state["history"]] if start else []
    done = [_progress_of(epoch, None) for epoch in history]
    training = TrainingProgress(
        epochs=params.epochs,
        may_end_early=params.early_stopping_epochs is not None,
        epochs_done=len(history),
        last=done[-1] if done else None,
        best=best_of(done),
    )
    steps_per_epoch = num_train_images // params.batch_size
    reporter().begin_training(training, steps_done=start.step if start else 0, steps_per_epoch=steps_per_epoch)


def announce_epoch(epoch: Epoch, images_per_second: float) -> None:
    """Report the result of a finished epoch, and the speed of its training."""
    reporter().end_epoch(_progress_of(epoch, images_per_second))


def _progress_of(epoch: Epoch, images_per_second: float | None) -> EpochProgress:
    """Return what a flow run displays of a finished epoch."""
    return EpochProgress(
        epoch.epoch,
        epoch.train_loss,
        epoch.train_accuracy,
        epoch.validation_loss,
        epoch.validation_accuracy,
        images_per_second,
    )
