"""Find which folders in a folder of images are splits and which are classes; an ambiguous layout is an error."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.datasets.folder_errors import check_is_folder, layout_error
from pipeline.images.decode import IMAGE_SUFFIXES, UNDECODABLE_SUFFIXES

# words that name a split, in lower case, with the split that they mean; a split to evaluate on is called test
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trn", "trainval"), "train"),
    **dict.fromkeys(("validation", "validate", "validating", "val", "valid", "dev", "development"), "validation"),
    **dict.fromkeys(("test", "testing", "tst", "holdout", "eval", "evaluation"), "test"),
}
# words that name a folder of images without classes
UNLABELED_WORDS = frozenset(
    {
        *("pred", "predict", "prediction", "predictions", "inference", "unsupervised"),
        *("unlabeled", "unlabelled", "unannotated", "unclassified", "unsorted"),
    }
)
# names that fit every folder of images; a folder with such a name is probably not a class
IMAGES_WORDS = frozenset({"image", "images", "img", "imgs", "jpegimages"})
# words that are ignored in the name of a folder, as in train_set
FILLER_WORDS = frozenset({"set", "data", "dataset", "image", "images", "img", "imgs", "folder", "split", "sample"})
# files and folders that operating systems create beside images, in lower case
SYSTEM_NAMES = frozenset(
    {
        *("thumbs.db", "ehthumbs.db", "desktop.ini", "picasa.ini", "__macosx", "@eadir", "lost+found"),
        *("$recycle.bin", "#recycle", "system volume information"),
    }
)
_PHOTOGRAPH_SUFFIXES = IMAGE_SUFFIXES | UNDECODABLE_SUFFIXES


@dataclass(frozen=True)
class ClassFolder:
    """A folder with the images of one class in one split."""

    split: str
    name: str
    path: Path

    @property
    def member(self) -> str:
        """Return the name of the folder in the archive."""
        return f"{self.split}/{self.name}"


@dataclass(frozen=True)
class Layout:
    """The folders of a data set: its classes, its splits, and folders of images without classes."""

    # in the order of the archive; without folders for splits, all classes are in the split train
    classes: list[ClassFolder]
    # for each split the folder whose sub-folders are the classes
    splits: dict[str, Path]
    # folders of images without classes, beside the splits or beside the classes
    unlabeled: list[Path]


def find_layout(root: Path) -> Layout:
    """Find splits and classes below `root`; folders that hold nothing but one other folder of images are skipped.

    Raises UserError, with the layout that was found and those that are allowed, where there are too few classes, or
    where folders that look like classes may be something else.
    """
    check_is_folder(root)
    if not subfolders(root):
        raise layout_error(f"{str(root)!r} has no folders in it", "put your images there, a folder for each class")
    root = _skip_wrappers(root)
    folders, unlabeled = subfolders(root), list[Path]()
    splits = {"train": root}
    if _has_splits(folders):
        unlabeled = [path for name, path in folders.items() if _is_unlabeled(name)]
        splits = _split_folders(root, {name: path for name, path in folders.items() if not _is_unlabeled(name)})
    else:
        _check_no_split_in_names(folders)
    classes = list[ClassFolder]()
    for split, split_path in splits.items():
        for name, path in subfolders(split_path).items():
            if _is_only_unlabeled(name):
                unlabeled.append(path)
            else:
                classes.append(ClassFolder(split, name, path))
    splits = {split: path for split, path in splits.items() if any(each.split == split for each in classes)}
    _check_names(root, classes, splits)
    for split in splits:
        _check_not_misread({each.name: each.path for each in classes if each.split == split})
    return Layout(sorted(classes, key=lambda each: f"{each.member}/"), splits, unlabeled)


def split_of(name: str) -> str | None:
    """Return the split that a folder's name means, or None where none of its words names a split, or two different."""
    splits = {SPLIT_WORDS[word] for word in _words(name) if word in SPLIT_WORDS}
    return splits.pop() if len(splits) == 1 else None


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is ignored, since systems and tools create such ones."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def suffix(name: str) -> str:
    """Return the suffix of a file name in lower case, with the dot."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122  # creating 100,000 `PurePath` objects takes seconds


def subfolders(folder: Path) -> dict[str, Path]:
    """Return the folders in a folder by name, sorted, without hidden ones; raises UserError as `entries` does."""
    return {name: Path(entry.path) for name, entry in entries(folder, only_folders=True)}


def entries(folder: Path, *, only_folders: bool = False) -> list[tuple[str, os.DirEntry[str]]]:
    """Return the files and folders in a folder, without hidden ones, as sorted pairs (name, entry).

    The names are in Unicode's composed form (NFC), whichever form the file system uses. A folder is sorted as if its
    name ended in "/": a walk through all folders is then sorted by code point. Raises UserError for a name that is not
    UTF-8 or has control characters, for two names that are equal in NFC, for a link to a folder and a broken link.
    """
    named: dict[str, os.DirEntry[str]] = {}
    with os.scandir(folder) as found:
        for entry in found:
            if is_hidden(entry.name):
                continue
            if entry.is_symlink():
                _check_link(entry)
            if only_folders and not entry.is_dir():
                continue
            name = _composed_name(entry)
            if name in named:
                raise UserError(
                    f"download.folder: {str(folder)!r} has two names that read {name!r} and differ only in their "
                    "Unicode form; allowed: one; rename one of them"
                )
            named[name] = entry
    return sorted(named.items(), key=lambda item: f"{item[0]}/" if item[1].is_dir() else item[0])


def _check_link(entry: os.DirEntry[str]) -> None:
    """Raise UserError for a link to a folder and a broken link; DVC reads a link to a file like the file itself."""
    if entry.is_dir():
        raise UserError(
            f"download.folder: {entry.path!r} is a link to a folder, in which DVC does not look for changes; allowed: "
            f"folders, and links to files; replace it by the folder itself, by a copy (`cp -rL`), or by hard links "
            f"(`cp -rlL`), or set download.folder to the folder that holds the real ones"
        )
    if not entry.is_file() and not Path(entry.path).exists():
        raise UserError(
            f"download.folder: {entry.path!r} is a broken link, to {str(Path(entry.path).readlink())!r}; allowed: "
            "links to files that exist; bring the file back, or remove the link"
        )


def _composed_name(entry: os.DirEntry[str]) -> str:
    """Return the name in Unicode's composed form; raises UserError where it is not UTF-8 or not printable."""
    try:
        entry.name.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"download.folder: the name {os.fsencode(entry.path)!r} is not UTF-8; allowed: UTF-8; rename it"
        ) from None
    if not entry.name.isprintable():
        raise UserError(f"download.folder: the name {entry.path!r} has control characters; allowed: none; rename it")
    return unicodedata.normalize("NFC", entry.name)


