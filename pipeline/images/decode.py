"""Decode image files to arrays of one size and number of channels, in all formats of Pillow and pillow-heif."""

import logging
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from io import BytesIO
from pathlib import PurePath

import numpy as np
import numpy.typing as npt
import pillow_heif
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from pipeline.core.errors import escape_control_chars
from pipeline.params import Channels, Resize

MAX_PIXELS = 2**27  # 134 megapixels, 0.5 GB as RGB; a small file can claim to have more
MAX_FILE_BYTES = 2**30
# a JPEG file is decoded at reduced size, but not below this many times the size of the arrays (benchmarks/decode.py)
DRAFT_FACTOR = 2
# Pillow runs Ghostscript, another program, for EPS; it recognizes the others but cannot decode them
_REFUSED_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# only the main picture of a HEIC file is decoded, by one thread, as there is a decoding process for each core
pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)
_SUFFIXES = Image.registered_extensions()  # loads all of Pillow's plugins as well
_FORMATS = sorted(set(Image.OPEN) - _REFUSED_FORMATS, key=lambda name: (name not in ("JPEG", "PNG"), name))


def _suffixes(words: str) -> frozenset[str]:
    """Return the words, separated by spaces, as suffixes with a dot."""
    return frozenset(f".{word}" for word in words.split())


# the sets of suffixes are in lower case, with the dot
IMAGE_SUFFIXES = frozenset(suffix for suffix, name in _SUFFIXES.items() if name in _FORMATS) | {".mpo"}
# of raw files from cameras; most are TIFF files, of which Pillow would decode only the thumbnail
RAW_SUFFIXES = _suffixes(
    "3fr arq arw cr2 cr3 crw dcr dng erf fff gpr iiq kdc mef mos mrw nef nrw orf pef raf raw rw2 rwl sr2 srf srw x3f"
)
# of images and documents that cannot be decoded here
UNDECODABLE_SUFFIXES = RAW_SUFFIXES | _suffixes("ai dcm dicom emf eps exr hdp jng jxl jxr pdf svg svgz wdp wmf xcf")
VIDEO_SUFFIXES = _suffixes("3gp avi flv insv m2ts m4v mkv mov mp4 mpeg mpg mts ogv webm wmv")
_SIGNATURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|....ftyp(avif|avis|heic|heix|hevc|hevx|mif1|msf1)",
    re.DOTALL,
)
_LONG_QUOTE = re.compile(r"""b?'[^']{9,}'|b?"[^"]{9,}\"""")  # in an error of Pillow: may be metadata of the file
_RESAMPLE = Image.Resampling.BICUBIC
_FILE_DESCRIPTOR_2 = threading.Lock()  # held by the thread that has replaced it
_SIXTEEN_BIT = ("I", "I;16", "I;16L", "I;16B", "I;16N")
logging.getLogger("PIL").setLevel(logging.CRITICAL + 1)  # plugins log problems of a file, which decode() reports anyway


class UnreadableImage(ValueError):  # noqa: N818
    """The error for an image file that cannot be decoded; its text is the reason, in one line."""


class TooManyPixels(UnreadableImage):
    """The error for an image with more pixels than the caller allows; nothing of it was decoded."""


def is_image_content(head: bytes) -> bool:
    """Return whether a file that begins with these bytes (12 or more) is a JPEG, PNG, GIF, WebP, AVIF or HEIC image."""
    return _SIGNATURES.match(head) is not None


def check_suffix(name: str) -> None:
    """Raise UnreadableImage where the suffix of a file is of a format that cannot be decoded."""
    suffix = PurePath(name).suffix.lower()
    if suffix in UNDECODABLE_SUFFIXES:
        raise UnreadableImage(f"{suffix} files cannot be decoded here; export it as JPEG, PNG or TIFF")


def decode(
    content: bytes, *, image_size: int, channels: Channels, resize: Resize, max_pixels: int = MAX_PIXELS
) -> npt.NDArray[np.uint8]:
    """Decode the first frame of an image file to (image_size, image_size, channels) uint8; raises UnreadableImage.

    With more than `max_pixels`, that is TooManyPixels, before anything is decoded.

    - The EXIF orientation is applied, damaged EXIF data is ignored; color profiles are not applied.
    - Transparent images are laid over white.
    - CMYK, YCbCr and other modes are converted as Pillow does, LAB (D50) to sRGB; gray from color is ITU-R 601 luma.
    - 16-bit gray, and 32-bit integers (which Pillow returns for some 16-bit files), are divided by 257 and rounded, so
      that 65535 becomes 255. Floats are fractions of white. An image with values outside 0…65535 or 0…1 is unreadable,
      as it is not known which value is white.
    - `to_size` resizes the image. A JPEG file that is more than four times too large is decoded at a half, quarter or
      eighth of its size, but not below twice `image_size`, which is several times as fast.

    A truncated file is unreadable; wrong bytes inside JPEG data cannot always be detected.
    """
    with _reporting_unreadable(content):
        image = _open(content, draft_size=DRAFT_FACTOR * image_size, max_pixels=max_pixels)
        image = _to_channels(image, channels=channels)
        return _pixels(to_size(image, image_size=image_size, resize=resize))


def to_png(content: bytes) -> bytes:
    """Decode the first frame of an image file as `decode` does and return it as a PNG file; raises UnreadableImage.

    It is upright, gray or RGB with 8 bits, as `decode` has it before it resizes, so that `decode` returns the same.
    """
    with _reporting_unreadable(content):
        image = _open(content)
        image = _to_channels(image, channels=1 if image.mode in ("1", "L", "F", *_SIXTEEN_BIT) else 3)
        stream = BytesIO()
        # a copy of the pixels, without the information that Pillow would write
        Image.fromarray(np.asarray(image)).save(stream, "PNG", compress_level=1)
        return stream.getvalue()


