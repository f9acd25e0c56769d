"""The images of a prediction are read in order, in one process or several, and each unreadable file has its reason."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.core.errors import UserError
from pipeline.datasets import decoding_pool
from pipeline.images.blocks import hash_content
from pipeline.images.decode import MAX_FILE_BYTES
from pipeline.prediction import decoding, image_files
from pipeline.prediction.decoding import block_length, read_images
from pipeline.prediction.image_files import ReadImage
from pipeline.prediction.inputs import Input
from tests.dying import die
from tests.raw_folders import encoded, noise
from tests.test_model import config

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(params=["this process", "several processes"])
def pool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Decode all images in this process, or all in a pool of two others; return whether it is the pool."""
    is_pool: bool = request.param == "several processes"
    monkeypatch.setattr(decoding, "MAX_WITHOUT_POOL", 0 if is_pool else 1000)
    for module in (decoding, decoding_pool):
        monkeypatch.setattr(module, "num_cores", lambda: 2)
    return is_pool


def read(*inputs: Input | str, **changes: Any) -> list[ReadImage]:
    found = (each if isinstance(each, Input) else Input(each) for each in inputs)
    return [image for block in read_images(found, config=config(**changes)) for image in block]


def write(number: int) -> list[str]:
    paths = [f"{index:03}.{list(FORMATS)[index % 3]}" for index in range(number)]
    for index, path in enumerate(paths):
        Path(path).write_bytes(encoded(noise(index), FORMATS[path[4:]]))
    return paths


# ---- readable images


def test_images_come_in_order_with_their_pixels_and_hashes(here: Path, pool: bool) -> None:
    paths = write(50)
    images = read(*paths, paths[0])
    assert [image.path for image in images] == [*paths, paths[0]]
    for image in images:
        assert image.content_hash == f"{hash_content(Path(image.path).read_bytes()):016x}"
        assert image.pixels is not None
        np.testing.assert_array_equal(image.pixels, np.asarray(Image.open(image.path)))
        assert image.pixels.dtype == np.uint8
        assert not image.error


def test_images_have_the_size_and_channels_of_the_model(here: Path, pool: bool) -> None:
    Path("wide.png").write_bytes(encoded(np.repeat(noise(0), 2, axis=1)))
    [image] = read("wide.png", image_size=16, channels=1, mean=(0.5,), std=(0.5,), resize="pad")
    assert image.pixels is not None
    assert image.pixels.shape == (16, 16, 1)
    assert not image.pixels[:4].any()


def test_blocks_are_bounded_in_number_and_bytes(here: Path) -> None:
    assert [block_length(size) for size in (1, 32 * 32 * 3, 224 * 224 * 3, 1024 * 1024 * 3)] == [256, 256, 32, 16]
    [path] = write(1)
    blocks = list(read_images(iter([Input(path)] * 600), config=config()))
    assert [len(block) for block in blocks] == [256, 256, 88]


def test_a_few_images_start_no_process(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "decode_in_processes", None)
    paths = write(3)
    assert [image.path for image in read(*paths)] == paths
    assert read() == []


def test_the_inputs_are_consumed_as_a_stream(here: Path, pool: bool) -> None:
    [path] = write(1)
    taken = 0

    def endless() -> Iterator[Input]:
        nonlocal taken
        while True:
            taken += 1
            yield Input(path)

    with contextlib.closing(read_images(endless(), config=config())) as blocks:
        assert len(next(blocks)) == 256
    assert taken < 2000


# ---- files that cannot be read


@pytest.fixture
def bad_files(here: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Write files that cannot be read, and return the reason for each."""
    Path("cut.png").write_bytes(encoded(noise(0))[:200])
    Path("text.jpg").write_text("not an image")
    Path("empty.png").touch()
    Path("raw.CR2").write_bytes(encoded(noise(0), "TIFF"))
    Path("folder").mkdir()
    Path("loop.png").symlink_to("loop.png")
    with Path("large.png").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    return {
        "cut.png": "not readable as an image (",
        "text.jpg": "not readable as an image (not an image, or its header is damaged)",
        "empty.png": "not readable as an image (empty file)",
        "raw.CR2": "not readable as an image (.cr2 files cannot be decoded here; export it as JPEG, PNG or TIFF)",
        "folder": "a folder; in a list on standard input, name files",
        "gone.png": "no such file",
        "loop.png": "Too many levels of symbolic links",
        "large.png": "not readable as an image (1,073,741,825 bytes; allowed: 1,073,741,824)",
        "/dev/zero": "not readable as an image (a device, not a file)",
        "x" * 300: "File name too long",
        "": "no such file",
    }


def test_an_unreadable_file_keeps_its_place_with_the_reason(bad_files: dict[str, str], pool: bool) -> None:
    [good] = write(1)
    images = read(*(name for bad in bad_files for name in (bad, good)))
    assert [image.path for image in images[::2]] == list(bad_files)
    assert all(image.pixels is None for image in images[::2])
    assert [image.error for image, reason in zip(images[::2], bad_files.values(), strict=True)
            if not image.error.startswith(reason)] == []  # fmt: skip
    assert all(image.path == good and image.pixels is not None for image in images[1::2])
    assert [image.path for image in images[::2] if image.content_hash] == ["cut.png", "text.jpg", "empty.png"]


def test_an_input_with_a_reason_keeps_it(here: Path, pool: bool) -> None:
    assert read(Input("p/*.png", "no file matches this pattern")) == [
        ReadImage("p/*.png", None, "", "no file matches this pattern")
    ]


def test_a_file_that_may_not_be_read_has_the_reason(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(image_files, "_read_bytes", refuse)  # root may read all files
    assert [image.error for image in read(*write(1))] == ["Permission denied"]


def test_a_file_that_vanishes_after_it_was_listed_has_the_reason(here: Path) -> None:
    paths = write(3)

    def inputs() -> Iterator[Input]:
        for path in paths:
            yield Input(path)
        Path(paths[1]).unlink()

    images = [image for block in read_images(inputs(), config=config()) for image in block]
    assert [image.error for image in images] == ["", "no such file", ""]


def test_a_pipe_is_read_by_this_process(here: Path, pool: bool) -> None:
    os.mkfifo("pipe")
    content = encoded(noise(7))
    threading.Thread(target=Path("pipe").write_bytes, args=(content,)).start()
    before, image, after = read("gone.png", Input("pipe", here_only=True), *write(1))
    assert image.pixels is not None
    np.testing.assert_array_equal(image.pixels, noise(7))
    assert image.content_hash == f"{hash_content(content):016x}"
    assert (before.error, after.error) == ("no such file", "")


def test_a_pipe_without_end_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "MAX_FILE_BYTES", 100_000)
    reader, writer = os.pipe()
    threading.Thread(target=write_on, args=(writer,)).start()
    [image] = read(Input(f"/dev/fd/{reader}", here_only=True))
    os.close(reader)
    assert image.error == "not readable as an image (more than 100,000 bytes)"


def write_on(descriptor: int) -> None:
    """Write until nobody reads."""
    with contextlib.suppress(BrokenPipeError):
        while True:
            os.write(descriptor, b"x" * 10_000)


def test_a_file_that_kills_a_process_ends_with_one_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_WITHOUT_POOL", 0)
    monkeypatch.setattr(decoding, "num_cores", lambda: 2)
    monkeypatch.setattr(decoding, "read_files", die)
    with pytest.raises(UserError, match=r"was killed \(out of memory, or a file crashes.*at or soon after a\.png"):
        read("a.png", "b.png")
