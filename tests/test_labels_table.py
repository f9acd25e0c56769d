"""Labels, splits and groups are read from a CSV file in the folder, and each error names its line."""

import re
from pathlib import Path
from typing import Any

import pytest

from flows.checks import check_inputs
from pipeline.artifacts import read_csv, read_json, write_checksums
from pipeline.core.errors import UserError
from pipeline.core.yaml import read_yaml
from pipeline.datasets.sources import open_source
from pipeline.download import download
from pipeline.images.blocks import Block
from pipeline.images.spool import hash_group
from pipeline.params import DownloadParams
from tests.conftest import DEFAULTS, PROJECT
from tests.download import (
    OUT,
    download_params,
    project,  # noqa: F401  # a fixture that each test uses
    run_main,
)
from tests.raw_folders import encoded, noise, params
from tests.test_download_imagefolder import packed, source

ROWS = [f"{name},{label}" for label in ("cat", "dog") for name in (f"{label}{n}.png" for n in range(3))]


def photographs(*names: str, root: str = "images") -> Path:
    """Write an image, each another one, at these paths below `root`."""
    for seed, name in enumerate(names):
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(noise(seed)))
    return Path(root)


def table(*lines: str, name: str = "labels.csv", header: str = "image,label", encoding: str = "utf-8") -> Path:
    """Write a table beside the images cat0.png, …, dog2.png."""
    photographs(*(row.partition(",")[0] for row in ROWS))
    path = Path("images", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *lines]) + "\n", encoding=encoding)
    return path


def labeled(labels: str = "auto") -> DownloadParams:
    return download_params(dataset="imagefolder", folder="images", labels=labels)


def blocks() -> list[Block]:
    return list(open_source(OUT, params=params()).blocks)


def error(labels: str = "auto") -> str:
    """Return the error of the download, which the check before a flow run reports as well."""
    with pytest.raises(UserError) as caught:
        download(labeled(labels))
    with pytest.raises(UserError) as early:
        check_inputs({**DEFAULTS, "download": labeled(labels).model_dump()})
    assert str(early.value) == str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


MEMBERS = [f"train/{label}/{label}{n}.png" for label in ("cat", "dog") for n in range(3)]


def test_a_table_is_used_if_the_folder_has_one_and_class_folders_otherwise() -> None:
    photographs("a/0.png", "b/1.png", "a/2.png", "b/3.png", "a/4.png", "b/5.png")
    table(*ROWS)
    download(labeled())
    assert packed() == MEMBERS
    for path in Path("images").glob("*.png"):
        path.unlink()
    download(labeled("folders"))
    assert {name.split("/")[1] for name in packed()} == {"a", "b"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_tables_of_excel_in_any_country_are_read(delimiter: str, encoding: str) -> None:
    rows = [row.replace(",", delimiter).replace("cat", '"Katze, ""groß"""') for row in ROWS]
    rows = [row.replace('"Katze, ""groß"""', "cat", 1) if row.startswith('"') else row for row in rows]
    table(*rows, delimiter * 1, header=delimiter.join(("Image", " LABEL ")), encoding=encoding)
    download(labeled())
    assert source()["class_names"] == ['Katze, "groß"', "dog"]


def test_columns_stand_in_any_order_and_others_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"x,{label},{image}" for image, label in (row.split(",") for row in ROWS)]
    table(*rows, header="camera,label,image")
    download(labeled())
    assert packed() == MEMBERS
    printed = capsys.readouterr().out
    assert "labels: 'images/labels.csv', 6 lines" in printed
    assert "ignored columns: 'camera'" in printed


def test_a_path_is_relative_to_the_table_or_the_folder_or_a_name_that_occurs_once() -> None:
    photographs("photos/one.png", "tables/two.png", "photos/ä/three.png", "photos/four.png")
    rows = ["photos\\one.png,cat", "./two.png,dog", "three.png,cat", "photos/four.png,dog"]
    table(*ROWS, *rows, name="tables/my labels.csv")
    download(labeled("tables/my labels.csv"))
    assert set(packed()) - set(MEMBERS) == {
        "train/cat/photos/one.png", "train/dog/tables/two.png", "train/cat/photos/ä/three.png",
        "train/dog/photos/four.png",
    }  # fmt: skip


def test_splits_have_the_names_that_folders_may_have() -> None:
    names = ["training", "val", "holdout", "Train", "DEV", "test set"]
    table(*(f"{row},{name}" for row, name in zip(ROWS, names, strict=True)), header="image,label,split")
    download(labeled())
    assert packed() == [
        f"{split}/{label}/{label}{n}.png"
        for split, n in (("test", 2), ("train", 0), ("validation", 1))
        for label in ("cat", "dog")
    ]
    assert source()["counts"] == {split: {"cat": 1, "dog": 1} for split in ("train", "validation", "test")}


def test_groups_reach_the_blocks() -> None:
    groups = ["p1", "p1", "", "p2", "p1", ""]
    table(*(f"{row},{group}" for row, group in zip(ROWS, groups, strict=True)), header="image,label,group")
    download(labeled())
    # hashes, since the names of groups may be those of patients
    hashed = [f"{hash_group(group):016x}" if group else "" for group in groups]
    assert [list(block.groups) for block in blocks()] == [hashed]
    assert {row["group"] for row in read_csv(OUT / "groups.csv")} == set(hashed) - {""}
    assert source()["num_groups"] == 2


