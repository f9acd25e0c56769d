"""Folder layouts of public and private data sets are read as intended, or refused in one line."""

import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import TemporaryError, UserError
from pipeline.datasets import folder_scan
from pipeline.datasets.folder_scan import (
    COMPANION,
    HIDDEN,
    LOOSE,
    OTHER,
    OUTSIDE,
    UNDECODABLE,
    UNLABELED,
    VIDEO,
    Scan,
    scan,
)
from pipeline.datasets.layout import split_of
from pipeline.download import download
from tests.download import project  # noqa: F401  # a fixture that each test uses
from tests.test_download_imagefolder import imagefolder as imagefolder_params
from tests.test_download_imagefolder import packed, source

PNG = b"\x89PNG\r\n\x1a\n" + bytes(8)


def tree(*names: str, root: str = "data") -> Path:
    """Write empty files at these paths below `root`; `{a,b}` stands for both names, and `x/*3` for 3 images in x."""
    for name in (each for pattern in names for each in expanded(pattern)):
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return Path(root)


def expanded(pattern: str) -> Iterator[str]:
    if "{" in pattern:
        head, _, rest = pattern.partition("{")
        choices, _, tail = rest.partition("}")
        for choice in choices.split(","):
            yield from expanded(head + choice + tail)
    elif "*" in pattern:
        folder, _, number = pattern.partition("*")
        yield from (f"{folder}{index}.jpg" for index in range(int(number)))
    else:
        yield pattern


def num_files(folder: Path) -> int:
    return sum(1 for path in folder.rglob("*") if path.is_file())


def summary(found: Scan) -> dict[str, dict[str, int]]:
    """Return the images by split and class, after a check that every file below the folder is counted."""
    assert found.total + sum(found.not_used.values()) == num_files(Path("data"))
    return found.counts


