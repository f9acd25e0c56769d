"""Photographs lose what is not the picture before they are packed, and no pixel of it."""

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.artifacts import read_json
from pipeline.core.errors import EXIT_PARTIAL
from pipeline.core.yaml import dump_yaml, read_yaml
from pipeline.images.decode import UnreadableImage, decode, read_orientation
from pipeline.images.metadata import remove_metadata
from tests import planted
from tests.conftest import PROJECT, run_step
from tests.planted import ALL, MARK, TRACES
from tests.raw_folders import encoded, noise

REWRITTEN = {"gif", "tiff", "tiff cmyk", "tiff 16 bits", "tiff ycbcr", "ppm", "jpeg2000"}


def read(content: bytes, *, image_size: int = 16, channels: Any = 3) -> Any:
    return decode(content, image_size=image_size, channels=channels, resize="stretch")


def outcome(content: bytes) -> bytes | str:
    """Return the decoded pixels, or why there are none; at full size, as a file that is written again is no JPEG."""
    try:
        return bytes(read(content, image_size=planted.SIDE))
    except UnreadableImage as error:
        return str(error)


def traces(content: bytes) -> list[bytes]:
    return [trace for trace in TRACES if trace in content]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ALL)
def test_nothing_planted_is_left_and_the_pixels_are_the_same(kind: str, orientation: int) -> None:
    content = ALL[kind](orientation)
    assert traces(content)
    stripped = remove_metadata(content)
    assert not traces(stripped)
    for image_size in (16, 64):
        for channels in (1, 3):
            before, after = (read(each, image_size=image_size, channels=channels) for each in (content, stripped))
            assert (before == after).all()


@pytest.mark.parametrize("kind", ALL)
def test_the_decoded_pixels_are_in_the_file_and_its_format_stays_where_the_removal_is_in_place(kind: str) -> None:
    content = ALL[kind](6)
    stripped = remove_metadata(content)
    before, after = (Image.open(io.BytesIO(each)) for each in (content, stripped))
    assert after.format == ("PNG" if kind in REWRITTEN else "JPEG" if kind == "mpo" else before.format)
    assert set(after.getexif()) <= {0x0112}
    assert not set(after.info) & {"xmp", "comment", "icc_profile", "photoshop", "Comment", "mp"}
    if kind not in REWRITTEN:
        assert len(stripped) < len(content)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("make", [planted.jpeg, planted.png, planted.webp])
def test_an_orientation_that_only_xmp_has_is_kept(make: Callable[..., bytes], orientation: int) -> None:
    content = planted.turned_by_xmp(make, orientation)
    stripped = remove_metadata(content)
    assert read_orientation(stripped) == read_orientation(content) == orientation
    assert outcome(stripped) == outcome(content)
    assert not traces(stripped)


def test_a_file_without_metadata_is_copied_bit_for_bit() -> None:
    for content in (encoded(noise(1), "JPEG"), encoded(noise(1)), encoded(noise(1), "WEBP"), b""):
        assert remove_metadata(content) == content
        assert remove_metadata(remove_metadata(content)) == content


def reasons(content: bytes) -> tuple[str, str]:
    """Return why `remove_metadata` and `decode` refuse a file; "" for one that they accept.

    A file that is accepted has no trace left, and the same pixels if it had any.
    """
    before = outcome(content)
    decode_reason = before if isinstance(before, str) else ""
    try:
        stripped = remove_metadata(content)
    except UnreadableImage as error:
        return str(error), decode_reason
    assert not traces(stripped)
    if not decode_reason:
        assert outcome(stripped) == before
    return "", decode_reason


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("kind", ALL)
def test_a_truncated_file_is_refused_with_the_reason_that_decode_has(kind: str, fraction: float) -> None:
    whole = ALL[kind](6)
    refused, expected = reasons(whole[: int(len(whole) * fraction)])
    assert refused == expected


@pytest.mark.parametrize("kind", ALL)
def test_damage_leaves_nothing_planted_and_a_readable_picture_unchanged(
    kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    random, whole = np.random.default_rng(0), ALL[kind](6)
    for number in range(100):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[random.integers(0, len(damaged) if number % 2 else 1000, 3)] = random.integers(0, 256, 3)
        refused, expected = reasons(damaged.tobytes())
        assert refused in ("", expected)
        assert not traces(refused.encode())
    assert capfd.readouterr() == ("", "")


def write_photographs(folder: Path) -> None:
    """Write a file of each kind to two classes, and beside them files that cannot be read and one that is no image."""
    for position, (kind, make) in enumerate(ALL.items()):
        for label in ("cat", "dog"):
            path = folder / label / f"{kind}.{'png' if position % 2 else 'jpg'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(make(1 + position % 8))
    (folder / "cat/truncated.jpg").write_bytes(planted.jpeg(6)[:-900])
    (folder / "cat/damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n" + MARK * 9)
    (folder / "cat/unknown.tif").write_bytes(b"II*\0" + MARK * 9)
    (folder / "dog/broken.ppm").write_bytes(b"P6 " + MARK + b" 9 9 255 " + MARK)
    (folder / "dog/clip.mp4").write_bytes(MARK)
    (folder / "dog/raw.nef").write_bytes(MARK)


@pytest.mark.slow
def test_nothing_planted_reaches_an_artifact_a_record_or_a_log(workspace: Path, tmp_path_factory: Any) -> None:
    photographs = tmp_path_factory.mktemp("photographs")
    write_photographs(photographs)
    overrides = {
        "download": {"dataset": "imagefolder", "folder": str(photographs)},
        "normalize": {"max_unreadable_fraction": 0.5, "near_duplicate_correlation": 1.0},
        "train": {"epochs": 1},
    }
    values = read_yaml(workspace / "params.yaml")
    for section, changes in overrides.items():
        values[section] |= changes
    (workspace / "params.yaml").write_text(dump_yaml(values), encoding="utf-8")
    output = ""
    for step in ("download", "normalize", "train", "evaluate"):
        done = run_step(step)
        output += done.stdout + done.stderr
        assert done.returncode == 0, output
    predict = [sys.executable, "-m", "pipeline.predict", *map(str, sorted(photographs.rglob("*.*")))]
    predicted = subprocess.run(
        predict, env=os.environ | {"PYTHONPATH": str(PROJECT)}, capture_output=True, text=True, check=False
    )
    assert predicted.returncode == EXIT_PARTIAL
    assert not traces((output + predicted.stdout + predicted.stderr).encode())
    files = [path for path in workspace.rglob("*") if path.is_file()]
    assert {"images.tar", "dataset.json", "mlflow.db", "best.safetensors"} <= {path.name for path in files}
    assert [str(path) for path in files if traces(path.read_bytes())] == []
    with tarfile.open(workspace / "artifacts/download/images.tar") as archive:
        assert len(archive.getnames()) == 2 * len(ALL)
    unreadable = read_json(workspace / "artifacts/normalize/dataset.json")["unreadable_files"]
    assert {each["file"].rpartition("/")[2] for each in unreadable} == {
        "truncated.jpg", "damaged.png", "unknown.tif", "broken.ppm", "raw.nef"
    }  # fmt: skip
