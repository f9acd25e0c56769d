"""Files, folders, patterns and lists become inputs in a fixed order; what names nothing becomes one with a reason."""

import errno
import io
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import UserError
from pipeline.prediction import inputs as module
from pipeline.prediction.inputs import Input, expand_paths
from tests.raw_folders import encoded, noise


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def expand(*arguments: str, stdin: bytes = b"", null: bool = False) -> list[Input]:
    return list(expand_paths(arguments, stdin=io.BytesIO(stdin), null=null))


def paths(*arguments: str, stdin: bytes = b"", null: bool = False) -> list[str]:
    found = expand(*arguments, stdin=stdin, null=null)
    assert not [each for each in found if each.error]
    return [each.path for each in found]


# ---- files and folders


def test_files_and_folders_keep_their_order_and_what_is_named_twice_is_answered_twice(here: Path) -> None:
    touch("b.jpg", "photos/2.png", "photos/1.png", "notes.txt")
    assert paths("b.jpg", "photos", "b.jpg") == ["b.jpg", "photos/1.png", "photos/2.png", "b.jpg"]
    assert paths("gone.jpg", "notes.txt") == ["gone.jpg", "notes.txt"]


def test_a_folder_is_searched_with_its_folders_sorted_by_name(here: Path) -> None:
    touch("p/b.jpg", "p/a/2.JPG", "p/a/1.webp", "p/a/deep/er/0.png", "p/c/1.gif", "p/z.tiff")
    expected = ["p/b.jpg", "p/z.tiff", "p/a/1.webp", "p/a/2.JPG", "p/a/deep/er/0.png", "p/c/1.gif"]
    assert paths("p") == paths("p/") == expected
    assert paths(".") == [f"./{path}" for path in expected]


def test_hidden_files_and_files_of_other_kinds_are_left_out(here: Path) -> None:
    touch("p/1.jpg", "p/.2.jpg", "p/.git/3.jpg", "p/@eaDir/4.jpg", "p/notes.txt", "p/film.mov", "p/scan.pdf")
    os.mkfifo("p/pipe.jpg")
    Path("p/link-to-a-device.jpg").symlink_to("/dev/zero")
    assert paths("p") == ["p/1.jpg"]


def test_a_file_without_a_known_suffix_is_recognized_by_its_content(here: Path) -> None:
    touch("p/unknown")
    Path("p/IMG_0001").write_bytes(encoded(noise(0), "JPEG"))
    assert paths("p") == ["p/IMG_0001"]


def test_a_raw_file_is_an_input_unless_an_image_of_the_same_name_is_beside_it(here: Path) -> None:
    touch("p/1.CR2", "p/1.jpg", "p/2.dng", "p/q/1.nef")
    assert paths("p") == ["p/1.jpg", "p/2.dng", "p/q/1.nef"]


def test_links_are_followed_except_to_a_folder_that_they_are_in(here: Path) -> None:
    touch("elsewhere/1.jpg", "elsewhere/more/2.jpg", "p/q/3.jpg")
    Path("p/linked.jpg").symlink_to("../elsewhere/1.jpg")
    Path("p/gone.jpg").symlink_to("nowhere")
    Path("p/loop.jpg").symlink_to("loop.jpg")
    Path("p/more").symlink_to("../elsewhere/more")
    Path("p/q/up").symlink_to("..")
    Path("elsewhere/more/back").symlink_to("../../p")
    assert paths("p") == ["p/gone.jpg", "p/linked.jpg", "p/loop.jpg", "p/more/2.jpg", "p/q/3.jpg"]


def test_very_deep_folders_are_searched(here: Path) -> None:
    folder = "p" + "/d" * 1100
    command = "import os\nfor _ in range(1100): os.mkdir('d'); os.chdir('d')\nopen('1.jpg', 'w')"
    Path("p").mkdir()
    subprocess.run([sys.executable, "-c", command], cwd="p", check=True)
    assert paths("p") == [f"{folder}/1.jpg"]
    subprocess.run(["rm", "-r", "p"], check=True)


def test_a_name_that_is_not_utf8_is_kept(here: Path) -> None:
    touch("p/\udcff.jpg")
    assert paths("p") == paths("p/*") == ["p/\udcff.jpg"]
    assert paths("-", stdin=b"p/\xff.jpg\n") == ["p/\udcff.jpg"]


def test_a_folder_without_images_is_an_input_with_the_reason(here: Path) -> None:
    touch("p/notes.txt", "b.jpg")
    assert expand("p", "b.jpg") == [Input("p", "a folder without images; name one with images"), Input("b.jpg")]


def test_a_folder_that_may_not_be_read_is_an_input_with_the_reason(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch("p/locked/1.jpg", "p/open/2.jpg")
    monkeypatch.setattr(module, "_list", refusing("p/locked", module._list))
    for arguments in (["p"], ["p/*"], ["p/**/*.jpg"], ["p/*/*.jpg"]):
        locked, other = expand(*arguments)
        assert (locked.path.rstrip("/"), locked.error) == ("p/locked", "Permission denied")
        assert other == Input("p/open/2.jpg")


def refusing(locked: str, list_folder: Any) -> Any:
    """Return a function that lists folders, except one that may not be read; root may read all real ones."""

    def list_or_refuse(folder: str, **options: Any) -> Any:
        if folder.rstrip("/") == locked:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)
        return list_folder(folder, **options)

    return list_or_refuse


def test_a_folder_that_vanishes_while_it_is_searched_is_an_input_with_the_reason(here: Path) -> None:
    touch("p/1.jpg", "p/q/2.jpg", "p/r/3.jpg")
    found = expand_paths(["p"], stdin=io.BytesIO(), null=False)
    assert next(found) == Input("p/1.jpg")
    Path("p/q/2.jpg").unlink()
    Path("p/q").rmdir()
    assert list(found) == [Input("p/q", "no such file"), Input("p/r/3.jpg")]