def read_orientation(content: bytes) -> int:
    """Return the orientation, 1 to 8, to which `decode` turns an image; 1, unchanged, where none can be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            orientation = Image.open(BytesIO(content), formats=_FORMATS).getexif().get(0x0112, 1)
            return int(orientation) if orientation in range(2, 9) else 1
    except MemoryError:
        raise
    # Pillow raises nearly anything on damaged EXIF data, which `decode` ignores
    except Exception:
        return 1


def can_open(content: bytes) -> bool:
    """Return whether the header of an image file can be read; the pixels are not decoded."""
    try:
        with _reporting_unreadable(content):
            Image.open(BytesIO(content), formats=_FORMATS)
    except UnreadableImage:
        return False
    return True


@contextmanager
def _reporting_unreadable(content: bytes) -> Iterator[None]:
    """Turn every error of the block, which decodes the content, into UnreadableImage with the reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UnreadableImage:
        raise
    except Image.DecompressionBombError:
        raise TooManyPixels(f"more than {MAX_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        raise UnreadableImage("empty file" if not content else "not an image, or its header is damaged") from None
    # Pillow's parsers raise nearly anything on damaged input: struct.error, SyntaxError, IndexError, OverflowError, …
    except Exception as error:
        raise UnreadableImage(_describe_error(error)) from None


def to_size(image: Image.Image, *, image_size: int, resize: Resize) -> Image.Image:
    """Resize an image to image_size x image_size (bicubic, antialiased); an image of that size is returned unchanged.

    `crop` cuts out the largest square at the center, `pad` adds black bars to the whole image, and `stretch` resizes
    the whole image without keeping its proportions.
    """
    if image.size == (image_size, image_size):
        return image
    if resize == "crop":
        return ImageOps.fit(image, (image_size, image_size), method=_RESAMPLE)
    if resize == "stretch":
        return image.resize((image_size, image_size), resample=_RESAMPLE)
    scale = image_size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)  # ImageOps.pad fails on sides that round to 0
    padded = Image.new(image.mode, (image_size, image_size))
    padded.paste(
        image.resize((width, height), resample=_RESAMPLE), ((image_size - width) // 2, (image_size - height) // 2)
    )
    return padded


def resize_pixels(pixels: npt.NDArray[np.uint8], *, image_size: int, channels: Channels) -> npt.NDArray[np.uint8]:
    """Resize (H, W) gray or (H, W, 3) RGB uint8 to (image_size, image_size, channels) uint8, stretched by `to_size`."""
    image = _to_channels(Image.fromarray(pixels), channels=channels)
    return _pixels(to_size(image, image_size=image_size, resize="stretch"))


def _open(content: bytes, *, draft_size: int | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Load the first frame and turn it upright; raises TooManyPixels before decoding where it has too many.

    A JPEG file is decoded at reduced size, with both sides at least `draft_size`, where it is given and allows that.
    """
    image: Image.Image = Image.open(BytesIO(content), formats=_FORMATS)
    width, height = image.size
    if width * height > max_pixels:
        raise TooManyPixels(f"{width} x {height} pixels; allowed: {max_pixels:,} in all")
    if draft_size is not None:
        image.draft(None, (draft_size, draft_size))
    with _quiet_stderr() if image.format == "TIFF" else nullcontext():
        image.load()
    _turn_upright(image)
    return image


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Discard what is written to file descriptor 2 during the block, also by other threads.

    The C library libtiff writes its warnings there. One thread at a time is in the block: a second one would save the
    null device as the file descriptor to restore.
    """
    with _FILE_DESCRIPTOR_2:
        saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, 2)
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            os.close(null)


def _turn_upright(image: Image.Image) -> None:
    """Apply the EXIF orientation in place.

    In place, Pillow first turns the picture and then writes the other EXIF data, which may be damaged.
    """
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    # Pillow raises nearly anything on damaged EXIF data; the picture itself can still be used
    except Exception:  # noqa: S110
        pass


def _to_channels(image: Image.Image, *, channels: Channels) -> Image.Image:
    """Convert an image of any mode to mode L (1 channel) or RGB (3 channels)."""
    if image.mode in _SIXTEEN_BIT:
        image = _scaled(image, white=65535)
    elif image.mode == "F":
        image = _scaled(image, white=1)
    elif image.mode == "LAB":
        image = _lab_to_rgb(image)
    elif image.has_transparency_data or image.mode in ("La", "RGBa"):
        image = _over_white(image)
    elif image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _scaled(image: Image.Image, *, white: int) -> Image.Image:
    """Convert an image of numbers from 0 to `white` to mode L; raises UnreadableImage for other numbers."""
    values = np.asarray(image).astype(np.float64)
    if not (values.min() >= 0 and values.max() <= white):  # comparisons with NaN are false: NaN is refused too
        raise UnreadableImage(
            f"mode {image.mode}, values from {values.min():g} to {values.max():g}; allowed: 0 to {white}; "
            "save it with 8 bits"
        )
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))


def _over_white(image: Image.Image) -> Image.Image:
    """Lay a transparent image over white, and return it in mode RGB."""
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert converted is not None
    return converted


def _pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Return the pixels of an image in mode L as (H, W, 1) uint8, of one in mode RGB as (H, W, 3) uint8."""
    pixels = np.asarray(image)
    return pixels[:, :, np.newaxis] if pixels.ndim == 2 else pixels


def _describe_error(error: Exception) -> str:
    """Return in one line why Pillow could not decode an image, without quoting more than a name from the file."""
    reason = _LONG_QUOTE.sub("…", escape_control_chars(" ".join(str(error).split())))
    return reason if isinstance(error, OSError) and reason else f"damaged ({type(error).__name__}: {reason})"
