"""HEIC and AVIF photographs are read; files of cameras that cannot be decoded count as unreadable."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.artifacts import read_json
from pipeline.core.errors import UserError
from pipeline.datasets import decoding_pool, imagefolder
from pipeline.images.decode import IMAGE_SUFFIXES, MAX_PIXELS, UnreadableImage, check_suffix, decode, is_image_content
from pipeline.normalize import normalize
from tests.raw_folders import encoded, image_folder, noise, params, plain_files

UPRIGHT = noise(1, size=64)
TURNS: dict[int, Any] = {
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2),
    6: np.rot90, 7: lambda a: np.rot90(a.transpose(1, 0, 2), 2), 8: lambda a: np.rot90(a, -1),
}  # fmt: skip
LOSSLESS: dict[str, dict[str, Any]] = {
    "HEIF": {"quality": -1, "chroma": 444},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
}


def read(content: bytes, *, channels: Any = 3) -> Any:
    return decode(content, image_size=64, channels=channels, resize="crop").astype(int)


@pytest.mark.parametrize("file_format", LOSSLESS)
@pytest.mark.parametrize("orientation", TURNS)
def test_a_photograph_is_turned_upright_once(file_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(TURNS[orientation](UPRIGHT))
    content = encoded(stored, file_format, exif=exif.tobytes(), **LOSSLESS[file_format])
    assert np.abs(read(content) - UPRIGHT).mean() < 2


def test_heic_with_a_brand_that_avif_also_uses_is_read() -> None:
    content = encoded(UPRIGHT, "HEIF", quality=95)
    assert np.abs(read(content.replace(b"ftypheic", b"ftypmif1", 1)) - UPRIGHT).mean() < 10


def test_the_full_image_is_read_and_not_its_thumbnail() -> None:
    large = Image.fromarray(UPRIGHT).resize((512, 512), Image.Resampling.NEAREST)
    content = encoded(large, "HEIF", quality=95, thumbnails=[128])
    assert (read(content) == read(encoded(large, "HEIF", quality=95))).all()


def test_transparent_and_gray_heic_are_read() -> None:
    assert (read(encoded(Image.new("RGBA", (64, 64), 0), "HEIF", quality=-1, chroma=444)) >= 254).all()
    assert np.abs(read(encoded(np.full((64, 64), 100, np.uint8), "HEIF"), channels=1) - 100).max() <= 2


def decoding_error(content: bytes) -> str:
    try:
        read(content)
    except UnreadableImage as error:
        return str(error)
    return ""


def test_damaged_heic_is_decoded_or_refused_in_one_line_without_output(capfd: pytest.CaptureFixture[str]) -> None:
    random, content, reasons = np.random.default_rng(0), encoded(UPRIGHT, "HEIF"), []
    for number in range(300):
        damaged = np.frombuffer(content, np.uint8).copy()
        damaged[random.integers(0, len(damaged) if number % 2 else 600, 4)] = random.integers(0, 256, 4)
        reasons.append(decoding_error(damaged.tobytes()))
    assert sum(map(bool, reasons)) > 100
    assert not any("\n" in reason for reason in reasons)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("length", [0, 30, 300, -1])
def test_truncated_heic_is_unreadable(length: int) -> None:
    with pytest.raises(UnreadableImage):
        read(encoded(UPRIGHT, "HEIF")[:length])


def test_heic_with_too_many_pixels_is_refused_before_it_is_decoded() -> None:
    content = encoded(UPRIGHT, "HEIF")
    size = content.index(b"ispe") + 8
    huge = content[:size] + (20_000).to_bytes(4, "big") * 2 + content[size + 8 :]
    with pytest.raises(UnreadableImage, match=f"{MAX_PIXELS:,}"):
        read(huge)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "WEBP", "AVIF", "HEIF"])
def test_common_images_are_recognized_by_their_first_bytes(file_format: str) -> None:
    assert is_image_content(encoded(UPRIGHT, file_format)[:16])


@pytest.mark.parametrize(
    "head", [b"", b"text", b"\0\0\0\x14ftypqt  \0\0", b"\0\0\0\x18ftypmp42", b"PK\3\4", b"RIFF0000WAVE"]
)
def test_other_files_are_not_recognized_as_images(head: bytes) -> None:
    assert not is_image_content(head)


def test_a_raw_file_is_refused_by_its_suffix_as_pillow_would_read_only_its_thumbnail() -> None:
    with pytest.raises(UnreadableImage, match=r"\.nef files cannot be decoded here; export it"):
        check_suffix("DSC_1.NEF")
    for name in ("a.jpg", "b.HEIC", "c", "d.avif"):
        check_suffix(name)
    assert {".heic", ".heif", ".hif", ".avif", ".mpo"} <= IMAGE_SUFFIXES


def undecodable(number: int) -> list[dict[str, str]]:
    return [{"file": f"train/dog/{n}.CR2", "reason": ".cr2 files cannot be decoded here"} for n in range(number)]


def test_images_without_a_decoder_count_as_unreadable(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "raw", plain_files(per_class=10), undecodable_files=undecodable(5))
    with pytest.raises(
        UserError, match=r"max_unreadable_fraction: 5 of 25 files \(20.00%\) cannot be read: train/dog/0"
    ):
        normalize(folder, tmp_path / "out", params=params())
    normalize(folder, tmp_path / "out", params=params(max_unreadable_fraction=0.2))
    assert read_json(tmp_path / "out/dataset.json")["unreadable_files"] == undecodable(5)


def test_every_decoding_process_reads_heic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagefolder, "MIN_BYTES_FOR_POOL", 0)
    for module in (imagefolder, decoding_pool):
        monkeypatch.setattr(module, "num_cores", lambda: 2)
    files = {
        f"train/{name}/{n}.heic": encoded(noise(n + 100 * (name == "dog")), "HEIF")
        for name in ("cat", "dog")
        for n in range(5)
    }
    described = normalize(image_folder(tmp_path / "raw", files), tmp_path / "out", params=params())
    assert described["unreadable_files"] == []
    assert sum(sum(counts.values()) for counts in described["counts"].values()) == 10
