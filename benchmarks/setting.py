"""What the benchmarks have in common before they measure: options, and folders and programs to work in."""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ways import CIFAR10
from pipeline.core.errors import UserError

PROJECT = Path(__file__).resolve().parents[1]


def options(name: str, documentation: str | None, *, repeats: str, default: int) -> argparse.ArgumentParser:
    """A parser that takes how often to measure: `repeats`, called ROUNDS or SEEDS in its help."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=documentation,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    help_text = f"how often to measure; default: {default}"
    parser.add_argument("repeats", nargs="?", type=positive, default=default, metavar=repeats, help=help_text)
    return parser


def positive(text: str) -> int:
    """For argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed: a whole number from 1")
    return int(text)


def scratch() -> tempfile.TemporaryDirectory[str]:
    """An empty folder on the project's file system."""
    CIFAR10.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=CIFAR10.parent.resolve())


def timed(*command: str, cwd: Path, without: Sequence[str] = ()) -> tuple[float, str]:
    """The seconds of a program of this environment, some variables left out, and what it printed.

    Raises UserError where it fails.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "true"}
    for name in without:
        environment.pop(name, None)
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=cwd, env=environment, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise UserError(f"{' '.join(command)} ended with status {done.returncode}: {done.stdout[-500:]}")
    return time.perf_counter() - start, done.stdout


def clone(folder: Path) -> None:
    """Of the commit that is checked out; raises UserError where the checkout has other code."""
    _, changes = timed("git", "status", "--porcelain", "--", "*.py", "dvc.yaml", "recipes", cwd=PROJECT)
    if changes:
        raise UserError(f"found uncommitted changes, which a clone would lack: {changes}; commit them first")
    timed("git", "clone", "--quiet", str(PROJECT), str(folder), cwd=PROJECT)
