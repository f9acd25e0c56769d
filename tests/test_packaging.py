"""The project is a checkout to clone: building a package from it is refused with a reason."""

import subprocess
import venv
from pathlib import Path

import pytest

from tests.conftest import PROJECT


@pytest.fixture(scope="module")
def pip(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the command of a new pip, as the project's environment has none."""
    folder = tmp_path_factory.mktemp("pip")
    venv.create(folder, with_pip=True)
    return [str(folder / "bin/python"), "-m", "pip", "--isolated", "--disable-pip-version-check"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [["wheel"], ["install", "--target", "."], ["install", "--target", ".", "--editable"]]
)
def test_a_build_fails_with_the_reason_and_the_remedy(command: list[str], pip: list[str], tmp_path: Path) -> None:
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