def test_without_groups_there_is_no_table_of_groups() -> None:
    table(*(f"{row}," for row in ROWS), header="image,label,group")
    download(labeled())
    assert [list(block.groups) for block in blocks()] == [[]]
    assert not (OUT / "groups.csv").exists()


@pytest.mark.parametrize("is_missing", [True, False])
def test_a_missing_or_shortened_table_of_groups_is_refused(is_missing: bool) -> None:
    table(*(f"{row},{number}" for number, row in enumerate(ROWS)), header="image,label,group")
    download(labeled())
    lines = (OUT / "groups.csv").read_text().splitlines(keepends=True)
    (OUT / "groups.csv").write_text("".join(lines[:-1]))
    if is_missing:
        (OUT / "groups.csv").unlink()
    write_checksums(OUT)
    with pytest.raises(UserError, match=r"groups.csv: (no such file|not the table of 6 groups)"):
        blocks()


def test_images_that_are_not_listed_and_lines_that_repeat_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    photographs("more/0.png", "more/1.png")
    Path("images/notes.txt").write_text("x")
    table(*ROWS, ROWS[0])
    download(labeled())
    printed = capsys.readouterr().out
    assert "not used: 2 images that the table of labels does not list, such as more/0.png" in printed
    assert "ignored: 1 lines of the table that list an image again" in printed
    assert source()["files"] == {
        "found": 10, "used": 6, "not_used": {
            "files that are no images": 1, "images that the table of labels does not list": 2, "tables of labels": 1,
        },
    }  # fmt: skip


def test_unreadable_and_raw_images_count_as_in_folders() -> None:
    table(*ROWS, "raw.CR2,cat", "cut.png,dog", "empty.jpg,dog")
    Path("images/raw.CR2").write_bytes(b"x")
    Path("images/cut.png").write_bytes(encoded(noise(9))[:100])
    Path("images/empty.jpg").touch()
    download(labeled())
    refused = {each["file"]: each["reason"] for each in read_json(OUT / "source.json")["undecodable_files"]}
    assert list(refused) == ["train/cat/raw.CR2", "train/dog/cut.png"]
    assert refused["train/cat/raw.CR2"].startswith(".cr2 files cannot be decoded here")
    assert [name for block in blocks() for name, _ in block.unreadable] == ["train/dog/empty.jpg"]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["cat9.png,cat"], r"Line 8, image: found 'cat9.png', but there is no such file.*did you mean 'cat"),
        (["../x.png,cat"], "Line 8, image: found '../x.png', a path that may lead out of the folder"),
        (["/etc/x.png,cat"], "Line 8, image: found '/etc/x.png', a path that may lead out"),
        (["C:\\x.png,cat"], "Line 8, image: found 'C:/x.png', a path that may lead out"),
        (["twice.png,cat"], "found 'twice.png', a name that 2 files have: a/twice.png, b/twice.png;"),
        (["notes.txt,cat"], "found 'notes.txt', a file that is no image"),
        ([",cat"], "Line 8, image: found nothing; allowed: the path of an image; write it, or remove"),
        (["a/twice.png,"], "Line 8, label: found nothing; allowed: the name of a class; write it, or"),
        (["a/twice.png,x/y"], "Line 8, label: found 'x/y'; allowed: printable characters without /"),
        (["a/twice.png,.."], "Line 8, label: found '..'; allowed: printable characters without /"),
        (["a/twice.png,Cat"], "Line 8, label: found 'Cat', but 'cat' in line 2; allowed: .*; rename"),
        (["a/twice.png"], "Line 8, all columns: found 1 field; allowed: 2, as in line 1; put a field"),
        (["a/twice.png,a,b"], "Line 8, all columns: found 3 fields; allowed: 2, as in line 1"),
        (["cat0.png,dog"], "Line 8, label: found 'dog' for 'cat0.png', but 'cat' in line 2;"),
        (["", '"a/twice.png,cat'], "line 9, all columns: found unexpected end of data; allowed: fields"),
    ],
)  # fmt: skip
def test_an_error_names_line_column_finding_and_remedy(lines: list[str], expected: str) -> None:
    photographs("a/twice.png", "b/twice.png")
    Path("images/notes.txt").write_text("x")
    table(*ROWS, *lines)
    assert error().startswith("images/labels.csv: ")
    assert re.search(expected, error())


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["train"] * 5 + ["fold3"], r"Line 7, split: found 'fold3'; allowed: train \(training, .*, validation \("),
        (["train"] * 5 + [""], "Line 7, split: found nothing, but 'train' in line 2; allowed: a split in all lines or"),
        (["test"] * 6, "column split: found test, but no train; allowed: train, and validation and test if wanted"),
        (["train"] * 3 + ["test"] * 3, "has too few training images in 1 of its classes: dog 0; allowed: at least 2"),
    ],
)  # fmt: skip
def test_errors_of_splits(values: list[str], expected: str) -> None:
    table(*(f"{row},{value}" for row, value in zip(ROWS, values, strict=True)), header="image,label,split")
    with pytest.raises(UserError, match=expected):
        download(labeled())


