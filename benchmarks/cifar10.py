"""CIFAR-10 for the benchmarks, made once in `.cache/benchmarks/cifar10/`; its time counts in none of them.

`python -m benchmarks.cifar10 [--images FOLDER]` takes a tree of JPEG files, `<split>/<class>/*.jpg` with the splits
train and test, or the archive of such a tree beside the project, and makes

    images/                the tree
    cifar-10-batches-py/   the same pixels in the layout of the official archive, as torchvision reads them
    download/              that archive, as the pipeline's download leaves it
    normalize/             the same pixels as the pipeline's normalize leaves them, by the recipe cifar10_lenet

What is there, made from the same images by the same parameters, stays.
"""

import argparse
import io
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.ways import CIFAR10, CIFAR10_IMAGES
from pipeline.artifacts import CIFAR10_ARCHIVE
from pipeline.normalize import normalize
from pipeline.params import NormalizeParams, check_params, compose
from pipeline.raw import CIFAR_BATCHES, CIFAR_FOLDER, CIFAR_SIZE

ARCHIVE = Path("../shared/data/cifar10-jpeg.tar.gz")
RECIPE = "cifar10_lenet"


def add_images(parser: argparse.ArgumentParser) -> None:
    """The option that says where the images are."""
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="a tree <split>/<class>/*.jpg: train and test")


def prepare_apart(images: Path | None) -> None:
    """Prepare in another process: its memory would count as that of every process that this one starts after it."""
    option = ["--images", str(images)] if images else []
    done = subprocess.run([sys.executable, "-m", "benchmarks.cifar10", *option], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def prepare(images: Path | None) -> None:
    """Make the folder, or leave it if it was made from the same."""
    params = check_params(compose(RECIPE, {}), origin=RECIPE).normalize
    description = json.dumps({"images": _origin(images), **params.model_dump(mode="json")}, indent=2)
    mark = CIFAR10 / "made_from.json"
    if mark.exists() and mark.read_text() == description:
        return
    fresh = CIFAR10.with_name("cifar10.tmp")
    for leftover in (fresh, CIFAR10):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    _make(fresh, images, params=params)
    (fresh / mark.name).write_text(description)
    fresh.rename(CIFAR10)


def _origin(images: Path | None) -> str:
    """The tree or archive; ends the program where there is none."""
    if images is None and not ARCHIVE.is_file():
        _refuse(f"{ARCHIVE} is not there; name a tree <split>/<class>/*.jpg of CIFAR-10: --images FOLDER")
    if images is not None and not all((images / split).is_dir() for split in ("train", "test")):
        _refuse(f"--images: {images} has no folders train and test; allowed: a tree <split>/<class>/*.jpg")
    return str((images or ARCHIVE).resolve())


def _refuse(problem: str) -> None:
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)


def _make(folder: Path, images: Path | None, *, params: NormalizeParams) -> None:
    tree = folder / CIFAR10_IMAGES.name
    if images is not None:
        tree.symlink_to(images.resolve())
    else:
        with tarfile.open(ARCHIVE) as archive:
            archive.extractall(tree, filter="data")
    files = official_files(tree)
    (folder / CIFAR_FOLDER).mkdir()
    for name, content in files.items():
        (folder / CIFAR_FOLDER / name).write_bytes(content)
    download = folder / "download"
    download.mkdir()
    write_archive(download / CIFAR10_ARCHIVE, files)
    (download / "source.json").write_text('{"dataset": "cifar10"}')
    normalize(download, folder / "normalize", params=params)


def official_files(tree: Path) -> dict[str, bytes]:
    """The files of the official archive by name, for a tree `<split>/<class>/*.jpg`; each batch has all classes."""
    classes = sorted(path.name for path in (tree / "train").iterdir())
    paths = {
        split: sorted((tree / split).rglob("*.jpg"), key=lambda path: (path.name, path.parent.name))
        for split in ("train", "test")
    }
    meta = {"label_names": classes, "num_cases_per_batch": len(paths["test"]), "num_vis": 3 * CIFAR_SIZE**2}
    files = {"batches.meta": pickle.dumps(meta, protocol=2)}
    training = [name for name, split in CIFAR_BATCHES if split == "train"]
    for number, name in enumerate(training):
        start, end = (len(paths["train"]) * part // len(training) for part in (number, number + 1))
        files[name] = _batch(paths["train"][start:end], classes)
    return {**files, "test_batch": _batch(paths["test"], classes)}


def _batch(paths: list[Path], classes: list[str]) -> bytes:
    """One file of the official archive: a pickled dictionary of pixels (n, 3072), channels first, and labels."""
    content: dict[str, Any] = {
        "data": np.stack([_pixels(path) for path in paths]),
        "labels": [classes.index(path.parent.name) for path in paths],
        "filenames": [path.name for path in paths],
        "batch_label": "batch",
    }
    return pickle.dumps(content, protocol=2)


def _pixels(path: Path) -> npt.NDArray[np.uint8]:
    pixels = np.asarray(Image.open(path))
    if pixels.shape != (CIFAR_SIZE, CIFAR_SIZE, 3):
        _refuse(f"{path} is {pixels.shape}; allowed: {CIFAR_SIZE}x{CIFAR_SIZE} pixels of 3 channels")
    return pixels.transpose(2, 0, 1).reshape(-1)


def write_archive(path: Path, files: Mapping[str, bytes]) -> None:
    """The official archive, hardly compressed."""
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{CIFAR_FOLDER}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def main() -> None:
    """Prepare the images."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cifar10", description="Prepare CIFAR-10.")
    add_images(parser)
    prepare(parser.parse_args().images)


if __name__ == "__main__":
    main()