def _words(name: str) -> list[str]:
    """Return the words of a name in lower case, without fillers and digits: seg and train for `Seg_TrainSet-2`."""
    spaced = re.sub(r"([a-z])([A-Z])", r"\1 \2", name)
    joined = re.sub(r"hold[\W_]*out", "holdout", spaced.casefold())
    words = [re.sub(rf"(?<=.)({'|'.join(FILLER_WORDS)})s?$", "", word) for word in re.findall(r"[^\W\d_]+", joined)]
    return [word for word in words if word not in FILLER_WORDS]


def _is_unlabeled(name: str) -> bool:
    """Return whether a word of the name means that the folder has images without classes."""
    return not UNLABELED_WORDS.isdisjoint(_words(name))


def _is_only_unlabeled(name: str) -> bool:
    """Return whether all words of the name mean images without classes, unlike those of a class `prediction error`."""
    words = _words(name)
    return bool(words) and UNLABELED_WORDS.issuperset(words)


def _is_only_split(name: str) -> bool:
    """Return whether all words of the name mean one split, unlike those of a class `train station`."""
    return split_of(name) is not None and all(word in SPLIT_WORDS for word in _words(name))


def _has_splits(folders: Mapping[str, Path]) -> bool:
    """Return whether the folders are splits and not classes.

    They are if a folder whose name means only a split has folders in it, or if there are such names of two splits. They
    are too if all names mean a split, and either mean nothing else or one of the folders has folders in it. A folder
    `train` with images and no folders in it, beside folders of other names, is a class.
    """
    labeled = {name: path for name, path in folders.items() if not _is_unlabeled(name)}
    only_split = {name: path for name, path in labeled.items() if _is_only_split(name)}
    if len({split_of(name) for name in only_split}) > 1 or any(subfolders(path) for path in only_split.values()):
        return True
    if not labeled or not all(split_of(name) for name in labeled):
        return False
    return len(only_split) == len(labeled) or any(subfolders(path) for path in labeled.values())


