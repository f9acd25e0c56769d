"""The step download packs folders of images, and refuses unusable ones in one line."""

import json
import os
import shutil
import sys
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from PIL import Image

from pipeline.core.errors import EXIT_USER, UserError
from pipeline.download import download
from pipeline.params import DownloadParams
from tests.download import (
    OUT,
    download_params,
    listing,
    project,  # noqa: F401  # a fixture that each test uses
    run_main,
)


def imagefolder(folder: str | Path = "images") -> DownloadParams:
    return download_params(dataset="imagefolder", folder=str(folder))


def make_tree(*names: str, root: str | Path = "images") -> Path:
    """Write images, each of another color, at these paths below `root`; text for .txt, folders without a suffix."""
    for index, name in enumerate(names):
        path = Path(root) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("text")
        elif path.suffix:
            Image.new("RGB", (4, 4), (index % 256, 7, 9)).save(path, format="PNG")
        else:
            path.mkdir(exist_ok=True)
    return Path(root)


def classes(*names: str, count: int = 3, prefix: str = "") -> list[str]:
    return [f"{prefix}{name}/{n}.png" for name in names for n in range(count)]


def packed() -> list[str]:
    with tarfile.open(OUT / "images.tar") as archive:
        return archive.getnames()


def source() -> dict[str, object]:
    content: dict[str, object] = json.loads((OUT / "source.json").read_text(encoding="utf-8"))
    return content


def test_class_folders_are_packed_as_train() -> None:
    make_tree(*classes("dog", "cat"), "README.txt")
    download(imagefolder())
    assert packed() == [f"train/{name}/{n}.png" for name in ("cat", "dog") for n in range(3)]
    assert source() == {
        "dataset": "imagefolder",
        "class_names": ["cat", "dog"],
        "counts": {"train": {"cat": 3, "dog": 3}},
        "ignored_files": [],
        "undecodable_files": [],
        "files": {"found": 7, "used": 6, "not_used": {"other files outside the class folders": 1}},
    }


def test_split_folders_keep_their_splits_under_the_standard_names() -> None:
    splits = {"Train": 2, "val": 1, "test": 1}
    make_tree(*(name for split, n in splits.items() for name in classes("a", "b", count=n, prefix=f"{split}/")))
    (Path("images/test/b/0.png")).unlink()
    Path("images/test/b").rmdir()
    download(imagefolder())
    assert packed() == [
        "test/a/0.png",
        *(f"train/{name}/{n}.png" for name in "ab" for n in range(2)),
        "validation/a/0.png",
        "validation/b/0.png",
    ]
    assert source()["counts"] == {
        "train": {"a": 2, "b": 2},
        "validation": {"a": 1, "b": 1},
        "test": {"a": 1, "b": 0},
    }


def test_a_class_may_be_called_train() -> None:
    make_tree(*classes("bus", "train"))
    download(imagefolder())
    assert source()["class_names"] == ["bus", "train"]


def test_the_content_of_files_is_packed_unchanged() -> None:
    root = make_tree(*classes("a", "b"))
    download(imagefolder())
    with tarfile.open(OUT / "images.tar") as archive:
        content = archive.extractfile("train/b/1.png")
        assert content is not None
        assert content.read() == (root / "b/1.png").read_bytes()


def test_subfolders_belong_to_the_class_and_other_files_are_listed() -> None:
    make_tree(
        *classes("a", "b"), "a/deep/er/x.JPG", "a/notes.txt", "b/.hidden/y.png", "b/Thumbs.db", "__MACOSX/a/._x.png"
    )
    download(imagefolder())
    assert "train/a/deep/er/x.JPG" in packed()
    assert len(packed()) == 7
    assert source()["ignored_files"] == ["train/a/notes.txt"]


def test_names_in_any_language_are_normalized_and_sorted_by_code_point() -> None:
    names = [
        "кот/снимок 1.png",
        "кот/e\u0301te\u0301.png",
        "кот/a/z.png",
        "кот/a b/z.png",
        "犬/柴.png",
        f"犬/{'長' * 70}.png",
    ]
    make_tree(*names, *classes("кот", "犬", count=2))
    download(imagefolder())
    expected = [name.replace("e\u0301", "\u00e9") for name in [*names, *classes("кот", "犬", count=2)]]
    assert packed() == sorted(f"train/{name}" for name in expected)
    assert source()["class_names"] == ["кот", "犬"]


