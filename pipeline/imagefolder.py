"""A folder of the user's own images: `<class>/…` or `<split>/<class>/…`, checked, and packed into one archive."""

import os
import tarfile
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from pipeline.artifacts import atomic, naming
from pipeline.errors import TemporaryError, UserError
from pipeline.images import IMAGE_SUFFIXES
from pipeline.progress import progress

SPLIT_NAMES = {"train": "train", "validation": "validation", "val": "validation", "valid": "validation", "test": "test"}
"""What a split's folder may be called, in any case, and the split it is."""
PASSED_OVER = frozenset({"thumbs.db", "desktop.ini", "__macosx"})
"""What operating systems leave beside images; names with a leading dot are passed over as well."""


@dataclass(frozen=True)
class _ClassFolder:
    split: str
    name: str
    path: Path
    ancestors: frozenset[tuple[int, int]]
    """(device, inode) of the folders above, so that a link back to one of them is not followed."""

    @property
    def member(self) -> str:
        return f"{self.split}/{self.name}"


@dataclass(frozen=True)
class Scan:
    """What a folder of images holds."""

    class_names: list[str]
    counts: dict[str, dict[str, int]]
    """Images by split and class."""
    ignored: list[str]
    """Files that are no images by their suffix, named as the others are in the archive."""
    classes: list[_ClassFolder]

    @property
    def total(self) -> int:
        return sum(sum(of_split.values()) for of_split in self.counts.values())


def scan(root: Path) -> Scan:
    """Find splits, classes and images below `root`; raises UserError where they cannot be learnt from."""
    classes = _class_folders(root)
    class_names = sorted(each.name for each in classes if each.split == "train")
    counts, ignored = _count(classes, class_names)
    _check_counts(root, counts)
    return Scan(class_names=class_names, counts=counts, ignored=ignored, classes=classes)


