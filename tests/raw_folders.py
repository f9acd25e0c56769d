"""Make small folders of raw data such as `pipeline.download` writes."""

import io
import json
import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from pipeline.artifacts import write_checksums
from pipeline.datasets import cifar10
from pipeline.params import NormalizeParams
from tests import conftest

NAMES = ["cat", "dog"]


def params(**changes: Any) -> NormalizeParams:
    return conftest.params(**{f"normalize__{name}": value for name, value in changes.items()}).normalize


def noise(seed: int, *, size: int = 32, channels: int = 3) -> Any:
    """Return pixels (size, size, channels) uint8 of coarse random patches, as different as photographs are."""
    patches = np.random.default_rng(seed).integers(0, 256, (size // 4, size // 4, channels), dtype=np.uint8)
    return patches.repeat(4, axis=0).repeat(4, axis=1)


def encoded(pixels: Any, file_format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(stream, file_format, **options)
    return stream.getvalue()


def image_folder(folder: Path, files: Mapping[str, bytes], **changes: Any) -> Path:
    """Write a folder of the data source imagefolder, with files such as {"train/cat/1.png": content} in this order."""
    counts: dict[str, dict[str, int]] = {}
    for name in files:
        split, label = name.split("/")[:2]
        counts.setdefault(split, {}).setdefault(label, 0)
        counts[split][label] += 1
    write_tar(folder / "images.tar", files, mode="w")
    description = {"class_names": sorted(counts["train"]), "counts": counts, "ignored_files": [], **changes}
    return _described(folder, "imagefolder", **description)


def plain_files(*, per_class: int, split: str = "train", seed: int = 0) -> dict[str, bytes]:
    return {
        f"{split}/{label}/{number}.png": encoded(noise(seed + 1000 * position + number))
        for position, label in enumerate(NAMES)
        for number in range(per_class)
    }


def cifar_folder(folder: Path, *, per_batch: int = 20, **changes: Any) -> Path:
    """Write a folder of the data source cifar10 with few images; `changes` replace batches, as `test_batch={...}`."""
    batches: dict[str, Any] = {f"data_batch_{number}": cifar_batch(number, per_batch) for number in range(5, 0, -1)}
    batches |= {"test_batch": cifar_batch(6, per_batch), "batches.meta": {b"label_names": [b"cat", b"dog"]}}
    pickles = {
        f"{cifar10.ARCHIVE_FOLDER}/{name}": pickle.dumps(value, 2) for name, value in {**batches, **changes}.items()
    }
    write_tar(folder / cifar10.ARCHIVE, pickles, mode="w:gz")
    return _described(folder, "cifar10")


def cifar_batch(seed: int, count: int) -> dict[bytes, Any]:
    images = np.stack([noise(100 * seed + number).transpose(2, 0, 1).reshape(-1) for number in range(count)])
    return {b"data": images, b"labels": [number % 2 for number in range(count)]}


def digits_folder(folder: Path) -> Path:
    digits = load_digits()
    folder.mkdir(parents=True)
    np.save(folder / "images.npy", digits.images.astype(np.uint8))
    np.save(folder / "labels.npy", digits.target.astype(np.int64))
    return _described(folder, "digits")


def write_tar(path: Path, files: Mapping[str, bytes], *, mode: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _described(folder: Path, dataset: str, **more: Any) -> Path:
    (folder / "source.json").write_text(json.dumps({"dataset": dataset, **more}), encoding="utf-8")
    write_checksums(folder)
    return folder


def checksum(header: bytes) -> int:
    """Return the checksum of a tar header: the sum of its bytes, with spaces in place of the checksum."""
    return sum(header) - sum(header[148:156]) + 8 * ord(" ")