def test_a_copy_of_the_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    root = make_tree(*classes("a", "b"), "a/très long.png", "a/notes.txt")
    download(imagefolder(root))
    first = {path.name: path.read_bytes() for path in OUT.iterdir()}
    copied = Path(shutil.copytree(root, tmp_path / "elsewhere", copy_function=shutil.copyfile))
    (copied / "a/0.png").chmod(0o600)
    os.utime(copied / "a/0.png", (1, 1))
    download(imagefolder(copied))
    assert {path.name: path.read_bytes() for path in OUT.iterdir()} == first


BAD_FOLDERS: dict[str, tuple[list[str], str]] = {
    "missing": ([], "does not exist"),
    "empty": (["images"], "has no folders"),
    "no folders": (["images/a.png"], "has no folders"),
    "a file": (["images.txt"], "is not a folder"),
    "one class": (classes("a", prefix="images/"), "only one class, 'a'"),
    "wrapped beside an image": (
        [*classes("a", "b", prefix="images/mine/"), "images/0.png"],
        "set download.folder to 'images/mine'",
    ),
    "class without images": ([*classes("a", "b", prefix="images/"), "images/c/notes.txt"], "'images/c' has no images"),
    "class with one image": ([*classes("a", "b", prefix="images/"), "images/c/0.png"], "c 1; allowed: at least 3"),
    "two where test is given": (
        [*classes("a", "b", count=1, prefix="images/train/"), *classes("a", prefix="images/test/")],
        "a 1, b 1; allowed: at least 2",
    ),
    "no train": (classes("a", "b", prefix="images/test/"), "no train"),
    "splits without classes": (["images/train/0.png", "images/test/0.png"], "'images/train' has no class folders"),
    "unsorted test": ([*classes("a", "b", prefix="images/train/"), "images/test/0.png"], "'images/test' has no class"),
    "beside splits": (
        classes("a", "b", prefix="images/train/") + classes("extra", prefix="images/"),
        "'images/extra' beside",
    ),
    "two validations": (
        [name for split in ("train", "val", "valid") for name in classes("a", "b", prefix=f"images/{split}/")],
        "are the split validation",
    ),
    "unknown class in test": (
        [*classes("a", "b", prefix="images/train/"), *classes("c", prefix="images/test/")],
        "'images/test/c' is a class that train does not have",
    ),
    "same name in two forms": (
        [*classes("a", "b", prefix="images/"), "images/a/\u00e9.png", "images/a/e\u0301.png"],
        "differ only in their Unicode form",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_an_unusable_folder_is_reported_in_one_line(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    names, expected = BAD_FOLDERS[case]
    make_tree(*names, root=".")
    OUT.mkdir(parents=True)
    (OUT / "images.tar").write_bytes(b"good")
    status, stderr = run_main(capfd, dataset="imagefolder", folder="images.txt" if case == "a file" else "images")
    assert status == EXIT_USER
    assert stderr.startswith("error: download.folder: ")
    assert stderr.count("\n") == 1
    assert expected in stderr
    assert "allowed: " in stderr
    assert (OUT / "images.tar").read_bytes() == b"good"
    assert listing() == ["images.tar"]


@pytest.mark.skipif(sys.platform == "darwin", reason="the file system admits UTF-8 names only")
def test_a_name_that_is_not_utf8_is_refused() -> None:
    make_tree(*classes("a", "b"))
    shutil.copy(b"images/a/0.png", b"images/a/\xff.png")
    with pytest.raises(UserError, match="not UTF-8"):
        download(imagefolder())


def peak_bytes() -> int:
    """Return the peak memory of packing, the least of three runs, as the interpreter's own tables sometimes grow."""
    peaks = []
    for _ in range(3):
        tracemalloc.start()
        download(imagefolder())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    return min(peaks)


def test_the_memory_of_packing_does_not_grow_with_the_number_of_files() -> None:
    root = make_tree(*classes("a", "b"))
    few = peak_bytes()
    for n in range(2_000):
        path = root / f"a/{n // 50}/{n}.png"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert peak_bytes() < few + 200_000
