"""Steps of the pipeline in processes forked from one that has imported what takes seconds to import."""

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
PRELOADED = ["torch", "torchvision", "mlflow", "matplotlib.pyplot", "pandas", "tests.hold.sitecustomize"]
PRELOADED += [f"pipeline.{name}" for name in ("tracking.runs", "training.loop", "evaluation.plots")]
PRELOADED += [f"pipeline.{name}" for name in ("datasets.raw", "datasets.imagefolder", "images.duplicates")]
"""No step itself, which each process runs as its main module."""


class Process:
    """A running step. It has what the tests use of `subprocess.Popen`; `stdout` and `stderr` are pipes of text."""

    def __init__(self, step: str, *, folder: Path, environment: Mapping[str, str], joined: bool = False) -> None:
        context = _context()
        out, to_out = context.Pipe(duplex=False)
        err, to_err = context.Pipe(duplex=False)
        arguments = (step, str(folder), dict(environment), to_out, to_out if joined else to_err)
        self._process = context.Process(target=_run, args=arguments)  # no daemon, so that it may have children
        self._process.start()
        to_out.close()
        to_err.close()
        self.stdout, self.stderr = _text(out), _text(err)
        assert self._process.pid
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """As of `subprocess.Popen`: negative after a signal, None while the process lives."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> int:
        self._process.join()
        assert self.returncode is not None
        return self.returncode

    def communicate(self) -> tuple[str, str]:
        """What is still to be read of stdout and stderr, once the process has ended."""
        found: list[str] = []
        reader = threading.Thread(target=lambda: found.append(self.stderr.read()))
        reader.start()
        output = self.stdout.read()
        reader.join()
        self.wait()
        return output, found[0]

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _kill_all() -> None:
    """Kill what a failed test left: the interpreter would wait for it at its end."""
    for process in multiprocessing.active_children():
        process.kill()


@cache
def _context() -> ForkServerContext:
    atexit.register(_kill_all)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with chdir(PROJECT):  # from where it imports the pipeline
        forkserver.ensure_running()
    return context


def _text(pipe: Connection) -> IO[str]:
    with pipe:
        return os.fdopen(os.dup(pipe.fileno()), encoding="utf-8")


def _run(step: str, folder: str, environment: dict[str, str], out: Connection, err: Connection) -> None:
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    out.close()
    err.close()
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    get_settings.cache_clear()  # which the import of the pipeline has filled
    os.chdir(folder)
    sys.argv[1:] = []
    if "HOLD" in environment:
        hold(Path(environment["HOLD"]))
    runpy.run_module(f"pipeline.{step}", run_name="__main__", alter_sys=True)
