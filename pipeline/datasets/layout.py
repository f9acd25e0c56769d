"""Which folders of a folder of images are splits and which are classes; raises UserError where that is ambiguous."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.images.decode import IMAGE_SUFFIXES, UNDECODABLE_SUFFIXES
from pipeline.params import bad_folder, check_is_folder

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trn", "trainval"), "train"),
    **dict.fromkeys(("validation", "validate", "validating", "val", "valid", "dev", "development"), "validation"),
    **dict.fromkeys(("test", "testing", "tst", "holdout", "eval", "evaluation"), "test"),
}
"""Words that name a split, in any case, and the split. What is evaluated on is `test`, as in the step `evaluate`."""
UNLABELED_WORDS = frozenset(
    {
        *("pred", "predict", "prediction", "predictions", "inference", "unsupervised"),
        *("unlabeled", "unlabelled", "unannotated", "unclassified", "unsorted"),
    }
)
"""Words that name a folder of images without classes, beside split folders or, with no other word, beside classes."""
IMAGES_WORDS = frozenset({"image", "images", "img", "imgs", "jpegimages"})
"""Names that say what every folder holds, so that they are hardly those of classes."""
FILLER_WORDS = frozenset({"set", "data", "dataset", "image", "images", "img", "imgs", "folder", "split", "sample"})
PASSED_OVER = frozenset(
    {
        *("thumbs.db", "ehthumbs.db", "desktop.ini", "picasa.ini", "__macosx", "@eadir", "lost+found"),
        *("$recycle.bin", "#recycle", "system volume information"),
    }
)
"""What systems leave beside images, lower case; names with a leading dot are passed over as well."""
_PHOTOGRAPH_SUFFIXES = IMAGE_SUFFIXES | UNDECODABLE_SUFFIXES


@dataclass(frozen=True)
class ClassFolder:
    """A folder with the images of one class in one split."""

    split: str
    name: str
    path: Path

    @property
    def member(self) -> str:
        """Its name in the archive."""
        return f"{self.split}/{self.name}"


@dataclass(frozen=True)
class Layout:
    """Where the classes are."""

    classes: list[ClassFolder]
    """In the order of the archive. Folders that hold classes only are the split train."""
    splits: dict[str, Path]
    """The folder whose sub-folders are the classes, for each split."""
    unlabeled: list[Path]
    """Folders of images without classes, beside the splits or beside the classes."""


def find_layout(root: Path) -> Layout:
    """Find splits and classes below `root`, through folders that hold nothing but one other folder of images.

    Raises UserError, with the layout that was seen and those that are allowed, where there are none to learn from,
    or where what looks like classes may be something else.
    """
    check_is_folder(root)
    if not subfolders(root):
        raise bad_folder(f"{str(root)!r} has no folders in it", "put your images there, a folder for each class")
    root = _unwrapped(root)
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
            if _is_unlabeled_alone(name):
                unlabeled.append(path)
            else:
                classes.append(ClassFolder(split, name, path))
    splits = {split: path for split, path in splits.items() if any(each.split == split for each in classes)}
    _check_names(root, classes, splits)
    for split in splits:
        _check_not_misread({each.name: each.path for each in classes if each.split == split})
    return Layout(sorted(classes, key=lambda each: f"{each.member}/"), splits, unlabeled)


def split_of(name: str) -> str | None:
    """The split that a folder's name means: one of its words names a split, and no other word another one."""
    splits = {SPLIT_WORDS[word] for word in _words(name) if word in SPLIT_WORDS}
    return splits.pop() if len(splits) == 1 else None


def is_hidden(name: str) -> bool:
    """Whether systems and tools made it, not the owner of the images."""
    return name.startswith(".") or name.lower() in PASSED_OVER


def suffix(name: str) -> str:
    """A file name's suffix in lower case, with the dot; a hundred thousand `PurePath` would take seconds."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122


def subfolders(folder: Path) -> dict[str, Path]:
    return {name: Path(entry.path) for name, entry in entries(folder, only_folders=True)}


def entries(folder: Path, *, only_folders: bool = False) -> list[tuple[str, os.DirEntry[str]]]:
    """What the folder holds, under names in Unicode's composed form (NFC), whichever form the file system keeps.

    A folder sorts as if its name ended in "/", which makes the whole walk sorted by code point. Raises UserError
    for a name that is not UTF-8, for two that are the same in that form, for a link to a folder and a broken link.
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
            name = _composed(entry)
            if name in named:
                raise UserError(
                    f"download.folder: {str(folder)!r} has two names that read {name!r} and differ only in their "
                    "Unicode form; allowed: one; rename one of them"
                )
            named[name] = entry
    return sorted(named.items(), key=lambda item: f"{item[0]}/" if item[1].is_dir() else item[0])


