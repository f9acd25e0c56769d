"""Make a temporary project with two registered models of the digits, and start servers of models in it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from benchmarks.setting import PROJECT, timed
from pipeline.core.errors import UserError
from pipeline.core.settings import get_settings
from pipeline.core.yaml import dump_yaml, read_yaml
from pipeline.tracking import registry
from pipeline.tracking.store import connect

NAME = "digits"
EPOCHS = 2
START_SECONDS = 300
STOP_SECONDS = 30


def make_project(folder: Path) -> None:
    """Change to the folder, and train two models there, which differ in their seed; the first is the champion."""
    shutil.copytree(PROJECT / "recipes", folder / "recipes")
    os.chdir(folder)
    os.environ |= {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "PYTHONPATH": str(PROJECT)}
    get_settings.cache_clear()
    params = read_yaml(PROJECT / "params.yaml")
    for seed in (0, 1):
        params["train"] |= {"epochs": EPOCHS, "seed": seed}
        Path("params.yaml").write_text(dump_yaml(params))
        for step in (*(("download", "normalize") if seed == 0 else ()), "train", "evaluate"):
            timed(sys.executable, "-m", f"pipeline.{step}", cwd=folder)
    connect()
    registry.set_alias(NAME, registry.CHAMPION, "1")


@contextmanager
def started(command: Sequence[str], *, health: str, log: Path) -> Iterator[None]:
    """Run a server during the block, from when the address `health` answers; end all its processes afterwards.

    Raises UserError where it does not start.
    """
    # MLflow starts uvicorn by its name
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
    try:
        _wait_until_ready(process, health, log=log)
        yield
    finally:
        _stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], health: str, *, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            if httpx.get(health, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.1)
    raise UserError(
        f"{' '.join(map(str, process.args))}: does not answer at {health}; fix what it reports: "  # type: ignore[arg-type]
        f"{log.read_text(errors='replace')[-500:]}"
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the processes to end, and kill those that do not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(STOP_SECONDS)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
