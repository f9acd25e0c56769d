"""The project is a checkout to clone: building a package from it is refused with a reason."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PROJECT


@pytest.mark.parametrize(
    "command", [["wheel"], ["install", "--target", "."], ["install", "--target", ".", "--editable"]]
)
def test_a_build_ends_with_the_reason_and_the_remedy(command: list[str], tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, command[0], "--no-index", "--no-deps", *command[1:], str(PROJECT)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "error: this project runs from its checkout" in done.stderr
    assert "clone it and run `make run`" in done.stderr
    assert not list(tmp_path.iterdir())