def _check_no_split_in_names(folders: Mapping[str, Path]) -> None:
    """Raise UserError for names that join a class and a split, as in `cats_train` beside `cats_test`."""
    named: dict[tuple[str, ...], str] = {}
    for name, path in folders.items():
        if (split := split_of(name)) and not subfolders(path):
            other = named.setdefault(tuple(word for word in _words(name) if word not in SPLIT_WORDS), name)
            if split_of(other) != split:
                raise layout_error(
                    f"{str(folders[other])!r} and {str(path)!r} seem to have the class and the split in one name",
                    "make a folder for each split, with a folder for each class in it",
                )


def _skip_wrappers(folder: Path, *, class_names: Iterable[str] = (), stop_at_splits: bool = True) -> Path:
    """Return the first folder that is not a wrapper: a wrapper has no images, and one folder of folders with images.

    A folder with one of the `class_names` is not entered, nor with `stop_at_splits` a folder that is a split.
    """
    while not (stop_at_splits and _has_splits(subfolders(folder))):
        inside = {name: path for name, path in subfolders(folder).items() if _holds_images(path)}
        name, path = next(iter(inside.items()), ("", folder))
        if len(inside) != 1 or name in class_names or not subfolders(path) or _holds_images(folder, deep=False):
            break
        if _holds_images(path, deep=False):  # then `path` is a class
            break
        folder = path
    return folder


def _holds_images(folder: Path, *, deep: bool = True) -> bool:
    """Return whether a file in the folder, or with `deep` below it, has the suffix of an image.

    The search ends at the first such file, since the folder may be large.
    """
    with os.scandir(folder) as found:
        visible = (entry for entry in found if not is_hidden(entry.name))
        return any(
            (deep and _holds_images(Path(entry.path)))
            if entry.is_dir(follow_symlinks=False)
            else suffix(entry.name) in _PHOTOGRAPH_SUFFIXES
            for entry in visible
        )


def _split_folders(root: Path, folders: Mapping[str, Path]) -> dict[str, Path]:
    """Return for each split, train first, the folder that has the classes in it; raises UserError without a train."""
    named: dict[str, Path] = {}
    for name, path in folders.items():
        split = split_of(name)
        if split is None and not _holds_images(path):
            continue  # a folder of annotations, for example
        if split is None:
            beside = ", ".join(other for other in folders if split_of(other))
            raise layout_error(f"{str(path)!r} beside the splits {beside}", "move or rename that folder")
        if split in named:
            raise layout_error(
                f"both {str(named[split])!r} and {str(path)!r} are the split {split}", "merge them, or remove one"
            )
        named[split] = path
    if "train" not in named:
        raise layout_error(
            f"{str(root)!r} has {', '.join(folders)} with folders inside, but no train",
            "add train/<class>/…, or rename them",
        )
    train = _skip_wrappers(named.pop("train"), stop_at_splits=False)
    class_names = subfolders(train)
    splits = {"train": train} | {
        split: _skip_wrappers(named[split], class_names=class_names, stop_at_splits=False)
        for split in ("validation", "test")
        if split in named
    }
    for path in splits.values():
        if not subfolders(path):
            raise layout_error(
                f"{str(path)!r} has no class folders in it",
                "sort its images into a folder for each class, or move it away",
            )
    return splits