def pack(found: Scan, path: Path) -> int:
    """Write the images to a tar archive that depends on names and contents only; returns its size in bytes."""
    packed = 0
    with (
        atomic(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8") as archive,
        progress("packing", total=found.total, unit="images") as advance,
    ):
        for each in found.classes:
            for name, entry in _files(each):
                if _is_image(entry):
                    _add(archive, name, Path(entry.path))
                    packed += 1
                    advance(1)
        if packed != found.total:
            raise TemporaryError(
                f"download.folder: {packed} images packed, but {found.total} counted before; it changes, try again"
            )
    return path.stat().st_size


def _add(archive: tarfile.TarFile, name: str, path: Path) -> None:
    member = tarfile.TarInfo(name)  # owner 0, time 0 and mode 0644, the same on any machine
    with path.open("rb") as content, naming(path):
        member.size = os.fstat(content.fileno()).st_size
        archive.addfile(member, content)
    archive.members.clear()  # type: ignore[attr-defined]  # it keeps every member, and memory would grow with the folder


def _bad_folder(found: str, remedy: str) -> UserError:
    allowed = (
        "<class>/… or <split>/<class>/… with at least two classes, split being train, validation (val, valid) or test"
    )
    return UserError(f"download.folder: {found}; allowed: {allowed}; {remedy}")


def _class_folders(root: Path) -> list[_ClassFolder]:
    """The class folders in the order of the archive. Folders that hold classes only are the split train."""
    if not root.is_dir():
        found = "is not a folder" if root.exists() else "does not exist"
        raise _bad_folder(f"{str(root)!r} {found}", "correct the path")
    folders = _subfolders(root)
    if not folders:
        raise _bad_folder(f"{str(root)!r} has no folders in it", "put your images there, a folder for each class")
    above = frozenset({_identity(root)})
    if not _has_splits(folders):
        classes = [_ClassFolder("train", name, path, above) for name, path in folders.items()]
    else:
        classes = [
            _ClassFolder(split, name, path, above | {_identity(split_path)})
            for split, split_path in _split_folders(root, folders).items()
            for name, path in _subfolders(split_path).items()
        ]
    _check_classes(root, classes, folders)
    return sorted(classes, key=lambda each: f"{each.member}/")


def _has_splits(folders: dict[str, Path]) -> bool:
    """Whether the folders are splits. A folder that is called train, but holds images and no folders, is a class,
    unless all the folders beside it are called like splits."""
    splits = [path for name, path in folders.items() if name.lower() in SPLIT_NAMES]
    return len(splits) == len(folders) or any(_subfolders(path) for path in splits)


def _split_folders(root: Path, folders: dict[str, Path]) -> dict[str, Path]:
    splits: dict[str, Path] = {}
    for name, path in folders.items():
        split = SPLIT_NAMES.get(name.lower())
        if split is None:
            beside = ", ".join(other for other in folders if other.lower() in SPLIT_NAMES)
            raise _bad_folder(f"{str(path)!r} beside the splits {beside}", "move or rename that folder")
        if split in splits:
            raise _bad_folder(
                f"both {str(splits[split])!r} and {str(path)!r} are the split {split}", "leave one of them"
            )
        if not _subfolders(path):
            raise _bad_folder(
                f"{str(path)!r} has no class folders in it",
                "sort its images into a folder for each class, or move it away",
            )
        splits[split] = path
    if "train" not in splits:
        raise _bad_folder(
            f"{str(root)!r} has {', '.join(folders)} with folders inside, but no train",
            "add train/<class>/…, or rename them",
        )
    return splits


def _check_classes(root: Path, classes: Sequence[_ClassFolder], folders: dict[str, Path]) -> None:
    known = {each.name for each in classes if each.split == "train"}
    for each in classes:
        if each.name == "predicted_class":  # the first column of what a served model answers
            raise _bad_folder(f"{str(each.path)!r} has a name that is taken", "rename it")
        if each.name not in known:
            raise _bad_folder(
                f"{str(each.path)!r} is a class that train does not have", "add its images to train, or move it away"
            )
    if len(known) < 2:
        inside = next((path for path in folders.values() if len(_subfolders(path)) > 1), None)
        hint = (
            f"set download.folder to {str(inside)!r} if its folders are the classes" if inside else "add another class"
        )
        raise _bad_folder(f"{str(root)!r} has one class only, {next(iter(known))!r}", hint)


def _count(classes: Sequence[_ClassFolder], class_names: list[str]) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Images by split and class, and the names of the files that are no images by their suffix."""
    present = {each.split for each in classes}
    counts: dict[str, dict[str, int]] = {
        split: dict.fromkeys(class_names, 0) for split in ("train", "validation", "test") if split in present
    }
    ignored = []
    for each in classes:
        for name, entry in _files(each):
            if _is_image(entry):
                counts[each.split][each.name] += 1
            else:
                ignored.append(name)
        if not counts[each.split][each.name]:
            raise _bad_folder(f"{str(each.path)!r} has no images in it", "add some, or remove the folder")
    return counts, ignored


def _check_counts(root: Path, counts: dict[str, dict[str, int]]) -> None:
    """Each split that is carved from train takes an image of each class at least, and one must be left to train on."""
    carved = [split for split in ("validation", "test") if split not in counts]
    needed = 1 + len(carved)
    small = {name: n for name, n in counts["train"].items() if n < needed}
    if small:
        found = ", ".join(f"{name} {n}" for name, n in list(small.items())[:5]) + (", …" if len(small) > 5 else "")
        taken = f"{' and '.join(carved)} take one of each" if carved else "none would be left to train on"
        raise UserError(
            f"download.folder: {str(root)!r} has too few training images in {len(small)} of its classes: {found}; "
            f"allowed: at least {needed} in each, as {taken}; add images, or remove the class"
        )


def _files(each: _ClassFolder) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """The files of a class with their names in the archive, sorted by code point, one folder in memory at a time."""
    return _walk(each.path, each.member, set(each.ancestors))


def _walk(folder: Path, member: str, seen: set[tuple[int, int]]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    identity = _identity(folder)
    if identity in seen:
        return
    seen.add(identity)
    for name, entry in _entries(folder):
        if entry.is_dir():
            yield from _walk(Path(entry.path), f"{member}/{name}", seen)
        else:
            yield f"{member}/{name}", entry


def _is_image(entry: os.DirEntry[str]) -> bool:
    return PurePath(entry.name).suffix.lower() in IMAGE_SUFFIXES and entry.is_file()


def _subfolders(folder: Path) -> dict[str, Path]:
    return {name: Path(entry.path) for name, entry in _entries(folder) if entry.is_dir()}


def _entries(folder: Path) -> list[tuple[str, os.DirEntry[str]]]:
    """What the folder holds, under names in Unicode's composed form (NFC), whichever form the file system keeps.

    A folder sorts as if its name ended in "/", which makes the whole walk sorted by code point. Raises UserError
    for a name that is not UTF-8, and for two that are the same in that form.
    """
    named: dict[str, os.DirEntry[str]] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in PASSED_OVER:
                continue
            name = _composed(entry)
            if name in named:
                found = f"{str(folder)!r} has two names that read {name!r} and differ only in their Unicode form"
                raise UserError(f"download.folder: {found}; allowed: one; rename one of them")
            named[name] = entry
    return sorted(named.items(), key=lambda item: f"{item[0]}/" if item[1].is_dir() else item[0])


def _composed(entry: os.DirEntry[str]) -> str:
    try:
        entry.name.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"download.folder: the name {os.fsencode(entry.path)!r} is not UTF-8; allowed: UTF-8; rename it"
        ) from None
    if not entry.name.isprintable():
        raise UserError(f"download.folder: the name {entry.path!r} has control characters; allowed: none; rename it")
    return unicodedata.normalize("NFC", entry.name)


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
