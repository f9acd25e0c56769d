"""Show the progress of a long step: by a live bar on a terminal, by a line every few seconds in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from pipeline.core.step_progress import reporter

SECONDS_BETWEEN_LINES = 10.0
BAR_DELAY_SECONDS = 0.5  # a step that is done earlier shows no bar


@contextmanager
def progress(
    description: str, *, total: int | None, unit: str, done: int = 0, leave: bool = True
) -> Iterator[Callable[[int], object]]:
    """Show the progress of the block; yields the function by which the block reports a number of finished units.

    `done` units are finished at the start. With `leave=False` the bar is removed at the end. A flow run that runs the
    step displays the progress as well (`step_progress`).
    """
    report = reporter()
    report.begin_bar(description, done=done, total=total, unit=unit)
    with _displayed(description, total=total, unit=unit, done=done, leave=leave) as display:

        def advance(count: int) -> None:
            display(count)
            report.advance(count)

        try:
            yield advance
        finally:
            report.end_bar()


@contextmanager
def _displayed(
    description: str, *, total: int | None, unit: str, done: int, leave: bool
) -> Iterator[Callable[[int], object]]:
    """Show the bar or the lines, and yield the function that advances them."""
    if sys.stderr.isatty():
        scale = unit == "B"
        with tqdm(
            desc=description,
            total=total,
            initial=done,
            unit=unit,
            unit_scale=scale,
            leave=leave,
            delay=BAR_DELAY_SECONDS,
        ) as bar:
            yield bar.update
    else:
        yield _LogLines(description, total=total, done=done, unit=unit).advance


class _LogLines:
    """A printer of the progress for logs, with at most one line every SECONDS_BETWEEN_LINES."""

    def __init__(self, description: str, *, total: int | None, done: int, unit: str) -> None:
        self._description, self._total, self._done, self._unit = description, total, done, unit
        self._last_line = time.monotonic()

    def advance(self, count: int) -> None:
        """Add finished units; print a line if the last one is old enough."""
        self._done += count
        if time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(f"{self._description}: {self._amount()}", flush=True)

    def _amount(self) -> str:
        """Return what is done, and of how much, as in `2 of 3 steps`."""
        amounts = [self._done, self._total] if self._total else [self._done]
        if self._unit == "B":
            return " of ".join(map(format_bytes, amounts))
        return f"{' of '.join(f'{count:,}' for count in amounts)} {self._unit}"


def format_time_left(seconds: float) -> str:
    """Return an estimated time as text with one unit, such as `45 s`, `3 min` or `2.5 h`."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 99.5 else f"{minutes / 60:.1f} h"


def format_bytes(size: int) -> str:
    """Return a size in bytes as text, such as `163 MB`."""
    return f"{tqdm.format_sizeof(size)}B" if size >= 1000 else f"{size} bytes"