def _check_names(root: Path, classes: list[ClassFolder], splits: Mapping[str, Path]) -> None:
    """Raise UserError for fewer than two classes, and for names of classes that are not allowed."""
    known = {each.name for each in classes if each.split == "train"}
    alike: dict[tuple[str, str], ClassFolder] = {}
    for each in classes:
        if each.name == "predicted_class":  # the name of a column in the answers of a served model
            raise layout_error(f"{str(each.path)!r} has a name that no class may have", "rename it")
        other = alike.setdefault((each.split, each.name.strip().casefold()), each)
        if other is not each:
            found = f"{str(other.path)!r} and {str(each.path)!r} differ only in upper and lower case or in spaces"
            raise layout_error(found, "merge them, or rename one")
        if each.name not in known:
            like = alike.get(("train", each.name.strip().casefold()))
            hint = (
                f"rename it to {like.name!r}" if like else "sort its images into the classes of train, or move it away"
            )
            raise layout_error(f"{str(each.path)!r} is a class that train does not have", hint)
    if not known:
        raise layout_error(f"{str(splits.get('train', root))!r} has no class folders in it", "add at least two classes")
    if len(known) < 2:
        inside = next((each.path for each in classes if len(subfolders(each.path)) > 1), None)
        hint = (
            f"set download.folder to {str(inside)!r} if its folders are the classes" if inside else "add another class"
        )
        raise layout_error(f"{str(splits.get('train', root))!r} has only one class, {next(iter(known))!r}", hint)


def _check_not_misread(classes: Mapping[str, Path]) -> None:
    """Raise UserError where names or sub-folders of the classes suggest that these folders are not classes.

    The cases are: a folder called `images`, for example beside one called `masks`; splits inside a class; a class
    inside another one, or a copy of all classes inside one; sub-folders of the same names in several classes, such as
    those of the real classes below `color` and `grayscale`, or `masks` beside images.
    """
    for name, path in classes.items():
        if re.sub(r"[\W_]+", "", name.casefold()) in IMAGES_WORDS:
            beside = shorten_list([other for other in classes if other != name])
            raise layout_error(
                f"{str(path)!r} is probably not a class, and beside it is {beside}",
                "set download.folder to it if its folders are the classes, else rename it",
            )
    inside = {name: sorted(subfolders(_skip_wrappers(path, stop_at_splits=False))) for name, path in classes.items()}
    for name, names in inside.items():
        where = f"{str(classes[name])!r} has the folders {shorten_list(names)} in it"
        if len({split_of(each) for each in names if _is_only_split(each)}) > 1:
            raise layout_error(f"{where}: splits inside a class", "put the splits above the classes")
        if same := sorted(set(names) & (set(classes) - {name})):
            raise layout_error(
                f"{where}, and beside it is {shorten_list(same)}", "move one of the two away, or rename the one inside"
            )
    for first, second in _suspicious_pairs(classes, inside):
        both = f"{str(classes[first])!r} and {str(classes[second])!r}"
        same = _shared(inside[first], inside[second])
        raise layout_error(
            f"{both} both have the folders {shorten_list(same)} in them, so they may not be classes",
            f"set download.folder to one of the two if its folders are the classes; if {first} and {second} are, "
            "move their images directly into them, and move those folders away",
        )


def _suspicious_pairs(classes: Mapping[str, Path], inside: Mapping[str, list[str]]) -> Iterator[tuple[str, str]]:
    """Yield pairs of classes that share names of sub-folders: several names, or one beside other folders or images.

    A single shared name beside images counts only if it has letters, unlike a date, and its folder holds images.
    """
    holders: dict[str, str] = {}
    shared: Counter[tuple[str, str]] = Counter()
    for name, names in inside.items():
        for each in names:
            if (holder := holders.setdefault(each.casefold(), name)) != name:
                shared[holder, name] += 1
    for (first, second), number in shared.items():
        with_images = [name for name in (first, second) if _holds_images(classes[name], deep=False)]
        if with_images:
            folders = subfolders(classes[with_images[0]])
            same = _shared(folders, inside[first if with_images[0] == second else second])
            counts = any(re.search(r"[^\W\d_]", name) and _holds_images(folders[name]) for name in same)
        else:
            counts = len(inside[first]) + len(inside[second]) > 2
        if number > 1 or counts:
            yield first, second


def _shared(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return those of the names that are also among the others; upper and lower case are the same."""
    known = {other.casefold() for other in others}
    return sorted(name for name in names if name.casefold() in known)


def shorten_list(names: list[str]) -> str:
    """Return the first three names and the number of the others, as text."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
