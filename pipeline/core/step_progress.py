"""Report the progress of a step to the flow run that displays it, in the JSON file that PIPELINE_PROGRESS_FILE names.

A flow run sets the variable for its stages; without it, as in `dvc repro`, nothing is written. A failure to write is
ignored. `pipeline.core.progress` reports all bars, `pipeline.train` what belongs to a training.
"""

import functools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from pipeline.core.results import write_json_file
from pipeline.core.settings import get_settings

PROGRESS_FILE = "PIPELINE_PROGRESS_FILE"
SECONDS_BETWEEN_WRITES = 1.0
MEASURED_SECONDS = 2.0  # the time left is unknown until this time is measured


@dataclass(frozen=True)
class EpochProgress:
    """The result of a finished epoch, of which `epoch` is the number (from 1); accuracies are fractions.

    `images_per_second` is the speed of the training, or None where it is unknown.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    images_per_second: float | None = None


@dataclass(frozen=True)
class TrainingProgress:
    """What is known of a training besides the bar of its current epoch.

    `last` is the last finished epoch, `epochs_done` the number of finished ones, those before a resumption included.
    `best` is the epoch of the highest validation accuracy and, of equal ones, the lowest validation loss. `step_loss`
    is the last logged loss of a step. The estimated time of a training that `may_end_early` is an upper limit.
    """

    epochs: int
    may_end_early: bool
    epochs_done: int = 0
    last: EpochProgress | None = None
    best: EpochProgress | None = None
    step_loss: float | None = None


@dataclass(frozen=True)
class StepProgress:
    """The progress of a step: its current bar, as in `normalize: 12,000 of 50,000 images`, and its training, if any.

    `fraction` is the finished fraction of the bar or, in a training, of all its epochs. `seconds_elapsed` is the time
    since this process began the bar or, in a training, began or resumed the training; `seconds_left` is the estimated
    time to the end of the same. `fraction` and `seconds_left` are None while they are unknown.
    """

    title: str
    done: int
    total: int | None
    unit: str
    fraction: float | None = None
    seconds_elapsed: float = 0.0
    seconds_left: float | None = None
    training: TrainingProgress | None = None


def best_of(epochs: Sequence[EpochProgress]) -> EpochProgress | None:
    """Return the epoch of the highest validation accuracy, then the lowest validation loss, then the latest."""
    return max(epochs, key=lambda each: (each.validation_accuracy, -each.validation_loss, each.epoch), default=None)


class Pace:
    """The measured pace of a count, for the estimate of the time until the count reaches `total`.

    The measurement begins when the first units are done: what was done before this process, the start of a process and
    a slow first step are not measured.
    """

    def __init__(self, *, done: int, total: int | None) -> None:
        self._done, self._total, self._start = done, total, time.monotonic()
        self._first: tuple[float, int] | None = None  # time and count when the first units were done

    def advance(self, count: int) -> None:
        """Add finished units."""
        self._done += count
        if self._first is None:
            self._first = (time.monotonic(), self._done)

    def fraction(self) -> float | None:
        """Return the finished fraction, or None without a total."""
        return min(1.0, self._done / self._total) if self._total else None

    def seconds_elapsed(self) -> float:
        """Return the seconds since the count began in this process."""
        return time.monotonic() - self._start

    def seconds_left(self) -> float | None:
        """Return the estimated seconds until the end, or None while it cannot be estimated."""
        if self._total is None or self._first is None:
            return None
        measured, counted = time.monotonic() - self._first[0], self._done - self._first[1]
        if counted == 0 or measured < MEASURED_SECONDS:
            return None
        return max(0, self._total - self._done) * measured / counted


class ProgressReporter:
    """A writer of the progress of this process's step; at most one write a second, and one at the end of each epoch."""

    def __init__(self) -> None:
        self._last_write = -SECONDS_BETWEEN_WRITES
        self._training: TrainingProgress | None = None
        self._bar, self._done = StepProgress("", done=0, total=None, unit=""), 0
        self._pace = Pace(done=0, total=None)

    def begin_bar(self, title: str, *, done: int, total: int | None, unit: str) -> None:
        """Begin a bar of which `done` units are finished; in a training, that is an epoch of it."""
        self._bar, self._done = replace(self._bar, title=title, total=total, unit=unit), done
        if self._training is None:
            self._pace = Pace(done=done, total=total)
        self._write_if_due()

    def advance(self, count: int) -> None:
        """Add finished units of the bar."""
        self._done += count
        self._pace.advance(count)
        self._write_if_due()

    def end_bar(self) -> None:
        """Write the last state of a bar that does not belong to a training."""
        if self._training is None:
            self._write()

    def begin_training(self, training: TrainingProgress, *, steps_done: int, steps_per_epoch: int) -> None:
        """Begin or resume a training: all following bars are epochs of it, and their units are its steps."""
        self._training = training
        self._pace = Pace(done=steps_done, total=training.epochs * steps_per_epoch)

    def log_step(self, loss: float) -> None:
        """Remember the loss of a step of the training; the next write contains it."""
        if self._training:
            self._training = replace(self._training, step_loss=loss)

    def end_epoch(self, epoch: EpochProgress) -> None:
        """Write the result of an epoch of the training; the bar then is that of the next epoch, if there is one."""
        if self._training:
            best = best_of([self._training.best or epoch, epoch])
            self._training = replace(self._training, epochs_done=epoch.epoch, last=epoch, best=best)
            if epoch.epoch < self._training.epochs:
                self._bar, self._done = replace(self._bar, title=f"epoch {epoch.epoch + 1}"), 0
            self._write()

    def seconds_left(self) -> float | None:
        """Return the estimated seconds until the end of the training, or None while it cannot be estimated."""
        return self._pace.seconds_left() if self._training else None

    def _write_if_due(self) -> None:
        if time.monotonic() - self._last_write >= SECONDS_BETWEEN_WRITES:
            self._write()

    def _write(self) -> None:
        self._last_write = time.monotonic()
        if name := get_settings().progress_file:
            pace = self._pace
            progress = replace(
                self._bar,
                done=self._done,
                fraction=pace.fraction(),
                seconds_elapsed=pace.seconds_elapsed(),
                seconds_left=pace.seconds_left(),
                training=self._training,
            )
            write_json_file(name, asdict(progress))


@functools.cache
def reporter() -> ProgressReporter:
    """Return the reporter of this process."""
    return ProgressReporter()


def read_progress(path: Path) -> StepProgress | None:
    """Return the progress that a step wrote; None if the file is missing or damaged."""
    try:
        return TypeAdapter(StepProgress).validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