def test_what_only_this_process_can_open_is_marked(here: Path) -> None:
    os.mkfifo("pipe")
    assert expand("pipe", "/dev/stdin") == [Input("pipe", here_only=True), Input("/dev/stdin", here_only=True)]


# ---- patterns


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("p/*.jpg", ["p/1.jpg", "p/3.jpg"]),
        ("p/[!1].jpg", ["p/3.jpg"]),
        ("p/?.*", ["p/1.jpg", "p/2.png", "p/3.jpg", "p/n.txt"]),
        ("p/**/*.jpg", ["p/1.jpg", "p/3.jpg", "p/a/1.jpg", "p/a/b/1.jpg"]),
        ("**/b/*", ["p/a/b/1.jpg"]),
        ("*/a/1.jpg", ["p/a/1.jpg"]),
        ("p/.*", ["p/.4.jpg", "p/.hidden/5.jpg"]),
        ("./p/*.png", ["./p/2.png"]),
        ("p/**", ["p/1.jpg", "p/2.png", "p/3.jpg", "p/n.txt", "p/a/1.jpg", "p/a/b/1.jpg"]),
        ("p/a*", ["p/a/1.jpg", "p/a/b/1.jpg"]),
        ("p/*/", ["p/a/1.jpg", "p/a/b/1.jpg"]),
        ("p/a/../*.png", ["p/a/../2.png"]),
    ],
)
def test_a_pattern_stands_for_what_matches_in_sorted_order(here: Path, pattern: str, expected: list[str]) -> None:
    touch("p/3.jpg", "p/1.jpg", "p/2.png", "p/n.txt", "p/.4.jpg", "p/a/1.jpg", "p/a/b/1.jpg", "p/.hidden/5.jpg")
    assert paths(pattern) == expected
    assert paths(f"{here}/{pattern}") == [f"{here}/{path}" for path in expected]


def test_a_file_or_folder_of_that_very_name_has_precedence_over_a_pattern(here: Path) -> None:
    touch("[1].jpg", "1.jpg", "p*/1.jpg", "pp/2.jpg")
    assert paths("[1].jpg", "p*") == ["[1].jpg", "p*/1.jpg"]


@pytest.mark.parametrize("pattern", ["p/*.png", "gone/*.jpg", "gone/**/*.jpg", "p/1.jpg/*", "**/gone/1.jpg"])
def test_a_pattern_without_a_match_is_an_input_with_the_reason(here: Path, pattern: str) -> None:
    touch("p/1.jpg")
    assert expand(pattern, "p") == [Input(pattern, "no file matches this pattern"), Input("p/1.jpg")]


def test_a_pattern_with_two_stars_twice_is_refused(here: Path) -> None:
    touch("p/1.jpg")
    with pytest.raises(UserError, match=r"^\*\*/p/\*\*/\*.jpg: a pattern with \*\* twice; allowed: once"):
        expand("p", "**/p/**/*.jpg")


# ---- the list on standard input


def test_the_list_has_one_path_a_line_and_stands_where_it_is_named(here: Path) -> None:
    touch("a.jpg", "z.jpg")
    assert paths("z.jpg", "-", "a.jpg", stdin=b"\n b.jpg\n\n[c]*.jpg\nd.jpg") == [
        *("z.jpg", " b.jpg", "[c]*.jpg", "d.jpg", "a.jpg"),
    ]  # fmt: skip


def test_a_line_that_ends_with_a_carriage_return_has_this_as_the_reason(here: Path) -> None:
    touch("b.jpg\r")
    found, named_so = expand("-", stdin=b"a.jpg\r\nb.jpg\r\n")
    assert (found.path, named_so) == ("a.jpg\r", Input("b.jpg\r"))
    assert found.error.startswith("no such file; the line ends with a carriage return, ")
    assert expand("-", stdin=b"a.jpg\r\0", null=True) == [Input("a.jpg\r")]


def test_a_name_may_have_a_newline_in_a_list_with_nul(here: Path) -> None:
    assert paths("-", stdin=b"a\nb.jpg\0\0c.jpg\0", null=True) == ["a\nb.jpg", "c.jpg"]


@pytest.mark.parametrize(
    ("stdin", "problem"),
    [
        (b"", "no paths; allowed: one or more"),
        (b"\n\n", "no paths"),
        (b"a.jpg\0b.jpg\0", "found a NUL byte; .*; add --null"),
        (b"x" * 200_000, "a path of more than 65,536 bytes"),
    ],
)
def test_standard_input_without_a_list_is_refused(stdin: bytes, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        expand("-", stdin=stdin)


def test_the_list_may_be_named_once() -> None:
    with pytest.raises(UserError, match="twice; allowed: once"):
        expand("-", "-")


def test_the_list_is_read_as_it_comes(here: Path) -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as stdin, os.fdopen(writer, "wb", buffering=0) as program:
        found = expand_paths(["-"], stdin=stdin, null=False)
        program.write(b"a.jpg\nb.")
        assert next(found).path == "a.jpg"
        program.write(b"jpg\n")
        assert next(found).path == "b.jpg"


def test_the_paths_of_a_list_are_not_held_in_memory() -> None:
    stdin = io.BytesIO(b"".join(b"photographs/%06d.jpg\n" % number for number in range(20_000)))
    tracemalloc.start()
    number = sum(1 for _ in expand_paths(["-"], stdin=stdin, null=False))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert number == 20_000
    assert peak < 1_000_000  # all would take 2.7 MB
