"""When a checkpoint is written: after an epoch, in a long epoch every few minutes, and on SIGTERM and Ctrl-C."""

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
MIN_SECONDS = 30
"""An epoch that ends sooner after the last checkpoint has none: one costs an H100 0.15 s, its epoch of airbench 0.2."""


class CheckpointSaver:
    """Passes the state of a training to `save`, but never one after a non-finite loss.

    As a context manager, it also does so where SIGTERM or Ctrl-C ends the block, and adds to the exception where the
    training will resume.
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
        self._pending: int | None = None

    def save(self) -> None:
        """Save now; raises UserError where a loss was not finite."""
        self._guard.raise_if_non_finite()
        self._save(self._state.checkpoint())
        self._last_saved = time.monotonic()

    def save_if_due(self) -> None:
        """Save in the midst of an epoch, if the last checkpoint is older than the interval."""
        self._save_after(self._every_seconds)

    def save_after_epoch(self) -> None:
        """Save if the last checkpoint is older than MIN_SECONDS, or than the interval if that is shorter."""
        self._save_after(min(MIN_SECONDS, self._every_seconds))

    def _save_after(self, seconds: float) -> None:
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
        """Let SIGTERM and Ctrl-C wait until the block is complete; where it fails, these signals are dropped."""
        self._is_in_step = True
        try:
            yield
        finally:
            self._is_in_step = False
        if (number := self._pending) is not None:
            self._pending = None
            self._handle(number, None)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._is_in_step:
            self._pending = self._pending or number
        else:
            self._handle(number, frame)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        handler = self._previous_handlers[number]
        if callable(handler):
            handler(number, frame)
        elif handler == signal.SIG_DFL:
            self._restore_handlers()
            signal.raise_signal(signal.Signals(number))

    def _restore_handlers(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
