"""How far a long step is: a live bar on a terminal; elsewhere, as in a flow run's log, a line now and then."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

LINE_SECONDS = 10.0
BAR_DELAY_SECONDS = 0.5


@contextmanager
def progress(
    description: str, *, total: int | None, unit: str, done: int = 0, leave: bool = True
) -> Iterator[Callable[[int], object]]:
    """Give the function that counts on by so many units; a bar that does not `leave` is wiped once it is done."""
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
        yield _Lines(description, total=total, done=done, unit=unit).advance


class _Lines:
    def __init__(self, description: str, *, total: int | None, done: int, unit: str) -> None:
        self._description, self._total, self._done, self._unit = description, total, done, unit
        self._told = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        if time.monotonic() - self._told >= LINE_SECONDS:
            self._told = time.monotonic()
            of = f" of {self._amount(self._total)}" if self._total else ""
            print(f"{self._description}: {self._amount(self._done)}{of}", flush=True)

    def _amount(self, count: int) -> str:
        return in_bytes(count) if self._unit == "B" else f"{count:,} {self._unit}"


def in_bytes(size: int) -> str:
    """`163 MB` and the like."""
    return f"{tqdm.format_sizeof(size)}B" if size >= 1000 else f"{size} bytes"
