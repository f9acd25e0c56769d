"""The pipeline runs for a user id without a name or a home, and with a limit on CPU cores."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline
from pipeline.artifacts import cache_folder
from pipeline.core.processes import num_cores
from pipeline.core.settings import get_settings
from tests.conftest import PROJECT

NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")
CACHES = ("XDG_CACHE_HOME", "MPLCONFIGDIR", "TRITON_HOME")


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to an empty folder, and unset all variables that name the user."""
    for name in (*NAMES, *CACHES, "PIPELINE_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # monkeypatch then restores it, even if the test sets it
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def test_a_user_id_without_an_entry_gets_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 5)
    pipeline._ensure_user()
    assert os.environ["LOGNAME"] == f"uid-{2**31 - 5}"


def test_a_known_user_keeps_name_home_and_caches(tmp_path: Path) -> None:
    pipeline._ensure_user()
    assert os.environ["HOME"] == str(tmp_path)
    assert not set(os.environ) & {*NAMES, *CACHES}


def test_a_missing_home_folder_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/nonexistent")
    pipeline._ensure_user()
    assert Path.home() == tmp_path / ".cache" / "home"


def test_the_home_of_an_experiment_in_a_temporary_folder_is_in_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setenv("PIPELINE_CACHE_DIR", "")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("PIPELINE_PROJECT", raising=False)
    temporary = tmp_path / ".dvc/tmp/exps/tmpabcdef"
    temporary.mkdir(parents=True)
    monkeypatch.chdir(temporary)
    pipeline._ensure_user()
    assert Path.home() == tmp_path / ".cache" / "home"
    assert cache_folder("x") == tmp_path / ".cache" / "x"
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setenv("PIPELINE_CACHE_DIR", "kept")
    get_settings.cache_clear()
    pipeline._ensure_user()
    assert Path.home() == tmp_path / "kept" / "home"


def test_an_unset_home_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 5)
    pipeline._ensure_user()
    assert Path.home() == tmp_path / ".cache" / "home"


def test_caches_of_a_read_only_home_are_moved_into_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    monkeypatch.setenv("MPLCONFIGDIR", "mine")
    pipeline._ensure_user()
    assert os.environ["HOME"] == str(tmp_path)
    assert os.environ["MPLCONFIGDIR"] == "mine"
    assert os.environ["XDG_CACHE_HOME"] == str(tmp_path / ".cache" / "home")


def test_only_cores_that_the_process_may_use_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(everything)})
    try:
        assert num_cores() == 1
    finally:
        os.sched_setaffinity(0, everything)
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")  # as in a container that is limited to one core
    assert num_cores() == 1


def test_cores_are_counted_in_one_place() -> None:
    files = [*PROJECT.glob("pipeline/**/*.py"), *PROJECT.glob("flows/**/*.py"), *PROJECT.glob("benchmarks/**/*.py")]
    counting = re.compile(r"cpu_count|len\(os.sched_getaffinity")
    assert [path.name for path in files if counting.search(path.read_text())] == ["processes.py"]


def test_a_file_does_not_get_the_descriptor_of_a_closed_standard_output(tmp_path: Path) -> None:
    code = "import os, sys, pipeline; print(open('x').fileno(), sys.stdout.fileno(), file=sys.stderr)"
    (tmp_path / "x").touch()
    command = ["/bin/sh", "-c", '"$0" -c "$1" >&-', sys.executable, code]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, check=True)
    number, stdout = map(int, done.stderr.split())
    assert (number > 2, stdout) == (True, 1)
