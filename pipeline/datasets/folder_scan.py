"""Count the files in a folder of the user's own images: each as used, or with the reason why it is not used."""

import os
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core.errors import TemporaryError, UserError
from pipeline.datasets.folder_errors import layout_error
from pipeline.datasets.layout import ClassFolder, entries, find_layout, is_hidden, shorten_list, suffix
from pipeline.images.decode import (
    IMAGE_SUFFIXES,
    RAW_SUFFIXES,
    UNDECODABLE_SUFFIXES,
    VIDEO_SUFFIXES,
    UnreadableImage,
    check_suffix,
    is_image_content,
)

MAX_LOOSE_FRACTION = 0.01  # images outside the class folders / images in them; more are probably a mistake
MAX_MERGED_CLASSES_PRINTED = 5
# the kinds of files, in the words of the report
IMAGE = "images"
UNDECODABLE = "images in formats that cannot be decoded"
COMPANION = "camera raw files and videos beside an image of the same name"
VIDEO = "videos"
OTHER = "files that are no images"
LOOSE = "images outside the class folders"
UNLABELED = "images in folders without classes"
OUTSIDE = "other files outside the class folders"
HIDDEN = "hidden files, and what systems leave"


@dataclass(frozen=True)
class Scan:
    """The images in a folder, and the files that are not used."""

    class_names: list[str]
    # number of images by split and class, including unreadable ones: only `normalize` decodes them
    counts: dict[str, dict[str, int]]
    # (name in the archive, reason) of images in class folders whose format has no decoder
    undecodable: list[tuple[str, str]]
    # the names that other files in class folders, which are not used, would have in the archive
    ignored: list[str]
    # number of files that are not used, by reason; with `total` they add up to the number of files in the folder
    not_used: dict[str, int]
    # the first file for each reason
    examples: dict[str, str]
    # lines of text that say where the labels are
    origin: list[str]
    # for each `<split>/<class>` with images in several folders, these folders; "." is the class folder itself
    merged: dict[str, list[str]] = field(default_factory=dict)
    # where the labels are class folders: these
    classes: list[ClassFolder] = field(default_factory=list)
    # where the labels are in a table: (name in the archive, path) of the images that are used, sorted by name
    listed: list[tuple[str, Path]] = field(default_factory=list)
    # where the table has groups: the group of each image that has one, by its name in the archive
    groups: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Return the number of images that are used."""
        return sum(sum(of_split.values()) for of_split in self.counts.values())


@dataclass
class Tally:
    """Counters and lists that are filled while the folder is walked."""

    undecodable: list[tuple[str, str]] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    not_used: Counter[str] = field(default_factory=Counter)
    merged: dict[str, list[str]] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add_unused(self, name: str, reason: str) -> None:
        self.not_used[reason] += 1
        self.examples.setdefault(reason, name)


def scan(root: Path) -> Scan:
    """Find splits, classes and images below `root`; raises UserError where the layout or the counts are not allowed."""
    layout = find_layout(root)
    class_names = sorted(each.name for each in layout.classes if each.split == "train")
    tally = Tally()
    counts = _count(layout.classes, class_names, tally)
    _tally_outside(root, {each.path for each in layout.classes}, set(layout.unlabeled), tally)
    visible, hidden = num_files(root)
    total = sum(sum(of_split.values()) for of_split in counts.values())
    if visible != total + tally.not_used.total():
        raise TemporaryError(f"download.folder: {str(root)!r} changes while it is read; try again")
    _check_loose(tally, total=total)
    check_counts(root, counts)
    if hidden:
        tally.not_used[HIDDEN] = hidden
    return Scan(
        class_names=class_names,
        counts=counts,
        undecodable=tally.undecodable,
        ignored=tally.ignored,
        not_used=dict(sorted(tally.not_used.items())),
        examples=tally.examples,
        origin=[f"class folders: {', '.join(f'{split} {str(path)!r}' for split, path in layout.splits.items())}"],
        merged=tally.merged,
        classes=layout.classes,
    )


def describe(found: Scan) -> list[str]:
    """Return lines of text: where the labels are, and how many files are used, or not used for which reason."""
    not_used = sum(found.not_used.values())
    lines = [
        *found.origin,
        f"{found.total + not_used:,} files: {found.total:,} used, {not_used:,} not used",
    ]
    lines += [
        f"{member} has images in {len(folders):,} folders, which all count as this class: {shorten_list(folders)}; "
        "if these are classes or other kinds of image, move them out of it"
        for member, folders in list(found.merged.items())[:MAX_MERGED_CLASSES_PRINTED]
    ]
    if (more := len(found.merged) - MAX_MERGED_CLASSES_PRINTED) > 0:
        lines.append(f"{more:,} more of the {len(found.classes):,} class folders have images in several folders")
    for reason, number in found.not_used.items():
        example = f", such as {found.examples[reason]}" if reason in found.examples else ""
        lines.append(f"not used: {number:,} {reason}{example}")
    return lines


def image_files(found: Scan) -> Iterator[tuple[str, Path]]:
    """Yield (name in the archive, path) of each image that is used, sorted by code point."""
    yield from found.listed
    for each in found.classes:
        for name, path, kind in walk(each.path, each.member):
            if kind == IMAGE:
                yield name, Path(path)


def _count(classes: list[ClassFolder], class_names: list[str], tally: Tally) -> dict[str, dict[str, int]]:
    """Return the number of images by split and class; add the other files of the class folders to the tally."""
    present = {each.split for each in classes}
    counts: dict[str, dict[str, int]] = {
        split: dict.fromkeys(class_names, 0) for split in ("train", "validation", "test") if split in present
    }
    for each in classes:
        kinds: Counter[str] = Counter()
        folders: dict[str, None] = {}
        for name, path, kind in walk(each.path, each.member):
            kinds[kind] += 1
            if kind == IMAGE:
                folders[name.rpartition("/")[0]] = None
                continue
            tally.add_unused(name, kind)
            if kind == UNDECODABLE:
                tally.undecodable.append((name, undecodable_reason(path)))
            else:
                tally.ignored.append(name)
        if len(folders) > 1:
            tally.merged[each.member] = sorted(folder.removeprefix(each.member)[1:] or "." for folder in folders)
        counts[each.split][each.name] = kinds.pop(IMAGE, 0)
        if not counts[each.split][each.name]:
            others = "".join(f", but {number} {kind}" for kind, number in sorted(kinds.items()))
            raise layout_error(f"{str(each.path)!r} has no images in it{others}", "add some, or remove the folder")
    return counts


def undecodable_reason(path: str) -> str:
    """Return why a file with such a suffix cannot be decoded."""
    try:
        check_suffix(path)
    except UnreadableImage as error:
        return str(error)
    raise AssertionError(path)


def _tally_outside(root: Path, classes: Set[Path], unlabeled: Set[Path], tally: Tally) -> None:
    """Count the files that are in no class folder."""
    for name, _, kind in walk(root, "", skip=classes | unlabeled):
        tally.add_unused(name, LOOSE if is_photograph(name, kind) else OUTSIDE)
    for folder in sorted(unlabeled):
        for name, _, kind in walk(folder, folder.relative_to(root).as_posix()):
            tally.add_unused(name, UNLABELED if is_photograph(name, kind) else OUTSIDE)


def is_photograph(name: str, kind: str) -> bool:
    """Return whether a file outside the class folders may belong to a class; a PDF, for example, does not."""
    return kind == IMAGE or (kind == UNDECODABLE and suffix(name) in RAW_SUFFIXES)


def _check_loose(tally: Tally, *, total: int) -> None:
    """Raise UserError where too many images are outside the class folders."""
    loose = tally.not_used[LOOSE]
    if loose > MAX_LOOSE_FRACTION * total:
        raise layout_error(
            f"{loose} images lie outside the class folders, such as {tally.examples[LOOSE]!r}, and {total} in them",
            f"sort them into the class folders, or move them away; up to {MAX_LOOSE_FRACTION:.0%} are ignored",
        )


def check_counts(root: Path, counts: dict[str, dict[str, int]]) -> None:
    """Raise UserError where a class has too few training images.

    Each split that is drawn from train takes at least one image of each class, and one must be left to train on.
    """
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


def num_files(root: Path) -> tuple[int, int]:
    """Return the numbers of files below `root`: visible ones, and those that are hidden or in a hidden folder."""
    visible = hidden = 0
    concealed = set[str]()
    for folder, names, files in os.walk(root):
        inside = folder in concealed
        concealed.discard(folder)
        concealed |= {str(Path(folder, name)) for name in names if inside or is_hidden(name)}
        number = len(files) if inside else sum(map(is_hidden, files))
        hidden, visible = hidden + number, visible + len(files) - number
    return visible, hidden


def walk(folder: Path, member: str, *, skip: Set[Path] = frozenset()) -> Iterator[tuple[str, str, str]]:
    """Yield (name in the archive, path, kind) of the files, sorted by code point, one folder in memory at a time."""
    found = entries(folder)
    images = {name.rpartition(".")[0].lower() for name, _ in found if suffix(name) in IMAGE_SUFFIXES}
    for name, entry in found:
        full = f"{member}/{name}" if member else name
        if not entry.is_dir():
            yield full, entry.path, _kind(entry, images=images)
        elif (path := Path(entry.path)) not in skip:
            yield from walk(path, full, skip=skip)


def _kind(entry: os.DirEntry[str], *, images: Set[str]) -> str:
    """Return the kind of a file: by its suffix, or by its first bytes where the suffix is unknown."""
    if not entry.is_file():
        return OTHER
    found = suffix(entry.name)
    if found in IMAGE_SUFFIXES:
        return IMAGE
    if found in RAW_SUFFIXES | VIDEO_SUFFIXES and entry.name.rpartition(".")[0].lower() in images:
        return COMPANION
    if found in UNDECODABLE_SUFFIXES:
        return UNDECODABLE
    if found in VIDEO_SUFFIXES:
        return VIDEO
    with open(entry.path, "rb", buffering=0) as content:  # noqa: PTH123
        return IMAGE if is_image_content(content.read(16)) else OTHER
