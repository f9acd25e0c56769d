"""Save checkpoints: after an epoch, in a long epoch every few minutes, and on SIGTERM and Ctrl-C."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pipeline.training.checkpoints import Checkpoint
from pipeline.training.non_finite import NonFiniteGuard
from pipeline.training.state import TrainingState

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# An epoch that ends sooner after the last checkpoint has none. On an H100 a checkpoint of airbench takes 0.15 s, an
# epoch 0.2 s.
MIN_SECONDS_BETWEEN_CHECKPOINTS = 30


class CheckpointSaver:
    """A saver that passes the state of a training to `save` when a checkpoint is due, but never a non-finite one.

    As a context manager, it also saves where SIGTERM or Ctrl-C ends the block, and writes into the exception at which
    epoch and step the training will resume.
    """

    def __init__(
        self,
        state: TrainingState,
        *,
        guard: NonFiniteGuard,
        save: Callable[[Checkpoint], None],
        every_minutes: float,
    ) -> None:
        self._state, self._guard, self._save, self._every_seconds = state, guard, save, 60 * every_minutes
        self._last_saved = time.monotonic()
        self._previous_handlers: dict[int, Any] = {}
        self._is_in_step = False
        self._pending_signal: int | None = None

    def save(self) -> None:
        """Save now; raises UserError where a loss was not finite."""
        self._guard.raise_if_non_finite()
        self._save(self._state.checkpoint())
        self._last_saved = time.monotonic()

    def save_if_due(self) -> None:
        """Save within an epoch, if the last checkpoint is older than the interval."""
        self._save_after(self._every_seconds)

    def save_after_epoch(self) -> None:
        """Save if the last checkpoint is older than 30 seconds, or than the interval if that is shorter."""
        self._save_after(min(MIN_SECONDS_BETWEEN_CHECKPOINTS, self._every_seconds))

    def _save_after(self, seconds: float) -> None:
        """Save if the last checkpoint is older than `seconds`."""
        if time.monotonic() - self._last_saved > seconds:
            self.save()

    def __enter__(self) -> "CheckpointSaver":
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            self._previous_handlers = {number: signal.getsignal(number) for number in SIGNALS}
            for number in SIGNALS:
                signal.signal(number, self._receive)
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        try:
            if isinstance(error, KeyboardInterrupt):
                self.save()
                epoch = len(self._state.history) + (self._state.position > 0)
                error.args = (f"the same command resumes from epoch {epoch}, step {self._state.step}",)
        finally:
            self._restore_handlers()

    @contextmanager
    def whole_step(self) -> Iterator[None]:
        """Delay SIGTERM and Ctrl-C until the block has ended; where the block raises, they are dropped."""
        self._is_in_step = True
        try:
            yield
        finally:
            self._is_in_step = False
        if (number := self._pending_signal) is not None:
            self._pending_signal = None
            self._handle(number, None)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal, within a step only once that has ended."""
        if self._is_in_step:
            self._pending_signal = self._pending_signal or number
        else:
            self._handle(number, frame)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Do what the signal did before the training set its own handlers."""
        handler = self._previous_handlers[number]
        if callable(handler):
            handler(number, frame)
        elif handler == signal.SIG_DFL:
            self._restore_handlers()
            signal.raise_signal(signal.Signals(number))

    def _restore_handlers(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
