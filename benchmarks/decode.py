"""Compare JPEG decoding at reduced size, which `pipeline.images.decode` uses for large files, with decoding in full.

`python -m benchmarks.decode FOLDER [IMAGES]` takes that many JPEG files of the folder and its sub-folders, as they are
and enlarged to 12 megapixels, with noise as of a camera, at quality 92. It prints seconds per image, differences of
pixels (0 to 255) at 224 x 224, and how the predictions of an EfficientNet-Lite0 with ImageNet's weights change.
"""

import argparse
import io
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch
from PIL import Image, ImageFilter

from benchmarks.setting import positive
from benchmarks.table import header, table
from pipeline.core.errors import UserError, report_errors
from pipeline.images import decode
from pipeline.models.names import TIMM_PREFIX
from pipeline.models.packaged import PACKAGED_NETWORK, PIXEL_MEAN, PIXEL_STD
from pipeline.models.timm import read_timm_weights

SIZE = 224
WIDTH, HEIGHT = 4000, 3000
NOISE = 6.0  # standard deviation, of 255
FULL = 2**10  # times SIZE: larger than any file, which is decoded in full
Pixels = npt.NDArray[np.uint8]  # (N, SIZE, SIZE, 3)


def enlarged(content: bytes, *, seed: int) -> bytes:
    """Return a JPEG file of WIDTH x HEIGHT pixels with sharp edges and noise."""
    image = Image.open(io.BytesIO(content)).convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    sharp = np.asarray(image.filter(ImageFilter.UnsharpMask(radius=6, percent=200)))
    noise = np.random.default_rng(seed).normal(0, NOISE, sharp.shape)
    stream = io.BytesIO()
    Image.fromarray(np.clip(sharp + noise, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=92)
    return stream.getvalue()


def decoded(files: list[bytes], *, factor: int) -> tuple[Pixels, float]:
    """Return the pixels of the files, decoded not below `factor` times SIZE, and the seconds per image."""
    decode.DRAFT_FACTOR = factor
    start = time.process_time()
    images = [decode.decode(file, image_size=SIZE, channels=3, resize="crop") for file in files]
    return np.stack(images), (time.process_time() - start) / len(files)


def network() -> Any:
    """Return an EfficientNet-Lite0 with the packaged weights."""
    model = timm.create_model(PACKAGED_NETWORK.removeprefix(TIMM_PREFIX))
    model.load_state_dict(read_timm_weights(PACKAGED_NETWORK, md5=None))
    return model.eval()


@torch.inference_mode()
def probabilities(model: Any, pixels: Pixels) -> torch.Tensor:
    """Return the probabilities (N, 1000) of ImageNet's classes."""
    scaled = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - PIXEL_MEAN) / PIXEL_STD
    return torch.cat([model(batch).softmax(dim=1) for batch in torch.split(scaled, 16)])


def rows(name: str, files: list[bytes], model: Any) -> Iterator[list[str]]:
    """Yield the rows of the table for these files."""
    full, full_seconds = decoded(files, factor=FULL)
    expected = probabilities(model, full)
    yield [name, "in full", f"{full_seconds * 1000:.1f}", "", "", "", ""]
    for factor in (2, 1):
        pixels, seconds = decoded(files, factor=factor)
        difference = np.abs(pixels.astype(int) - full)
        found = probabilities(model, pixels)
        agreement = float((found.argmax(1) == expected.argmax(1)).double().mean())
        yield [
            name,
            f"at least {factor} x {SIZE}",
            f"{seconds * 1000:.1f}",
            f"{difference.mean():.2f}",
            f"{difference.max()}",
            f"{agreement:.1%}",
            f"{float((found - expected).abs().max()):.3f}",
        ]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a folder of photographs in JPEG")
    parser.add_argument("repeats", nargs="?", type=positive, default=100, metavar="IMAGES", help="default: 100")
    arguments = parser.parse_args()
    files = [path.read_bytes() for path in islice(sorted(arguments.folder.rglob("*.jpg")), arguments.repeats)]
    if not files:
        raise UserError(f"{arguments.folder}: found no .jpg files; allowed: a folder with some; name another folder")
    torch.set_num_threads(1)
    print(header(seeds="0, 1, … for the noise"))
    heading = ["images", "decoded", "CPU ms per image", "mean difference", "largest", "same class", "largest change"]
    model = network()
    found = [heading, *rows("as they are", files, model)]
    large = [enlarged(file, seed=seed) for seed, file in enumerate(files)]
    print(table([*found, *rows("12 megapixels", large, model)]))


if __name__ == "__main__":
    with report_errors():
        main()