READ: dict[str, tuple[list[str], dict[str, dict[str, int]]]] = {
    "intel images": (
        ["seg_{train,test}/seg_{train,test}/.keep", "seg_train/seg_train/{sea,street}/*3",
         "seg_test/seg_test/{sea,street}/*1", "seg_pred/seg_pred/*5"],
        {"train": {"sea": 3, "street": 3}, "test": {"sea": 1, "street": 1}},
    ),
    "chest x-rays": (
        ["chest_xray/{train,val,test}/{NORMAL,PNEUMONIA}/*3", "chest_xray/__MACOSX/train/NORMAL/._0.jpg"],
        {split: {"NORMAL": 3, "PNEUMONIA": 3} for split in ("train", "validation", "test")},
    ),
    "brain tumors": (
        ["Training/{glioma,notumor}/*3", "Testing/{glioma,notumor}/*2"],
        {"train": {"glioma": 3, "notumor": 3}, "test": {"glioma": 2, "notumor": 2}},
    ),
    "hymenoptera": (
        ["hymenoptera_data/{train,val}/{ants,bees}/*3"],
        {split: {"ants": 3, "bees": 3} for split in ("train", "validation")},
    ),
    "imagenette": (
        ["imagenette2/{train,val}/{n01,n02}/*3", "imagenette2/noisy_imagenette.csv"],
        {split: {"n01": 3, "n02": 3} for split in ("train", "validation")},
    ),
    "tiny imagenet without its flat splits": (
        ["tiny/train/{n01,n02}/images/*3", "tiny/train/{n01,n02}/boxes.txt", "tiny/wnids.txt"],
        {"train": {"n01": 3, "n02": 3}},
    ),
    "other folders beside splits": (
        ["{train,test}/{a,b}/*3", "annotations/{a,b}/{1,2}.xml", "models/best.pt"],
        {split: {"a": 3, "b": 3} for split in ("train", "test")},
    ),
    "a folder in each class": (["cat/cat/*3", "dog/dog/*3"], {"train": {"cat": 3, "dog": 3}}),
    "eurosat": (["2750/{Forest,River}/*3"], {"train": {"Forest": 3, "River": 3}}),
    "food-101": (
        ["food-101/images/{pie,soup}/*3", "food-101/meta/classes.txt", "food-101/license.txt"],
        {"train": {"pie": 3, "soup": 3}},
    ),
    "caltech 101": (
        ["101_ObjectCategories/{BACKGROUND_Google,ant}/*3", "Annotations/ant/annotation_0001.mat"],
        {"train": {"BACKGROUND_Google": 3, "ant": 3}},
    ),
    "food-11": (
        ["{training,validation,evaluation}/{Bread,Egg}/*3"],
        {split: {"Bread": 3, "Egg": 3} for split in ("train", "validation", "test")},
    ),
    "plants, augmented": (
        ["Plants (Aug)/Plants (Aug)/{train,valid}/{a,b}/*3"],
        {split: {"a": 3, "b": 3} for split in ("train", "validation")},
    ),
    "zip in a folder": (["dataset/dataset/train/{a,b}/*3"], {"train": {"a": 3, "b": 3}}),
    "split names with other words": (
        ["chest_xray_train/{a,b}/*3", "chest_xray_Hold-Out/{a,b}/*1", "x-ray DEV set/{a,b}/*1"],
        {"train": {"a": 3, "b": 3}, "validation": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}},
    ),
    "one class in test, in folders": (
        ["train/{a,b}/*3", "test/a/{monday,tuesday}/*1"],
        {"train": {"a": 3, "b": 3}, "test": {"a": 2, "b": 0}},
    ),
    "classes with words of splits": (
        ["{train_station,test tube,airport}/*3", "train_station/more/*2"],
        {"train": {"airport": 3, "test tube": 3, "train_station": 5}},
    ),
    "flat classes called like splits": (
        ["{train station,test tube}/*3"], {"train": {"test tube": 3, "train station": 3}},
    ),
    "what a NAS leaves": (
        ["{a,b}/*3", "a/@eaDir/0.jpg/thumb.jpg", "#recycle/c/*2", "b/.ipynb_checkpoints/0.jpg"],
        {"train": {"a": 3, "b": 3}},
    ),
    "unlike sub-folders of classes": (["{a,b}/*2", "a/{x,y}/*1", "b/{v,z}/*1"], {"train": {"a": 4, "b": 4}}),
    "annotations beside images": (
        ["{a,b}/*3", "{a,b}/boxes/{1,2}.xml"], {"train": {"a": 3, "b": 3}},
    ),
    "dates": (["{a,b}/*2", "{a,b}/2024-05/*1"], {"train": {"a": 3, "b": 3}}),
    "people": (["a/{ann,bob}/*2", "b/{cyd,dan}/*2"], {"train": {"a": 4, "b": 4}}),
    "unlabeled images beside classes": (["{cat,dog}/*3", "Unlabeled_Images/*9"], {"train": {"cat": 3, "dog": 3}}),
    "unlabeled images in a split": (
        ["train/{cat,dog,unlabelled}/*3", "test/pred/*3"], {"train": {"cat": 3, "dog": 3}},
    ),
    "a class with a word of the unlabeled": (
        ["{prediction error,unlabeled bottle}/*3"], {"train": {"prediction error": 3, "unlabeled bottle": 3}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_a_layout_is_read_as_intended(case: str) -> None:
    names, expected = READ[case]
    assert summary(scan(tree(*names))) == expected


REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "chest x-rays twice": (
        ["{train,val,test}/{NORMAL,PNEUMONIA}/*3", "chest_xray/{train,val,test}/{NORMAL,PNEUMONIA}/*3"],
        ["'data/chest_xray' beside the splits test, train, val", "move or rename that folder"],
    ),
    "tiny imagenet": (
        ["tiny/train/{n01,n02}/images/*3", "tiny/val/images/*3", "tiny/val/val_annotations.txt"],
        ["'data/tiny/val/images' is a class that train does not have", "sort its images into the classes of train"],
    ),
    "dogs and cats, flat": (
        ["train/cat.{0,1,2}.jpg", "train/dog.{0,1,2}.jpg", "test1/*3"],
        ["'data/train' has no class folders in it", "a folder for each class"],
    ),
    "flowers, flat": (["jpg/*3", "imagelabels.mat"], ["'data' has only one class, 'jpg'"]),
    "plant village": (
        ["dataset/{color,grayscale,segmented}/{Apple,Corn,Grape,Peach}/*3"],
        ["'data/dataset/color' and 'data/dataset/grayscale' both have the folders Apple, Corn, Grape and 1 more",
         "set download.folder to one of the two"],
    ),
    "a copy of the classes inside": (
        ["{yes,no}/*3", "brain_tumor_dataset/{yes,no}/*3"],
        ["'data/brain_tumor_dataset' has the folders no, yes in it, and beside it is no, yes", "move one of the two"],
    ),
    "a class inside another": (
        ["{cat,dog}/*3", "dog/cat/*3"], ["'data/dog' has the folders cat in it, and beside it is cat", "rename"],
    ),
    "domains with unlike classes": (["a/{bike,mug}/*3", "b/mug/*3"], ["'data/a' and 'data/b' both have the folders m"]),
    "coco": (
        ["{train,val}2017/*3", "annotations/instances.json"], ["'data/train2017' has no class folders in it"],
    ),
    "yolo": (["{images,labels}/{train,val}/.x", "images/{train,val}/*3"], ["'data/images/train' has no class folders"]),
    "flat splits beside another folder": (["{train,test,more}/*3"], ["'data/more' beside the splits test, train"]),
    "classes above splits": (
        ["cat/{train,test}/*3", "dog/train/*3"], ["'data/cat' has the folders test, train", "put the splits above"],
    ),
    "images and masks": (["{ill,well}/{images,masks}/*3"], ["both have the folders images, masks", "move their"]),
    "domains above classes": (["{amazon,dslr}/images/{bike,mug}/*3"], ["both have the folders bike, mug"]),
    "folds": (["fold{1,2,3}/{a,b}/*3"], ["both have the folders a, b"]),
    "unknown name beside splits": (
        ["seg_train/{a,b}/*3", "seg_test/{a,b}/*3", "seg_extra/{a,b}/*3"], ["both have the folders a, b"],
    ),
    "two names of one split": (["{val,dev,train}/{a,b}/*3"], ["are the split validation", "merge them, or remove one"]),
    "case": (["{Cat,cat,dog}/*3"], ["'data/Cat' and 'data/cat' differ only in upper and lower case", "merge them"]),
    "case across splits": (
        ["train/{Cat,dog}/*3", "test/{cat,dog}/*3"],
        ["'data/test/cat' is a class that train does not have", "rename it to 'Cat'"],
    ),
    "images beside classes": (
        ["{cat,dog}/*3", "IMG_{1,2}.jpg"], ["2 images lie outside the class folders, such as 'IMG_1.jpg'", "6 in them"],
    ),
    "images in a split": (["train/{cat,dog}/*3", "train/*3"], ["such as 'train/0.jpg'", "sort them into"]),
    "cyclegan": (
        ["horse2zebra/{trainA,trainB,testA,testB}/*3"],
        ["'data/horse2zebra/testA' and 'data/horse2zebra/trainA' seem to have the class and the split in one name"],
    ),
    "class and split in one name": (
        ["{cats,dogs}_{train,test}/*3"], ["'data/cats_test' and 'data/cats_train' seem to", "a folder for each split"],
    ),
    "split and class in one name": (["{train,test}-{cats,dogs}/*3"], ["'data/test-cats' and 'data/train-cats' seem"]),
    "split and class in one name, beside others": (
        ["{Train,Valid} cats/*3", "more/*3"], ["'data/Train cats' and 'data/Valid cats' seem"],
    ),
    "masks below images": (["{cat,dog}/*3", "{cat,dog}/mask/*3"], ["and 'data/dog' both have the folders mask"]),
    "thumbnails below images, in another case": (
        ["{cat,dog}/*3", "cat/Thumbnails/*3", "dog/thumbnails/*3"], ["both have the folders Thumbnails in them"],
    ),
    "crops below the images of a split": (
        ["{train,test}/{cat,dog}/*3", "train/{cat,dog}/crops/*3"], ["'data/train/cat' and 'data/train/dog' both have"],
    ),
    "masks beside classes": (
        ["images/{cat,dog}/*3", "masks/*6"], ["'data/images' is probably not a class, and beside it is masks", "to it"],
    ),
    "masks beside images": (["JPEGImages/*3", "Annotations/*3"], ["'data/JPEGImages' is probably not a class"]),
    "one class and unlabeled images": (["cat/*3", "unlabeled/*3"], ["'data' has only one class, 'cat'"]),
    "only unlabeled images": (["{unlabeled,pred}/*3"], ["'data' has no class folders in it"]),
    "only raw files in a class": (
        ["{cat,dog}/*3", "bird/IMG_{1,2}.CR2"],
        ["'data/bird' has no images in it, but 2 images in formats that cannot be decoded"],
    ),
    "only an archive in a class": (["{cat,dog}/*3", "bird/bird.zip"], ["'data/bird' has no images in it, but 1 files"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_an_ambiguous_layout_is_refused_in_one_line(case: str) -> None:
    names, parts = REFUSED[case]
    with pytest.raises(UserError) as refused:
        scan(tree(*names))
    message = str(refused.value)
    assert message.startswith("download.folder: ")
    assert "; allowed: <class>/… or <split>/<class>/…" in message
    assert "\n" not in message
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("TRAIN", "train"), ("trn", "train"), ("train_set", "train"), ("TrainingData", "train"), ("seg_train", "train"),
        ("train-images", "train"), ("trainval", "train"), ("valid", "validation"), ("Val2017", "validation"),
        ("dev", "validation"), ("testset", "test"), ("test1", "test"), ("holdout", "test"), ("hold_out_set", "test"),
        ("eval", "test"), ("PublicTest", "test"), ("train_val", None), ("images", None), ("contest", None),
        ("constrain", None), ("valley", None), ("devices", None), ("data", None),
    ],
)  # fmt: skip
def test_splits_are_recognized_by_the_words_of_a_name(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_every_file_is_counted_and_the_counts_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    tree("seg_train/{cat,dog}/*100", "seg_test/{cat,dog}/*3", "seg_pred/*7", "seg_pred/list.txt", "README.md")
    tree("seg_train/0.jpg", "seg_train/cat/IMG.{HEIC,MOV,AAE}", "seg_train/dog/{0.CR2,1.MP4,x.mp4,y.NEF,notes.txt}")
    tree(".DS_Store", "seg_train/dog/._0.jpg", ".git/objects/ab/{c,d}", "__MACOSX/x.jpg")
    download(imagefolder_params("data"))
    printed = capsys.readouterr().out
    not_used = {
        UNLABELED: 7, LOOSE: 1, OUTSIDE: 2, COMPANION: 3, UNDECODABLE: 1, VIDEO: 1, OTHER: 2,
    }  # fmt: skip
    assert source()["files"] == {"found": 207 + 17, "used": 207, "not_used": not_used}
    assert "229 files: 207 used, 22 not used" in printed
    assert all(f"not used: {number} {reason}, such as " in printed for reason, number in not_used.items())
    assert f"not used: 5 {HIDDEN}" in printed
    assert f"{UNLABELED}, such as seg_pred/0.jpg" in printed
    assert "class folders: train 'data/seg_train', test 'data/seg_test'" in printed
    assert source()["undecodable_files"] == [
        {"file": "train/dog/y.NEF", "reason": ".nef files cannot be decoded here; export it as JPEG, PNG or TIFF"}
    ]
    assert len(packed()) == 207


def test_folders_that_are_merged_into_one_class_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    tree("{cats,dogs}/*4", "other/{birds,fish}/*3", "dogs/old/*1")
    download(imagefolder_params("data"))
    printed = capsys.readouterr().out
    assert "train/other has images in 2 folders, which all count as this class: birds, fish; if these are" in printed
    assert "train/dogs has images in 2 folders, which all count as this class: ., old; if" in printed
    assert "train/cats has" not in printed


def test_only_some_of_many_classes_with_folders_are_printed_and_all_are_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tree(*(f"class{number}/{{x{number},y{number}}}/*2" for number in range(7)))
    download(imagefolder_params("data"))
    printed = capsys.readouterr().out
    assert printed.count("which all count as this class") == 5
    assert "2 more of the 7 class folders have images in several folders" in printed


def test_hidden_files_do_not_change_the_recorded_counts() -> None:
    tree("{cat,dog}/*3")
    download(imagefolder_params("data"))
    before = source()
    tree(".DS_Store", "cat/Thumbs.db")
    download(imagefolder_params("data"))
    assert source() == before


def test_the_content_decides_whether_a_file_without_a_known_suffix_is_an_image() -> None:
    root = tree("{cat,dog}/*3", "cat/{IMG_1,photo.jpg_large,x.jpg?size=1,notes,song.mp3}", "dog/archive.zip")
    for name in ("IMG_1", "photo.jpg_large", "x.jpg?size=1"):
        (root / "cat" / name).write_bytes(PNG)
    with zipfile.ZipFile(root / "dog/archive.zip", "w") as archive:
        archive.writestr("a.png", PNG)
    found = scan(root)
    assert summary(found) == {"train": {"cat": 6, "dog": 3}}
    assert found.ignored == ["train/cat/notes", "train/cat/song.mp3", "train/dog/archive.zip"]


@pytest.mark.parametrize("where", ["rose", "daisy/more", "daisy/self", "extra/up"])
def test_a_link_to_a_folder_is_refused_as_dvc_ignores_changes_in_it(where: str) -> None:
    root, far = tree("{daisy,tulip}/*3"), tree("*3", root="far")
    link = root / where
    link.parent.mkdir(exist_ok=True)
    link.symlink_to({"self": ".", "up": ".."}.get(link.name, far.resolve()))
    with pytest.raises(UserError, match=f"{where}' is a link to a folder, in which DVC does not look.*; allowed: .*cp"):
        scan(root)


@pytest.mark.parametrize("where", ["rose", "daisy/gone.png", "daisy/deep/gone"])
def test_a_broken_link_is_refused(where: str) -> None:
    root = tree("{daisy,tulip}/*3", "daisy/deep/0.png")
    (root / where).symlink_to("nowhere")
    with pytest.raises(UserError, match=f"{where}' is a broken link, to 'nowhere'; allowed: "):
        scan(root)


def test_a_link_as_the_root_folder_and_links_to_files_are_followed() -> None:
    root = tree("{daisy,tulip}/*3")
    (root / "daisy/linked.png").symlink_to("0.jpg")
    Path("link").symlink_to(root)
    assert scan(Path("link")).counts == {"train": {"daisy": 4, "tulip": 3}}


def test_dvc_sees_changes_in_a_linked_file_and_behind_a_linked_root(tmp_path: Path) -> None:
    """The rule for links relies on this behavior of DVC."""
    from dvc.repo import Repo  # noqa: PLC0415  # takes seconds, and one test needs it

    subprocess.run(["git", "init", "-q"], check=True)
    repo = Repo.init(".")
    tree("a/*2", root=str(tmp_path / "far"))
    (tmp_path / "target").write_text("one")
    (tmp_path / "far/a/link").symlink_to(tmp_path / "target")
    Path("data").symlink_to(tmp_path / "far")
    Path("dvc.yaml").write_text("stages: {copy: {cmd: touch out, deps: [data], outs: [out]}}")
    repo.reproduce()
    assert repo.status() == {}
    (tmp_path / "target").write_text("another")
    assert repo.status()
    repo.reproduce()
    tree("a/new.jpg", root=str(tmp_path / "far"))
    assert repo.status()


def test_a_folder_that_changes_while_it_is_read_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    root, original = tree("{cat,dog}/*3"), folder_scan._tally_outside

    def tally_then_add(*arguments: Any) -> None:
        original(*arguments)
        tree("cat/late.jpg")

    monkeypatch.setattr(folder_scan, "_tally_outside", tally_then_add)
    with pytest.raises(TemporaryError, match="'data' changes while it is read; try again"):
        scan(root)