def _check_link(entry: os.DirEntry[str]) -> None:
    """Raises UserError unless it is a link to a file, which DVC reads as it reads the file itself."""
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


def _words(name: str) -> list[str]:
    """The words of a name in lower case, without fillers and digits: seg, train for `Seg_TrainSet-2`."""
    spaced = re.sub(r"([a-z])([A-Z])", r"\1 \2", name)
    joined = re.sub(r"hold[\W_]*out", "holdout", spaced.casefold())
    words = [re.sub(rf"(?<=.)({'|'.join(FILLER_WORDS)})s?$", "", word) for word in re.findall(r"[^\W\d_]+", joined)]
    return [word for word in words if word not in FILLER_WORDS]


def _is_unlabeled(name: str) -> bool:
    return not UNLABELED_WORDS.isdisjoint(_words(name))


def _is_unlabeled_alone(name: str) -> bool:
    """Whether the name says nothing else, so that it is hardly a class such as `prediction error`."""
    words = _words(name)
    return bool(words) and UNLABELED_WORDS.issuperset(words)


def _is_split_alone(name: str) -> bool:
    """Whether the name says nothing but the split, so that it is hardly a class such as `train station`."""
    return split_of(name) is not None and all(word in SPLIT_WORDS for word in _words(name))


def _has_splits(folders: Mapping[str, Path]) -> bool:
    """Whether the folders are splits: one that says nothing else has folders in it, or several are called so.

    A folder that is called train, but holds images and no folders, is a class, unless there is a test beside it.
    """
    labeled = {name: path for name, path in folders.items() if not _is_unlabeled(name)}
    alone = {name: path for name, path in labeled.items() if _is_split_alone(name)}
    if len({split_of(name) for name in alone}) > 1 or any(subfolders(path) for path in alone.values()):
        return True
    if not labeled or not all(split_of(name) for name in labeled):
        return False
    return len(alone) == len(labeled) or any(subfolders(path) for path in labeled.values())


def _check_no_split_in_names(folders: Mapping[str, Path]) -> None:
    """Raises UserError for names that hold class and split in one, as in `cats_train` beside `cats_test`."""
    named: dict[tuple[str, ...], str] = {}
    for name, path in folders.items():
        if (split := split_of(name)) and not subfolders(path):
            other = named.setdefault(tuple(word for word in _words(name) if word not in SPLIT_WORDS), name)
            if split_of(other) != split:
                raise bad_folder(
                    f"{str(folders[other])!r} and {str(path)!r} seem to have the class and the split in one name",
                    "make a folder for each split, with a folder for each class in it",
                )


def _unwrapped(folder: Path, *, known: Iterable[str] = (), splits: bool = True) -> Path:
    """The folder, or what it only wraps: one folder of folders. None of the `known` classes is a wrapper."""
    while not (splits and _has_splits(subfolders(folder))):
        inside = {name: path for name, path in subfolders(folder).items() if _holds_images(path)}
        name, path = next(iter(inside.items()), ("", folder))
        if len(inside) != 1 or name in known or not subfolders(path) or _holds_images(folder, deep=False):
            break
        if _holds_images(path, deep=False):  # then it is a class
            break
        folder = path
    return folder


def _holds_images(folder: Path, *, deep: bool = True) -> bool:
    """Whether there is an image by its suffix, readable or not; a large folder is not listed to its end."""
    with os.scandir(folder) as found:
        visible = (entry for entry in found if not is_hidden(entry.name))
        return any(
            (deep and _holds_images(Path(entry.path)))
            if entry.is_dir(follow_symlinks=False)
            else suffix(entry.name) in _PHOTOGRAPH_SUFFIXES
            for entry in visible
        )


