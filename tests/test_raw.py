"""Raw data sets become blocks of pixels; damaged and malicious ones are refused in one line."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.artifacts import write_checksums
from pipeline.core.errors import UserError
from pipeline.datasets import cifar10, decoding_pool, imagefolder
from pipeline.datasets.archives import DamagedArchive, members, open_tar
from pipeline.datasets.pickles import load_pickle
from pipeline.datasets.sources import open_source
from pipeline.images import blocks as blocks_module
from pipeline.images.blocks import Block
from tests.raw_folders import (
    cifar_batch,
    cifar_folder,
    digits_folder,
    encoded,
    image_folder,
    noise,
    params,
    plain_files,
    write_tar,
)


def blocks(folder: Path, **changes: Any) -> list[Block]:
    """Renew the checksums of a raw folder, and return all its blocks."""
    write_checksums(folder)
    return list(open_source(folder, params=params(**changes)).blocks)


def test_digits_are_read_in_blocks(tmp_path: Path) -> None:
    source = open_source(digits_folder(tmp_path / "raw"), params=params())
    found = list(source.blocks)
    assert source.class_names == tuple("0123456789")
    assert [block.images.shape for block in found] == [(1024, 32, 32, 1), (773, 32, 32, 1)]
    assert {block.split for block in found} == {"train"}
    assert np.concatenate([block.labels for block in found])[:5].tolist() == [0, 1, 2, 3, 4]
    assert (found[0].images.min(), found[0].images.max()) == (0, 255)


def test_digits_in_their_original_size_are_scaled_to_the_range_of_bytes(tmp_path: Path) -> None:
    folder = digits_folder(tmp_path / "raw")
    values = np.load(folder / "images.npy")[:1024]
    (first, _) = blocks(folder, image_size=8, channels=3)
    assert (first.images == np.rint(values * 255.0 / 16)[..., np.newaxis]).all()


def test_digits_that_are_not_digits_are_refused(tmp_path: Path) -> None:
    folder = digits_folder(tmp_path / "raw")
    np.save(folder / "images.npy", np.full((1797, 8, 8), 17, np.uint8))
    write_checksums(folder)
    with pytest.raises(UserError, match=r"not scikit-learn's digits.*dvc repro download"):
        open_source(folder, params=params())


def test_cifar_images_keep_their_pixels_and_the_order_of_the_batches(tmp_path: Path) -> None:
    source = open_source(cifar_folder(tmp_path / "raw"), params=params())
    found = list(source.blocks)
    assert source.class_names == ("cat", "dog")
    assert [block.split for block in found] == ["train"] * 5 + ["test"]
    assert (found[0].images[3] == noise(103)).all()
    assert (found[5].images[0] == noise(600)).all()
    assert found[1].labels.tolist() == [0, 1] * 10
    assert found[0].names[:2] == ["data_batch_1/00000", "data_batch_1/00001"]


@pytest.mark.parametrize(("image_size", "channels"), [(16, 3), (32, 1), (64, 1)])
def test_cifar_images_are_read_in_another_size(tmp_path: Path, image_size: int, channels: int) -> None:
    (first, *_) = blocks(cifar_folder(tmp_path / "raw"), image_size=image_size, channels=channels)
    assert first.images.shape == (20, image_size, image_size, channels)


class Malicious:
    def __reduce__(self) -> Any:
        return os.system, ("touch hostile",)


@pytest.mark.parametrize("value", [Malicious(), {b"data": Malicious()}, {b"label_names": [np.float64(1)]}])
def test_a_pickle_with_more_than_data_is_refused(tmp_path: Path, value: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"batches.meta refused \(.* is not allowed\)"):
        open_source(cifar_folder(tmp_path / "raw", **{"batches.meta": value}), params=params())
    assert not Path("hostile").exists()


def test_only_latin1_bytes_are_decoded() -> None:
    assert load_pickle(b"c_codecs\nencode\n(Vabc\nVlatin1\ntR.") == b"abc"
    with pytest.raises(DamagedArchive, match="are not allowed"):
        load_pickle(b"c_codecs\nencode\n(Vabc\nVzlib\ntR.")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [0] * 19}, "labels of test_batch are not 20 whole numbers"),
        ({"labels": [0] * 19 + [2]}, "not all in 0…1"),
        ({"labels": [0] * 19 + ["1"]}, "not 20 whole numbers"),
        ({"data": np.zeros((20, 3071), np.uint8)}, r"uint8 \(20, 3071\); allowed: uint8 \(n, 3072\)"),
        ({"data": np.zeros((20, 3072), np.float32)}, "is float32"),
        ({"data": [1, 2]}, "is list"),
    ],
)
def test_a_batch_that_differs_from_the_documented_format_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    batch = {key.decode(): value for key, value in cifar_batch(6, 20).items()} | change
    with pytest.raises(UserError, match=message):
        blocks(cifar_folder(tmp_path / "raw", test_batch=batch))


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    archive = cifar_folder(tmp_path / "raw") / cifar10.ARCHIVE
    archive.write_bytes(archive.read_bytes()[:-40_000])
    with pytest.raises(UserError, match=r"damaged|has no"):
        blocks(tmp_path / "raw")


@pytest.mark.parametrize("dataset", ["cifar10", "imagefolder"])
def test_a_missing_archive_is_reported(tmp_path: Path, dataset: str) -> None:
    make = {"cifar10": cifar_folder, "imagefolder": lambda folder: image_folder(folder, plain_files(per_class=1))}
    folder = make[dataset](tmp_path / "raw")
    next(folder.glob("*.tar*")).unlink()
    with pytest.raises(UserError, match="no such file"):
        blocks(folder)


def test_a_folder_of_images_with_an_unreadable_one_is_read(tmp_path: Path) -> None:
    files = {
        "test/cat/x/y.jpg": encoded(noise(1), "JPEG"),
        "train/cat/äöü 猫.png": encoded(noise(2)),
        "train/dog/broken.png": encoded(noise(3))[:60],
        "train/dog/gray.tif": encoded(noise(4)[..., 0], "TIFF"),
    }
    test, train = blocks(image_folder(tmp_path / "raw", files))
    assert (test.split, test.names, test.labels.tolist()) == ("test", ["test/cat/x/y.jpg"], [0])
    assert (train.names, train.labels.tolist()) == (["train/cat/äöü 猫.png", "train/dog/gray.tif"], [0, 1])
    assert (train.images[0] == noise(2)).all()
    assert [name for name, _ in train.unreadable] == ["train/dog/broken.png"]


@pytest.mark.parametrize("limit", [0, 2**30])
def test_blocks_are_the_same_from_one_process_and_from_several(tmp_path: Path, monkeypatch: Any, limit: int) -> None:
    monkeypatch.setattr(imagefolder, "MIN_BYTES_FOR_POOL", limit)
    monkeypatch.setattr(blocks_module, "BLOCK_IMAGES", 7)
    for module in (imagefolder, decoding_pool):
        monkeypatch.setattr(module, "num_cores", lambda: 2)
    files = plain_files(per_class=30) | {"train/dog/bad.png": b"bad"}
    found = blocks(image_folder(tmp_path / "raw", files))
    assert [name for block in found for name in block.names] == list(files)[:-1]
    assert max(len(block.images) for block in found) == 7
    assert (np.concatenate([block.images for block in found])[40] == noise(1010)).all()
    assert found[-1].unreadable == [("train/dog/bad.png", "not an image, or its header is damaged")]


def test_blocks_of_large_images_are_short() -> None:
    assert blocks_module.block_length(32 * 32 * 3) == 1024
    assert blocks_module.block_length(1024 * 1024 * 3) == 10


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"cat/1.png": b""}, "allowed: <split>/<class>"),
        ({"train/bird/1.png": b""}, "is in a class that the train split does not have"),
    ],
)
def test_an_archive_that_the_step_download_did_not_make_is_refused(tmp_path: Path, files: Any, message: str) -> None:
    counts = {"train": {"cat": 1, "dog": 1}}
    folder = image_folder(
        tmp_path / "raw", {"train/cat/0.png": b"", **files}, class_names=["cat", "dog"], counts=counts
    )
    with pytest.raises(UserError, match=message):
        blocks(folder)


def test_tar_headers_are_read_as_by_tarfile(tmp_path: Path) -> None:
    files = {
        name: bytes(size) for size, name in enumerate(("a/b.png", "ä/猫.png", f"{'long/' * 40}c.png", "d e/f.png"))
    }
    write_tar(tmp_path / "some.tar", files, mode="w")
    with tarfile.open(tmp_path / "some.tar") as plain, open_tar(tmp_path / "some.tar", "r:") as ours:
        expected = [(member.name, member.size, member.offset_data) for member in plain]
        assert [(member.name, member.size, member.offset_data) for member in members(ours)] == expected
    assert [(name, size) for name, size, _ in expected] == [(name, len(content)) for name, content in files.items()]


def test_a_plain_header_with_a_wrong_bit_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "some.tar", {"train/cat/0.png": b"0123"}, mode="w")
    content = bytearray((tmp_path / "some.tar").read_bytes())
    for position in (0, 130, 150):  # a byte of the name, of the size and of the checksum
        content[position] ^= 1
        (tmp_path / "wrong.tar").write_bytes(content)
        with pytest.raises(DamagedArchive, match="bad checksum"):
            list(members(open_tar(tmp_path / "wrong.tar", "r:")))
        content[position] ^= 1


@pytest.mark.parametrize("kept", [0.2, 0.4])
def test_a_truncated_tar_is_refused(tmp_path: Path, kept: float) -> None:
    archive = image_folder(tmp_path / "raw", plain_files(per_class=5)) / "images.tar"
    content = archive.read_bytes()
    archive.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(UserError, match="dvc repro download --force"):
        blocks(tmp_path / "raw")


def test_reading_needs_neither_torch_nor_mlflow() -> None:
    code = "import sys, pipeline.normalize; sys.exit(bool({'torch', 'mlflow', 'sklearn'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
