"""Pack the images of CIFAR-10 into one file of 18 MB, for a GPU machine without internet.

`python -m benchmarks.gpu.pack [--images FOLDER] --out FILE` takes a tree of JPEG files, `<split>/<class>/*.jpg`, or the
archive of such a tree beside the project. The file holds the content of the JPEG files in the order of the arrays that
the step normalize writes for cifar10_fast94, the labels, and `dataset.json`.
"""

import argparse
import hashlib
import lzma
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cifar10 import add_images, prepare_apart
from benchmarks.gpu.images import RECIPE, decode_jpeg
from benchmarks.recipe import SPLITS
from benchmarks.ways import CIFAR10_IMAGES, arrays
from pipeline.artifacts import Images, read_split, write_bytes
from pipeline.core.errors import UserError, report_errors


def pack(tree: Path, folder: Path, file: Path) -> int:
    """Pack the JPEG files of `tree` whose pixels are in the arrays of `folder`; return the size of `file` in bytes."""
    contents = {}
    for path in sorted(tree.glob("*/*/*.jpg")):
        content = path.read_bytes()
        contents[_digest(decode_jpeg(content))] = content
    splits = {name: read_split(name, folder=folder) for name in SPLITS}
    digests = [_digest(image) for images, _ in splits.values() for image in images]
    if missing := sum(digest not in contents for digest in digests):
        raise UserError(f"{tree}: {missing} images of {folder} are not in it; name the tree that it was made from")
    files = [contents[digest] for digest in digests]
    packed = BytesIO()
    values: dict[str, Any] = {f"{name}_labels": labels.astype(np.uint8) for name, (_, labels) in splits.items()}
    values["jpegs"] = np.frombuffer(lzma.compress(b"".join(files)), np.uint8)
    values["sizes"] = np.array([len(jpeg) for jpeg in files], np.int32)
    values["description"] = np.frombuffer((folder / "dataset.json").read_bytes(), np.uint8)
    np.savez(packed, **values)
    write_bytes(file, packed.getvalue())
    return file.stat().st_size


def _digest(pixels: Images) -> bytes:
    """Return the MD5 of the pixels of an image."""
    return hashlib.md5(np.ascontiguousarray(pixels).tobytes(), usedforsecurity=False).digest()


def main() -> None:
    """Pack the images that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.pack",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_images(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the packed file")
    arguments = parser.parse_args()
    prepare_apart(arguments.images, recipe=RECIPE)
    size = pack(CIFAR10_IMAGES, arrays(RECIPE), arguments.out)
    print(f"{arguments.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    with report_errors():
        main()