def _split_folders(root: Path, folders: Mapping[str, Path]) -> dict[str, Path]:
    """The folders that hold the classes, by split, train first."""
    named: dict[str, Path] = {}
    for name, path in folders.items():
        split = split_of(name)
        if split is None and not _holds_images(path):
            continue  # annotations, for instance
        if split is None:
            beside = ", ".join(other for other in folders if split_of(other))
            raise bad_folder(f"{str(path)!r} beside the splits {beside}", "move or rename that folder")
        if split in named:
            raise bad_folder(f"both {str(named[split])!r} and {str(path)!r} are the split {split}", "leave one of them")
        named[split] = path
    if "train" not in named:
        raise bad_folder(
            f"{str(root)!r} has {', '.join(folders)} with folders inside, but no train",
            "add train/<class>/…, or rename them",
        )
    train = _unwrapped(named.pop("train"), splits=False)
    known = subfolders(train)
    splits = {"train": train} | {
        split: _unwrapped(named[split], known=known, splits=False) for split in ("validation", "test") if split in named
    }
    for path in splits.values():
        if not subfolders(path):
            raise bad_folder(
                f"{str(path)!r} has no class folders in it",
                "sort its images into a folder for each class, or move it away",
            )
    return splits


def _check_names(root: Path, classes: list[ClassFolder], splits: Mapping[str, Path]) -> None:
    """Raises UserError for too few classes, and for names that cannot be those of classes."""
    known = {each.name for each in classes if each.split == "train"}
    alike: dict[tuple[str, str], ClassFolder] = {}
    for each in classes:
        if each.name == "predicted_class":  # the first column of what a served model answers
            raise bad_folder(f"{str(each.path)!r} has a name that is taken", "rename it")
        other = alike.setdefault((each.split, each.name.strip().casefold()), each)
        if other is not each:
            found = f"{str(other.path)!r} and {str(each.path)!r} differ only in upper and lower case or in spaces"
            raise bad_folder(found, "merge them, or rename one")
        if each.name not in known:
            like = alike.get(("train", each.name.strip().casefold()))
            hint = (
                f"rename it to {like.name!r}" if like else "sort its images into the classes of train, or move it away"
            )
            raise bad_folder(f"{str(each.path)!r} is a class that train does not have", hint)
    if not known:
        raise bad_folder(f"{str(splits.get('train', root))!r} has no class folders in it", "add two classes at least")
    if len(known) < 2:
        inside = next((each.path for each in classes if len(subfolders(each.path)) > 1), None)
        hint = (
            f"set download.folder to {str(inside)!r} if its folders are the classes" if inside else "add another class"
        )
        raise bad_folder(f"{str(splits.get('train', root))!r} has one class only, {next(iter(known))!r}", hint)


def _check_not_misread(classes: Mapping[str, Path]) -> None:
    """Raises UserError where the folders inside the classes say that these are no classes.

    That is: splits inside a class; a class inside another one, or a copy of all of them; sub-folders of the same names
    in several (color and grayscale above the classes, masks below them beside images or a folder of images); a folder
    called `images`, beside masks for instance.
    """
    for name, path in classes.items():
        if re.sub(r"[\W_]+", "", name.casefold()) in IMAGES_WORDS:
            beside = listed([other for other in classes if other != name])
            raise bad_folder(
                f"{str(path)!r} is hardly a class, and beside it lies {beside}",
                "set download.folder to it if its folders are the classes, else rename it",
            )
    inside = {name: sorted(subfolders(_unwrapped(path, splits=False))) for name, path in classes.items()}
    for name, names in inside.items():
        where = f"{str(classes[name])!r} has the folders {listed(names)} in it"
        if len({split_of(each) for each in names if _is_split_alone(each)}) > 1:
            raise bad_folder(f"{where}: splits inside a class", "put the splits above the classes")
        if same := sorted(set(names) & (set(classes) - {name})):
            raise bad_folder(
                f"{where}, and beside it lies {listed(same)}", "move one of the two away, or rename the one inside"
            )
    for first, second in _alike(classes, inside):
        both = f"{str(classes[first])!r} and {str(classes[second])!r}"
        same = _shared(inside[first], inside[second])
        raise bad_folder(
            f"{both} both have the folders {listed(same)} in them, so they may be no classes",
            f"set download.folder to one of the two if its folders are the classes; if {first} and {second} are, "
            "move the images that are meant into them, and those folders away",
        )


def _alike(classes: Mapping[str, Path], inside: Mapping[str, list[str]]) -> Iterator[tuple[str, str]]:
    """Pairs of classes with sub-folders of the same names: several, or one beside other folders or beside images.

    Beside images, one does not count if it holds no images or its name has no letters, as that of a date.
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
    """Return those of the names that are also among the others, in upper or lower case."""
    known = {other.casefold() for other in others}
    return sorted(name for name in names if name.casefold() in known)


def listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
