"""Parse the options of the benchmarks; make the folders and clones, and run the programs, that they measure."""

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
    """Return a parser with the argument `repeats`, how often to measure; `repeats` is its name in the help text."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=documentation,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    help_text = f"how often to measure; default: {default}"
    parser.add_argument("repeats", nargs="?", type=positive, default=default, metavar=repeats, help=help_text)
    return parser


def positive(text: str) -> int:
    """Convert an argument to a whole number from 1; argparse reports the error."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed: a whole number from 1")
    return int(text)


def scratch() -> tempfile.TemporaryDirectory[str]:
    """Return an empty temporary folder on the file system of the project, for a `with` statement."""
    CIFAR10.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=CIFAR10.parent.resolve())


def timed(*command: str, cwd: Path, without: Sequence[str] = ()) -> tuple[float, str]:
    """Run a program of this environment; return its seconds and its output.

    `without` names environment variables that it does not get. Raises UserError where it fails.
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
        raise UserError(
            f"{' '.join(command)} ended with status {done.returncode}; fix what it reports, and run this again: "
            f"{done.stdout[-500:]}"
        )
    return time.perf_counter() - start, done.stdout


def check_is_committed() -> None:
    """Raise UserError where the checkout has uncommitted code or parameters."""
    _, changes = timed("git", "status", "--porcelain", "--", "*.py", "*.yaml", cwd=PROJECT)
    if changes:
        names = ", ".join(changes.splitlines())
        raise UserError(f"found uncommitted changes, which a clone does not have: {names}; commit them first")


def clone(folder: Path) -> None:
    """Clone the commit that is checked out into `folder`; raise UserError where the checkout has uncommitted code."""
    check_is_committed()
    timed("git", "clone", "--quiet", str(PROJECT), str(folder), cwd=PROJECT)
