"""Make the arrays of CIFAR-10 on a GPU machine: from a packed file, from a tree of images, or random for a dry run."""

import json
import lzma
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from PIL import Image

from benchmarks.gpu.part import CONTEXT, Setting
from benchmarks.gpu.toy import MEAN, STD
from benchmarks.recipe import SPLITS
from benchmarks.ways import arrays
from pipeline.artifacts import Images, write_array, write_json
from pipeline.core.errors import UserError
from pipeline.core.processes import num_cores

RECIPE = "cifar10_fast94"
IMAGES_PER_BLOCK = 2000  # that a process decodes at a time
DRY_COUNTS = {"train": 8, "validation": 4, "test": 4}


def make_arrays(images: Path | None, setting: Setting) -> None:
    """Make the folder `setting.arrays` as the step normalize would, from a tree or a packed file.

    In a dry run without `images`, the pixels are random. Raises UserError where there are no images, or the file is
    damaged.
    """
    if images is None and setting.dry:
        _write_random_arrays(setting.arrays)
    elif images is not None and images.is_file():
        unpack(images, setting.arrays)
    elif images is not None and not images.is_dir():
        allowed = "a tree <split>/<class>/*.jpg, or the file of python -m benchmarks.gpu.pack"
        raise UserError(f"--images: {images}: no such folder or file; allowed: {allowed}")
    else:
        option = ["--images", str(images)] if images else []
        command = [sys.executable, "-m", "benchmarks.cifar10", *option, "--recipe", RECIPE]
        if status := subprocess.run(command, check=False).returncode:
            sys.exit(status)
        setting.arrays.symlink_to(arrays(RECIPE).resolve())


def unpack(file: Path, folder: Path) -> None:
    """Write the arrays of a packed file; raise UserError where it is damaged, or where other pixels are decoded."""
    try:
        with np.load(file) as content:
            packed = {name: content[name] for name in content.files}
        jpegs, description = lzma.decompress(packed["jpegs"].tobytes()), json.loads(packed["description"].tobytes())
        labels = {name: packed[f"{name}_labels"] for name in SPLITS}
        pixels, packed_md5 = _decode(jpegs, packed["sizes"]), description["md5"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, lzma.LZMAError) as error:
        raise UserError(
            f"--images: {file}: damaged ({error}); make it again with `python -m benchmarks.gpu.pack`"
        ) from None
    md5 = write_arrays(folder, pixels, labels, description)
    differ = [name for name, value in md5.items() if packed_md5.get(name) != value]
    if differ:
        raise UserError(
            f"--images: {file}: {', '.join(differ)} differ from what was packed; install the version of Pillow that "
            "packed it, whose libjpeg decodes the same pixels, or make the file again"
        )


def write_arrays(
    folder: Path, pixels: Images, labels: Mapping[str, Any], description: Mapping[str, Any]
) -> dict[str, str]:
    """Write arrays and `dataset.json`; return the MD5 of each array."""
    md5, start = {}, 0
    for name in SPLITS:
        images, targets = f"{name}_images.npy", f"{name}_labels.npy"
        shape = (len(labels[name]), *pixels.shape[1:])
        block = pixels[start : start + shape[0]]
        md5[images] = write_array(folder / images, [block], shape=shape, dtype=np.uint8)
        md5[targets] = write_array(folder / targets, [labels[name]], shape=shape[:1], dtype=np.int64)
        start += shape[0]
    write_json(folder / "dataset.json", description)
    return md5


def _write_random_arrays(folder: Path) -> None:
    """Write the arrays of a few random images of ten classes."""
    draw = np.random.default_rng(0)
    labels = {name: np.arange(number) % 10 for name, number in DRY_COUNTS.items()}
    pixels = draw.integers(0, 256, (sum(DRY_COUNTS.values()), 32, 32, 3), dtype=np.uint8)
    names = [str(number) for number in range(10)]
    counts = {
        split: dict(zip(names, np.bincount(values, minlength=10).tolist(), strict=True))
        for split, values in labels.items()
    }
    description = {
        "dataset": "random",
        "class_names": names,
        "image_size": 32,
        "channels": 3,
        "resize": "crop",
        "mean": MEAN,
        "std": STD,
        "counts": counts,
        "test_duplicates": [],
    }
    write_arrays(folder, pixels, labels, description)


def _decode(jpegs: bytes, sizes: Any) -> Images:
    """Decode the JPEG files, which are concatenated in `jpegs`, on all cores; return the pixels (N, H, W, C)."""
    ends = np.cumsum(sizes, dtype=np.int64).tolist()
    files = [jpegs[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    blocks = [files[start : start + IMAGES_PER_BLOCK] for start in range(0, len(files), IMAGES_PER_BLOCK)]
    with ProcessPoolExecutor(min(num_cores(), 12), mp_context=CONTEXT) as pool:
        return np.concatenate(list(pool.map(_decode_block, blocks)))


def _decode_block(files: list[bytes]) -> Images:
    """Return the pixels of several JPEG files."""
    return np.stack([decode_jpeg(content) for content in files])


def decode_jpeg(content: bytes) -> Images:
    """Return the pixels (H, W, C) uint8 of a JPEG file."""
    return np.asarray(Image.open(BytesIO(content)))
