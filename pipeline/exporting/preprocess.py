"""Read photographs as the exported network expects them: pixels (IMAGE_SIZE, IMAGE_SIZE, CHANNELS) uint8.

`python preprocess.py PHOTO…` prints their most probable classes. It needs numpy, Pillow, and onnxruntime or torch.

The pixels are the same, bit for bit, as those on which the network was trained, if the version of Pillow is the same as
in export.json. The EXIF orientation is applied, color profiles are not. Transparent images are laid over white.
"""

import contextlib
import sys
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps

IMAGE_SIZE = 32
CHANNELS = 3
RESIZE = "crop"
# in the folder of this file
MODEL = "model.pt2"
LABELS = "labels.txt"
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")  # "JPEG" reads MPO files too
REFUSED_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F", "LAB")
MAX_PIXELS = 2**27
BICUBIC = Image.Resampling.BICUBIC


def preprocess(file: str | Path | IO[bytes]) -> Any:
    """Return the pixels of an image file, (IMAGE_SIZE, IMAGE_SIZE, CHANNELS) uint8.

    Raises ValueError for too many pixels, LAB colors and numbers that are not of 8 bits, and OSError for other files
    that cannot be read.
    """
    image: Image.Image = Image.open(file, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels; allowed: {MAX_PIXELS:,} in all")
    image.draft(None, (2 * IMAGE_SIZE, 2 * IMAGE_SIZE))  # decodes a much larger JPEG file at reduced size
    image.load()
    with contextlib.suppress(Exception):  # damaged EXIF data
        ImageOps.exif_transpose(image, in_place=True)
    return np.array(resize(convert(image))).reshape(IMAGE_SIZE, IMAGE_SIZE, CHANNELS)


def convert(image: Image.Image) -> Image.Image:
    """Return the image as gray or RGB with 8 bits."""
    if image.mode in REFUSED_MODES:
        raise ValueError(f"mode {image.mode}; allowed: gray or colors with 8 bits; save the image as such")
    if image.has_transparency_data or image.mode in ("La", "RGBa"):
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    elif image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")
    return image.convert("L" if CHANNELS == 1 else "RGB")


def resize(image: Image.Image) -> Image.Image:
    """Return the image with IMAGE_SIZE pixels a side: its center, with black bars, or stretched."""
    size = (IMAGE_SIZE, IMAGE_SIZE)
    if image.size == size:
        return image
    if RESIZE == "crop":
        return ImageOps.fit(image, size, method=BICUBIC)
    if RESIZE == "stretch":
        return image.resize(size, resample=BICUBIC)
    scale = IMAGE_SIZE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    padded = Image.new(image.mode, size)
    left, top = (IMAGE_SIZE - width) // 2, (IMAGE_SIZE - height) // 2
    padded.paste(image.resize((width, height), resample=BICUBIC), (left, top))
    return padded


def run(images: Any) -> Any:
    """Return the class probabilities (N, num_classes) of images (N, IMAGE_SIZE, IMAGE_SIZE, CHANNELS) uint8."""
    path = Path(__file__).parent / MODEL
    if path.suffix == ".onnx":
        import onnxruntime  # noqa: PLC0415  # not needed for `preprocess`

        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"images": images})[0]
    import torch  # noqa: PLC0415  # not needed for `preprocess`

    return torch.export.load(path).module()(torch.from_numpy(images)).numpy()


def main() -> int:
    """Print the most probable class of each photograph, and why others cannot be read; return the exit status."""
    if not sys.argv[1:]:
        print("usage: python preprocess.py PHOTO…", file=sys.stderr)
        return 2
    readable = []
    for photo in sys.argv[1:]:
        try:
            readable.append((photo, preprocess(photo)))
        except Exception as error:  # Pillow raises nearly anything for damaged files
            print(f"{photo}: {error}", file=sys.stderr)
    if readable:
        labels = (Path(__file__).parent / LABELS).read_text(encoding="utf-8").splitlines()
        rows = run(np.stack([pixels for _, pixels in readable]))
        for (photo, _), row in zip(readable, rows, strict=True):
            print(f"{photo}: {labels[row.argmax()]} {row.max():.1%}")
    return int(len(readable) < len(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
