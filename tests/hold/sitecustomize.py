"""Pause a training at a line of its output; Python imports this module at its start if PYTHONPATH has its folder.

The variable HOLD names a file that contains the beginning of the line. The first training that prints such a line
renames the file to `<file>.reached`, and waits until that file is removed or a signal arrives.
"""

import os
import select
import signal
import sys
from pathlib import Path


def hold(file: Path) -> None:
    """Make `sys.stdout` wait after the line that begins with the content of the file."""
    beginning, write, found = file.read_text(encoding="utf-8"), sys.stdout.write, False

    def write_and_wait(text: str) -> int:
        nonlocal found
        found = found or text.startswith(beginning)
        if not found or not text.endswith("\n") or not file.exists():
            return write(text)
        signals, signal_writer = os.pipe()
        os.set_blocking(signal_writer, False)
        signal.set_wakeup_fd(signal_writer)
        reached = file.rename(f"{file}.reached")
        written = write(text)
        sys.stdout.flush()
        while reached.exists() and not select.select([signals], [], [], 0.05)[0]:
            pass
        signal.set_wakeup_fd(-1)
        return written

    setattr(sys.stdout, "write", write_and_wait)  # noqa: B010  (mypy)


if "pipeline.train" in sys.orig_argv and "HOLD" in os.environ and Path(os.environ["HOLD"]).exists():
    hold(Path(os.environ["HOLD"]))
