"""The command line accepts a folder of images, and checks it before a server starts."""

from pathlib import Path

import pytest

from flows import PROJECT, command_line
from flows.command_line import parse_arguments, read_overrides
from flows.train_classifier import train_classifier
from pipeline.core.errors import UserError


@pytest.fixture(autouse=True)
def in_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the check of the content of the folder."""
    monkeypatch.setattr(command_line, "check_inputs", lambda _params: None)


def folder_of(*arguments: str) -> str:
    return str(read_overrides(parse_arguments(list(arguments)))["download.folder"])


@pytest.mark.usefixtures("unchecked")
def test_a_folder_with_any_path_is_accepted_unchanged(tmp_path: Path) -> None:
    folder = tmp_path / "my photos #1 é: 'x' $HOME"
    folder.mkdir()
    assert folder_of("--images", str(folder)) == str(folder)
    assert parse_arguments(["--images", str(folder)]).recipe == "my_images"
    assert parse_arguments([]).recipe == "digits"


@pytest.mark.usefixtures("unchecked")
def test_paths_in_the_home_folder_and_in_the_project_are_resolved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "photos").mkdir()
    assert folder_of("--images", "~/photos") == str(tmp_path / "photos")
    assert folder_of("--images", "data/../data/images") == folder_of("--images", f"{PROJECT}/data/images")
    assert folder_of("--images", "data/images") == "data/images"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--images", "/no/such folder"], "download.folder: '/no/such folder' does not exist"),
        (["--images", "data/images", "--recipe", "digits"], "recipe digits has download.dataset digits"),
        (["--images", "data/images", "--set", "download.folder=x"], "--set download.folder and --images: found both"),
        (["--set", "download.folder=no/such"], "does not exist; allowed: <class>/… or <split>/<class>/… with"),
        (["--recipe", "nothing"], "recipe: found 'nothing'"),
    ],
)
def test_an_error_is_reported_in_one_line_before_a_server_starts(
    arguments: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["train_classifier", *arguments])
    with pytest.raises(SystemExit) as status:
        command_line.main(train_classifier)
    assert status.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert expected in line


def test_a_checkout_without_a_repository_is_refused_before_a_server_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command_line, "PROJECT", tmp_path)
    with pytest.raises(UserError, match="not in a git repository"):
        read_overrides(parse_arguments([]))
