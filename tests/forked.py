"""Run steps of the pipeline in processes that are forked from one that has already done the slow imports."""

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import chdir
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import IO

from pipeline.core.settings import get_settings
from tests.hold.sitecustomize import hold

PROJECT = Path(__file__).parents[1]
# The steps themselves are not in it: each process runs one of them as its main module.
PRELOADED = ["torch", "torchvision", "mlflow", "matplotlib.pyplot", "pandas", "tests.hold.sitecustomize"]
PRELOADED += [f"pipeline.{name}" for name in ("tracking.runs", "training.loop", "evaluation.plots")]
PRELOADED += [f"pipeline.{name}" for name in ("datasets.raw", "datasets.imagefolder", "images.duplicates")]


class Process:
    """A running step with text pipes `stdout` and `stderr`, and the methods of `subprocess.Popen` that tests use."""

    def __init__(self, step: str, *, folder: Path, environment: Mapping[str, str], merge_stderr: bool = False) -> None:
        context = _context()
        stdout, to_stdout = context.Pipe(duplex=False)
        stderr, to_stderr = context.Pipe(duplex=False)
        arguments = (step, str(folder), dict(environment), to_stdout, to_stdout if merge_stderr else to_stderr)
        self._process = context.Process(target=_run, args=arguments)  # not a daemon, as a daemon may have no children
        self._process.start()
        to_stdout.close()
        to_stderr.close()
        self.stdout, self.stderr = _text(stdout), _text(stderr)
        assert self._process.pid
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Return the exit status as `subprocess.Popen` does: negative after a signal, None while the process runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> int:
        self._process.join()
        assert self.returncode is not None
        return self.returncode

    def communicate(self) -> tuple[str, str]:
        """Wait for the process to end, and return the unread rest of its stdout and stderr."""
        stderr: list[str] = []
        reader = threading.Thread(target=lambda: stderr.append(self.stderr.read()))
        reader.start()
        stdout = self.stdout.read()
        reader.join()
        self.wait()
        return stdout, stderr[0]

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _kill_all() -> None:
    """Kill processes that a failed test left, as the interpreter would wait for them at its exit."""
    for process in multiprocessing.active_children():
        process.kill()


@cache
def _context() -> ForkServerContext:
    atexit.register(_kill_all)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with chdir(PROJECT):  # the fork server imports the pipeline from the current folder
        forkserver.ensure_running()
    return context


def _text(pipe: Connection) -> IO[str]:
    with pipe:
        return os.fdopen(os.dup(pipe.fileno()), encoding="utf-8")


def _run(step: str, folder: str, environment: dict[str, str], stdout: Connection, stderr: Connection) -> None:
    os.dup2(stdout.fileno(), 1)
    os.dup2(stderr.fileno(), 2)
    stdout.close()
    stderr.close()
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    get_settings.cache_clear()  # the import of the pipeline has filled this cache
    os.chdir(folder)
    sys.argv[1:] = []
    if "HOLD" in environment:
        hold(Path(environment["HOLD"]))
    runpy.run_module(f"pipeline.{step}", run_name="__main__", alter_sys=True)