def test_a_group_in_two_splits_is_refused() -> None:
    splits = ["train,p1", "train,p2", "test,p3"] * 2
    rows = [f"{row},{value}" for row, value in zip(ROWS, splits, strict=True)]
    table(*rows, header="image,label,split,group")
    download(labeled())
    table(*rows[:-1], f"{ROWS[-1]},test,p1", header="image,label,split,group")
    assert "Line 7, group: found 'p1' in test, but in train in line 2; allowed: each group in one split" in error()


def test_an_image_listed_with_another_group_is_refused() -> None:
    rows = [f"{row},p1" for row in ROWS]
    table(*rows, f"{ROWS[0]},p2", header="image,label,group")
    assert "Line 8, group: found 'p2' for 'cat0.png', but 'p1' in line 2; allowed: one group for each image" in error()


@pytest.mark.parametrize(
    ("header", "lines", "expected"),
    [
        ("file,class", ROWS, "line 1: found no column image and no column label in 'file', 'class'; allowed: "),
        ("image,class", ROWS, "line 1: found no column label in 'image', 'class'; .* or set download.labels=folders"),
        ("image,label,label", [], "line 1: found two columns label in "),
        ("image,label", [], "found no images; allowed: a line for each"),
        ("image,label", ROWS[:3], "column label: found one class only, 'cat'; allowed: at least two"),
        ("image,label", ROWS[:4], "has too few training images in 1 of its classes: dog 1; allowed: at least 3"),
    ],
)  # fmt: skip
def test_errors_of_the_whole_table(header: str, lines: list[str], expected: str) -> None:
    table(*lines, header=header)
    assert re.search(expected, error())


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "found an empty file; allowed: the columns image and label"),
        (b"image,label\ncat0.png,gro\xdf\n", 'line 2: found bytes that are not UTF-8; allowed: UTF-8; save it as "CSV'),
        ("image,label\n".encode("utf-16"), "line 1: found bytes that are not UTF-8"),
        (b"image,label\nx\0.png,a\n", "found a zero byte"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_table_is_refused(content: bytes, expected: str) -> None:
    table().write_bytes(content)
    assert expected in error()


@pytest.mark.parametrize("labels", ["other.csv", "../labels.csv", "/labels.csv"])
def test_a_table_that_is_missing_or_outside_is_refused(labels: str) -> None:
    table(*ROWS)
    Path("labels.csv").write_text("x")
    assert error(labels).startswith(f"download.labels: '{labels}' is not ")
    assert "it has labels.csv; allowed: auto, folders, or the path of a CSV file relative to" in error(labels)


def test_all_wrong_lines_are_counted_and_the_first_three_are_shown(capfd: pytest.CaptureFixture[str]) -> None:
    table(*ROWS, *(f"no{n}.png,cat" for n in range(4)), "cat1.png,", header="image,label")
    status, printed = run_main(capfd, dataset="imagefolder", folder="images")
    assert status == 2
    assert printed.startswith("error: images/labels.csv: 5 lines are wrong. Line 8, image: ")
    assert printed.count("Line ") == 3
    assert printed.endswith(". 2 more\n")
    assert len(printed.splitlines()) == 1


def test_a_quoted_line_break_does_not_shift_the_numbers_of_lines() -> None:
    table(*(f'{row},"two\nlines"' for row in ROWS), "no.png,cat,x", header="image,label,note")
    assert "Line 14, image: found 'no.png'" in error()


@pytest.mark.parametrize("change", ["cat2.png,dog", "cat2.png,cat,"])
def test_dvc_sees_a_change_of_the_table(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dvc.repo import Repo  # noqa: PLC0415  # takes a second

    path = table(*ROWS)
    Path("dvc.yaml").write_text(
        "stages:\n  download:\n    cmd: cp images/labels.csv out\n    deps: [images]\n    outs: [out]\n"
    )
    repo: Any = Repo.init(no_scm=True)
    repo.reproduce()
    assert repo.status() == {}
    path.write_text(path.read_text().replace("cat2.png,cat", change))
    assert list(repo.status()) == ["download"]


def test_the_stage_download_depends_on_the_folder_of_the_table() -> None:
    assert "${download.folder}" in read_yaml(PROJECT / "dvc.yaml")["stages"]["download"]["deps"]


def test_links_to_files_elsewhere_are_read_as_in_class_folders() -> None:
    """A flow run works in a clone, where the files of data/images are links to those of the checkout."""
    table(*ROWS)
    Path("elsewhere").mkdir()
    for name in ["cat0.png", "dog0.png"]:
        path = Path("images", name)
        path.symlink_to(path.rename(Path("elsewhere", name).resolve()))
    download(labeled())
    assert packed() == MEMBERS


def test_a_delimiter_inside_quotes_is_none() -> None:
    table(*(f'{row},"a;b;c"' for row in ROWS), header='image,label,"x;y;z;w"')
    download(labeled())
    assert packed() == MEMBERS
