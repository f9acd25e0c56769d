"""Prepare CIFAR-10 for the benchmarks, once, in `.cache/benchmarks/cifar10/` (1 GB); no benchmark measures this.

`python -m benchmarks.cifar10 [--images FOLDER] [--recipe RECIPE]` takes a tree of JPEG files, `<split>/<class>/*.jpg`
with the splits train and test, or the archive of such a tree beside the project, and writes

    images/                the tree
    cifar-10-batches-py/   the same pixels in the layout of the official archive, as torchvision reads them
    download/              that archive, as the pipeline's download writes it
    normalize/<recipe>/    the same pixels, as the pipeline's normalize writes them for the recipe

What already exists, made from the same images with the same parameters, is not made again.
"""

import argparse
import io
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.ways import CIFAR10, CIFAR10_IMAGES, RECIPE, arrays
from pipeline.artifacts import file_md5, write_checksums
from pipeline.core.errors import UserError, report_errors
from pipeline.datasets.cifar10 import ARCHIVE as OFFICIAL_ARCHIVE
from pipeline.datasets.cifar10 import ARCHIVE_FOLDER, BATCHES, IMAGE_SIZE
from pipeline.normalize import normalize
from pipeline.params import check_params
from pipeline.recipes import compose

ARCHIVE = Path("../shared/data/cifar10-jpeg.tar.gz")


def add_images(parser: argparse.ArgumentParser) -> None:
    """Add the option --images, the folder of the images, to a command line."""
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="a tree <split>/<class>/*.jpg: train and test")


def archive_overrides() -> list[str]:
    """Return the overrides with which `download` reads the archive that `prepare` wrote."""
    archive = (CIFAR10 / "download" / OFFICIAL_ARCHIVE).resolve()
    return [f"download.urls=[{archive}]", f"download.md5={file_md5(archive)}"]


def prepare_apart(images: Path | None, *, recipe: str = RECIPE) -> None:
    """Prepare the images in another process, so that the memory it takes does not count for processes started later."""
    option = ["--images", str(images)] if images else []
    done = subprocess.run([sys.executable, "-m", "benchmarks.cifar10", *option, "--recipe", recipe], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def prepare(images: Path | None, *, recipe: str) -> None:
    """Make what is missing or was made from other images; raise UserError where there are no images."""
    params = check_params(compose(recipe, {}), origin=recipe).normalize
    origin = {"images": _origin(images), "with": "checksums.md5"}
    _make_once(CIFAR10, origin, lambda folder: _make_archive(folder, images))
    _make_once(
        arrays(recipe),
        {**origin, **params.model_dump(mode="json")},
        lambda folder: normalize(CIFAR10 / "download", folder, params=params),
    )


def _make_once(folder: Path, description: Mapping[str, Any], make: Callable[[Path], object]) -> None:
    """Call `make` for a new folder that replaces `folder`, unless that was made from the same description."""
    made_from, text = folder / "made_from.json", json.dumps(description, indent=2)
    if made_from.exists() and made_from.read_text() == text:
        return
    fresh = folder.with_name(f"{folder.name}.tmp")
    for leftover in (fresh, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    make(fresh)
    (fresh / made_from.name).write_text(text)
    fresh.rename(folder)


def _origin(images: Path | None) -> str:
    """Return the path of the tree or of the archive; raise UserError where there is none."""
    if images is None and not ARCHIVE.is_file():
        raise UserError(
            "found no images of CIFAR-10; name a tree <split>/<class>/*.jpg of them: make bench IMAGES=FOLDER, "
            "or --images FOLDER"
        )
    if images is not None and not all((images / split).is_dir() for split in ("train", "test")):
        raise UserError(
            f"--images: {images} has no folders train and test; allowed: a tree <split>/<class>/*.jpg; name another one"
        )
    return str((images or ARCHIVE).resolve())


def _make_archive(folder: Path, images: Path | None) -> None:
    """Make the tree of images, the files of the official archive, and the archive, in `folder`."""
    tree = folder / CIFAR10_IMAGES.name
    if images is not None:
        tree.symlink_to(images.resolve())
    else:
        with tarfile.open(ARCHIVE) as archive:
            # Python 3.11.3 and earlier have no filters
            archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, _path: member)
            archive.extractall(tree)  # noqa: S202  # the archive is the project's own
    files = official_files(tree)
    (folder / ARCHIVE_FOLDER).mkdir()
    for name, content in files.items():
        (folder / ARCHIVE_FOLDER / name).write_bytes(content)
    download = folder / "download"
    download.mkdir()
    write_archive(download / OFFICIAL_ARCHIVE, files)
    (download / "source.json").write_text('{"dataset": "cifar10"}')
    write_checksums(download)


def official_files(tree: Path) -> dict[str, bytes]:
    """Return the content of the official archive's files by name, from `<split>/<class>/*.jpg`."""
    classes = sorted(path.name for path in (tree / "train").iterdir() if path.is_dir())
    paths = {split: _mixed(tree / split, classes) for split in ("train", "test")}
    meta = {"label_names": classes, "num_cases_per_batch": len(paths["test"]), "num_vis": 3 * IMAGE_SIZE**2}
    files = {"batches.meta": pickle.dumps(meta, protocol=2)}
    train_files = [name for name, split in BATCHES if split == "train"]
    for number, name in enumerate(train_files):
        start, end = (len(paths["train"]) * index // len(train_files) for index in (number, number + 1))
        files[name] = _batch(paths["train"][start:end], classes)
    return {**files, "test_batch": _batch(paths["test"], classes)}


def _mixed(folder: Path, classes: list[str]) -> list[Path]:
    """Return the files of a split in an order in which the classes take turns."""
    by_class = [sorted((folder / name).glob("*.jpg")) for name in classes]
    if not all(by_class):
        raise UserError(
            f"{folder}: one of the classes in train has no *.jpg here; allowed: <split>/<class>/*.jpg of CIFAR-10; "
            "name a complete tree"
        )
    return [path for path in chain.from_iterable(zip_longest(*by_class)) if path is not None]


def _batch(paths: list[Path], classes: list[str]) -> bytes:
    """Return a file of the official archive: a pickled dictionary of pixels (n, 3072), channels first, and labels."""
    content: dict[str, Any] = {
        "data": np.stack([_pixels(path) for path in paths]),
        "labels": [classes.index(path.parent.name) for path in paths],
        "filenames": [path.name for path in paths],
        "batch_label": "batch",
    }
    return pickle.dumps(content, protocol=2)


def _pixels(path: Path) -> npt.NDArray[np.uint8]:
    """Return the pixels of an image: (3072,) uint8, channels first; raise UserError where it has another size."""
    pixels = np.asarray(Image.open(path))
    if pixels.shape != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise UserError(
            f"{path} has the shape {pixels.shape}; allowed: {(IMAGE_SIZE, IMAGE_SIZE, 3)}; name images of CIFAR-10"
        )
    return pixels.transpose(2, 0, 1).reshape(-1)


def write_archive(path: Path, files: Mapping[str, bytes]) -> None:
    """Write the archive in the official layout, with the lowest compression."""
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{ARCHIVE_FOLDER}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def main() -> None:
    """Prepare the images that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cifar10", description="Prepare CIFAR-10.")
    add_images(parser)
    parser.add_argument("--recipe", default=RECIPE, help=f"the recipe of the arrays; default: {RECIPE}")
    arguments = parser.parse_args()
    prepare(arguments.images, recipe=arguments.recipe)


if __name__ == "__main__":
    with report_errors():
        main()
