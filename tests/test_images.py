"""Images of every mode and format become uint8 pixels of one size; damaged files raise an error with a reason."""

import io
import os
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.images import decode as module
from pipeline.images.decode import IMAGE_SUFFIXES, MAX_PIXELS, UnreadableImage, decode, resize_pixels
from tests.raw_folders import encoded, noise

RED = (220, 30, 60)


def read(content: bytes, *, image_size: int = 16, channels: Any = 3, resize: Any = "crop") -> Any:
    return decode(content, image_size=image_size, channels=channels, resize=resize)


def photo(mode: str = "RGB", color: Any = RED, size: tuple[int, int] = (40, 24)) -> Image.Image:
    return Image.new("RGB", size, color).convert(mode)


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [
        ("RGB", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("P", "GIF"), ("RGB", "JPEG"), ("CMYK", "TIFF"),
        ("CMYK", "JPEG"), ("YCbCr", "TIFF"), ("RGB", "BMP"), ("RGB", "WEBP"), ("RGB", "PPM"), ("RGB", "TGA"),
        ("RGBA", "ICO"), ("RGB", "JPEG2000"), ("RGB", "AVIF"),
    ],
)  # fmt: skip
def test_colors_are_preserved_in_every_mode_and_format(mode: str, file_format: str) -> None:
    pixels = read(encoded(photo(mode), file_format))
    assert pixels.shape == (16, 16, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - RED).max() <= 30  # the tolerance is for palettes and lossy formats


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P"])
def test_gray_modes_give_equal_channels(mode: str) -> None:
    pixels = read(encoded(Image.new("L", (20, 20), 255).convert(mode)))
    assert (pixels == 255).all()


def test_lab_is_converted_to_srgb() -> None:
    gray = Image.merge("LAB", [Image.new("L", (20, 20), value) for value in (136, 128, 128)])
    assert np.abs(read(encoded(gray, "TIFF")).astype(int) - 127).max() <= 3  # L* 53.4 is the middle gray of sRGB


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_drawn_over_white(mode: str) -> None:
    assert (read(encoded(Image.new(mode, (20, 20), 0))) == 255).all()


def test_a_transparent_palette_entry_is_drawn_over_white() -> None:
    assert (read(encoded(Image.new("P", (20, 20), 0), transparency=0)) == 255).all()


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_16_bit_gray_is_scaled_and_not_truncated(file_format: str) -> None:
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    pixels = read(encoded(Image.fromarray(values), file_format), channels=1)
    assert (pixels[..., 0] == np.rint(values / 257)).all()


def test_big_endian_16_bit_tiff_is_scaled() -> None:
    image = Image.frombytes("I;16B", (16, 16), struct.pack(">H", 51400) * 256)
    assert (read(encoded(image, "TIFF"), channels=1) == 200).all()


def test_floats_are_fractions_of_white() -> None:
    assert (read(encoded(Image.new("F", (16, 16), 0.4), "TIFF"), channels=1) == 102).all()


@pytest.mark.parametrize(("mode", "value"), [("F", 1.5), ("F", float("nan")), ("I", -1), ("I", 70_000)])
def test_values_outside_the_known_range_are_refused(mode: str, value: float) -> None:
    with pytest.raises(UnreadableImage, match=f"mode {mode}, values from .* allowed: 0 to"):
        read(encoded(Image.new(mode, (16, 16), value), "TIFF"))


def test_gray_from_color_is_luma() -> None:
    assert (read(encoded(photo()), channels=1) == round(0.299 * 220 + 0.587 * 30 + 0.114 * 60)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation: int) -> None:
    upright = noise(1)
    turns: dict[int, Any] = {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2),
        6: np.rot90, 7: lambda a: np.rot90(a.transpose(1, 0, 2), 2), 8: lambda a: np.rot90(a, -1),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(turns[orientation](upright))
    assert (read(encoded(stored, exif=exif), image_size=32) == upright).all()


MODES = ("1", "L", "P", "LA", "RGBA", "I;16")


@pytest.mark.parametrize("orientation", [3, 6, 7])
@pytest.mark.parametrize("mode", MODES)
def test_exif_orientation_is_undone_in_every_mode(mode: str, orientation: int) -> None:
    upright = photo("L", 0, (32, 32))
    upright.paste(200, (0, 0, 5, 16))
    turn = {3: "ROTATE_180", 6: "ROTATE_90", 7: "TRANSVERSE"}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright.convert(mode).transpose(Image.Transpose[turn])
    assert (
        read(encoded(stored, exif=exif), image_size=32) == read(encoded(upright.convert(mode)), image_size=32)
    ).all()


@pytest.mark.parametrize(("error", "is_read"), [(struct.error("damaged"), True), (MemoryError(), False)])
def test_damage_elsewhere_in_exif_does_not_lose_the_orientation(
    monkeypatch: pytest.MonkeyPatch, error: Exception, is_read: bool
) -> None:
    def fail(*_: Any) -> None:
        raise error

    exif = Image.Exif()
    exif[0x0112] = 2
    content = encoded(np.fliplr(noise(1)), exif=exif)
    monkeypatch.setattr(Image.Exif, "tobytes", fail)
    if is_read:
        assert (read(content, image_size=32) == noise(1)).all()
    else:
        with pytest.raises(UnreadableImage, match="MemoryError"):
            read(content)


