"""Cleanup beside running DVC commands and flow runs, which it leaves alone or holds off."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.dvc_cleanup import hold_off_runs
from flows.workspace_folders import make_folder
from pipeline.core.errors import TemporaryError, UserError
from tests.conftest import start_repository
from tests.test_dvc_experiments import command

pytestmark = pytest.mark.slow


def wait_until(condition: Callable[[], Any]) -> None:
    while not condition():
        time.sleep(0.1)


STAGE = """
stages:
  wait:
    cmd: touch {folder}/begun && while [ -e {folder}/hold ]; do sleep 0.1; done && echo x > out
    params: [value]
    outs: [out]
"""


@pytest.fixture
def waiting(tmp_path: Path) -> Path:
    """A DVC project whose one stage runs until the file `hold` beside the project is gone."""
    folder = tmp_path / "waiting"
    folder.mkdir()
    command("git", "init", "-q", folder=folder)
    command("dvc", "init", "-q", folder=folder)
    (folder / "dvc.yaml").write_text(STAGE.format(folder=tmp_path))
    (folder / "params.yaml").write_text("value: 1\n")
    start_repository(folder)
    for name in ("user.name", "user.email"):
        command("git", "config", name, "t", folder=folder)
    (tmp_path / "hold").touch()
    return folder


QUEUE = "dvc exp run --queue -S value=2 && dvc queue start"


@pytest.mark.parametrize("what", ["dvc repro", "dvc exp run -S value=2", "dvc exp run --temp -S value=2", QUEUE])
def test_a_command_of_dvc_that_runs_is_left_alone(waiting: Path, what: str) -> None:
    with subprocess.Popen(
        ["sh", "-c", what],
        cwd=waiting,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdout=subprocess.DEVNULL,
    ) as process:
        wait_until((waiting.parent / "begun").exists)
        try:
            with pytest.raises(TemporaryError, match="dvc"), hold_off_runs(waiting):
                pass
        finally:
            (waiting.parent / "hold").unlink()
        process.wait()
    assert process.returncode == 0

    def is_over() -> bool:
        try:
            with hold_off_runs(waiting):
                return True
        except TemporaryError:
            return False

    wait_until(is_over)


def test_a_flow_run_that_is_running_is_left_alone_and_one_that_starts_waits(waiting: Path) -> None:
    begun, finish = threading.Event(), threading.Event()

    def run() -> None:
        with make_folder(waiting, "a-run"):
            begun.set()
            finish.wait()

    with hold_off_runs(waiting):
        thread = threading.Thread(target=run)
        thread.start()
        assert not begun.wait(0.5)
    assert begun.wait(60)
    with (
        pytest.raises(TemporaryError, match=r"flow runs of this project are running \(a-run\)"),
        hold_off_runs(waiting),
    ):
        pass
    finish.set()
    thread.join()
    with hold_off_runs(waiting):
        pass


def test_a_damaged_record_of_processes_is_reported(waiting: Path) -> None:
    (waiting / ".dvc/tmp").mkdir(exist_ok=True)
    (waiting / ".dvc/tmp/rwlock").write_text("{")
    with pytest.raises(UserError, match="rwlock is damaged; if no dvc command runs here: rm "), hold_off_runs(waiting):
        pass