def test_an_image_with_damaged_exif_data_is_read() -> None:
    content = encoded(noise(1), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff\x01\x12")
    assert read(content, image_size=32).shape == (32, 32, 3)


def test_the_first_frame_of_an_animation_is_used() -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("white", "black")]
    assert (read(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])) == 255).all()


def test_an_image_of_the_right_size_is_not_changed() -> None:
    pixels = noise(2)
    for resize in ("crop", "pad", "stretch"):
        assert (read(encoded(pixels), image_size=32, resize=resize) == pixels).all()


def test_crop_pad_and_stretch_fit_a_wide_image() -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200
    assert (read(encoded(wide), resize="crop", image_size=10)[:, 2:-2] == 200).all()
    padded = read(encoded(wide + 50), resize="pad", image_size=12)
    assert (padded[[0, 3, 8, 11]] == 0).all()
    assert (padded[4:8, :2] == 50).all()
    stretched = read(encoded(wide), resize="stretch", image_size=30)
    assert (stretched[:, 14] == 200).all()
    assert (stretched[:, [0, 29]] == 0).all()


@pytest.mark.parametrize("resize", ["crop", "pad", "stretch"])
def test_an_image_of_extreme_proportions_is_resized(resize: str) -> None:
    assert read(encoded(np.full((1, 3000, 3), 9, np.uint8)), resize=resize).shape == (16, 16, 3)


def test_fine_detail_is_averaged_not_sampled() -> None:
    stripes = np.zeros((320, 320), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(read(encoded(stripes), channels=1)[2:-2, 2:-2].astype(int) - 127).max() <= 2


def test_a_large_jpeg_is_decoded_at_reduced_size_with_nearly_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded_sizes = []

    def to_size(image: Image.Image, **options: Any) -> Image.Image:
        decoded_sizes.append(image.size)
        return resize(image, **options)

    resize = module.to_size
    monkeypatch.setattr(module, "to_size", to_size)
    large = noise(3).repeat(16, axis=0).repeat(16, axis=1)
    reduced = read(encoded(large, "JPEG", quality=95), image_size=32)
    whole = read(encoded(large), image_size=32)
    assert decoded_sizes == [(64, 64), (512, 512)]
    assert np.abs(reduced.astype(int) - whole).mean() < 4


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "JPEG2000", "AVIF"])
def test_truncated_files_are_refused_with_a_reason_in_one_line(file_format: str) -> None:
    content = encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), file_format)
    with pytest.raises(UnreadableImage) as caught:
        read(content[: len(content) // 2])
    assert str(caught.value).strip()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0" + bytes(40)])
def test_bytes_that_are_not_an_image_are_unreadable(content: bytes) -> None:
    with pytest.raises(UnreadableImage):
        read(content)


def decoding_error(content: bytes) -> str:
    try:
        read(content)
    except UnreadableImage as error:
        return str(error)
    return ""


def test_damaged_images_are_decoded_or_refused_without_output(capfd: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    options: list[dict[str, Any]] = [{"compression": "group4"}, {"compression": "tiff_lzw"}, {}]
    images = [encoded(photo("1"), "TIFF", **options[0]), encoded(photo(), "TIFF", **options[1])]
    images += [
        encoded(photo(), name) for name in ("PNG", "GIF", "JPEG", "WEBP", "TGA", "SGI", "PCX", "DDS", "ICO", "QOI")
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for content in images * 20:
            damaged = np.frombuffer(content, np.uint8).copy()
            damaged[random.integers(0, min(300, len(damaged)), 5)] = random.integers(0, 256, 5)
            assert "\n" not in decoding_error(damaged.tobytes())
    assert capfd.readouterr() == ("", "")


def png_of(width: int, height: int) -> bytes:
    """Return a few bytes of PNG whose header declares an image of this size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = struct.pack(">I", 8) + b"IDAT" + bytes(12)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + data


@pytest.mark.parametrize("side", [12_000, 100_000])
def test_too_many_pixels_are_refused_before_they_are_decoded(side: int) -> None:
    with pytest.raises(UnreadableImage, match=f"{MAX_PIXELS:,}"):
        read(png_of(side, side))


def test_postscript_is_never_run() -> None:
    stream = io.BytesIO()
    photo().save(stream, "EPS")
    with pytest.raises(UnreadableImage):
        read(stream.getvalue())


def test_image_suffixes_are_those_of_formats_that_can_be_decoded() -> None:
    assert {".jpg", ".jpeg", ".png", ".tif", ".webp", ".bmp", ".gif"} <= IMAGE_SUFFIXES
    assert not {".txt", ".pdf", ".eps", ".mpg", ".h5"} & IMAGE_SUFFIXES
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in IMAGE_SUFFIXES)


def test_resized_pixels_do_not_overflow() -> None:
    checkers = np.indices((8, 8)).sum(axis=0) % 2 * 255
    pixels = resize_pixels(checkers.astype(np.uint8), image_size=32, channels=1)
    assert pixels.shape == (32, 32, 1)
    assert (pixels[0, 0, 0], pixels[0, 31, 0]) == (0, 255)


def test_threads_that_decode_tiff_files_at_the_same_time_leave_stderr_as_it_was(
    capfd: pytest.CaptureFixture[str],
) -> None:
    content = encoded(noise(0), "TIFF")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: read(content), range(200)))
    os.write(2, b"still there")
    assert capfd.readouterr().err == "still there"
