"""Thousands of damaged inputs are each read or refused in one line; none raises another exception.

The examples are the same on every run. Data that a checksum covers are refused or read exactly as they were written.
"""

import gzip
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.artifacts import verify, write_checksums
from pipeline.datasets.archives import DamagedArchive
from pipeline.datasets.pickles import load_pickle
from pipeline.datasets.sources import open_source
from pipeline.images.decode import UnreadableImage, decode
from pipeline.params import Params, check_params, load_params
from pipeline.recipes import parse_override
from tests.conftest import DEFAULTS, PROJECT
from tests.damage import CHANGES, UNUSUAL_VALUES, Change, damaged, examples, refused
from tests.raw_folders import (
    checksum,
    cifar_batch,
    cifar_folder,
    encoded,
    image_folder,
    noise,
    params,
    plain_files,
)

# parameters

FIELDS = [(section, field) for section in Params.model_fields for field in DEFAULTS[section]]


@pytest.mark.slow
@examples(1500)
@given(where=st.sampled_from(FIELDS), value=UNUSUAL_VALUES)
def test_any_value_of_a_parameter_is_kept_as_it_is_or_refused(where: tuple[str, str], value: Any) -> None:
    section, field = where
    values = {name: dict(fields) for name, fields in DEFAULTS.items()}
    values[section][field] = value
    checked: list[Params] = []
    if not refused(lambda: checked.append(check_params(values, origin="test"))):
        stored = getattr(getattr(checked[0], section), field)
        assert stored == (tuple(value) if isinstance(value, list) else float(value) if is_number(stored) else value)


def is_number(value: object) -> bool:
    """Return whether a parameter is a number, which may be written as text, since YAML reads `1e-3` as text."""
    return isinstance(value, float)


UNUSUAL_YAML = ["[", "{", "}", "- ", ": ", "&a ", "*a", "<<: ", "!!binary ", "!!python/object:os.system ", "!!int x"]
UNUSUAL_YAML += [
    "!!timestamp 2001-99-99",
    "2001-99-99T99:99:99Z",
    "0x",
    "1_",
    ".inf",
    "%YAML 9.9\n",
    "---\n",
    "? ",
    "| ",
    "'",
]
UNUSUAL_YAML += [
    "!!set [a]",
    "!!omap [a]",
    "!!bool x",
    "<<",
    "\x00",
    "\x85",
    "\ufeff",
    '"\\x1b[2J"',
    "[" * 300,
    "9" * 5000,
]
YAML_FRAGMENTS = st.sampled_from([*UNUSUAL_YAML, "!!float ''", "'"])
PARAMS_TEXT = (PROJECT / "params.yaml").read_text(encoding="utf-8")


@examples(50)
@given(
    position=st.integers(0, len(PARAMS_TEXT)),
    fragments=st.lists(YAML_FRAGMENTS, min_size=1, max_size=3),
    after_colon=st.booleans(),
)
def test_a_params_file_with_unusual_yaml_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, position: int, fragments: list[str], after_colon: bool
) -> None:
    position = max(PARAMS_TEXT.find(": ", position) + 2, 2) if after_colon else position
    path = tmp_path_factory.getbasetemp() / "params.yaml"
    path.write_text(PARAMS_TEXT[:position] + "".join(fragments) + PARAMS_TEXT[position:], encoding="utf-8")
    refused(lambda: load_params(path).flat())


@examples(30)
@given(changes=CHANGES)
def test_a_damaged_params_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: list[Change]
) -> None:
    path = tmp_path_factory.getbasetemp() / "params.yaml"
    path.write_bytes(damaged(PARAMS_TEXT.encode(), changes))
    refused(lambda: load_params(path).flat())


@examples(150)
@given(text=st.one_of(st.text(), st.builds("train.epochs={}{}".format, YAML_FRAGMENTS, YAML_FRAGMENTS)))
def test_any_text_of_an_override_is_read_or_refused(text: str) -> None:
    refused(lambda: parse_override(text))


def test_yaml_that_expands_exponentially_is_refused_at_once(tmp_path: Path) -> None:
    nested_aliases = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 'ha'}]\n" for n in range(30))
    (tmp_path / "params.yaml").write_text(f"{nested_aliases}{PARAMS_TEXT.replace('model: lenet', 'model: *a29')}")
    assert refused(lambda: load_params(tmp_path / "params.yaml"))


# images

MODES = {"PNG": ("RGB", "P", "LA", "I;16"), "JPEG": ("RGB", "L", "CMYK"), "GIF": ("P",), "BMP": ("RGB",)}
MODES |= {"TIFF": ("RGB", "L"), "WEBP": ("RGB",), "ICO": ("RGBA",), "PPM": ("RGB",), "TGA": ("RGB",)}
MODES |= {"AVIF": ("RGB",), "JPEG2000": ("RGB",), "PCX": ("L",), "DDS": ("RGB",), "QOI": ("RGB",), "ICNS": ("RGB",)}


def picture(mode: str, file_format: str) -> bytes:
    if mode == "I;16":
        return encoded(noise(1)[..., 0].astype(np.uint16) * 257, file_format)
    return encoded(Image.fromarray(noise(1)).convert(mode), file_format)


PICTURES = [picture(mode, file_format) for file_format, modes in MODES.items() for mode in modes]


@examples(1500)
@given(content=st.sampled_from(PICTURES), changes=CHANGES, channels=st.sampled_from([1, 3]))
def test_a_damaged_image_is_decoded_or_refused(content: bytes, changes: list[Change], channels: Any) -> None:
    def check() -> None:
        pixels = decode(damaged(content, changes, head=100), image_size=16, channels=channels, resize="crop")
        assert (pixels.shape, str(pixels.dtype)) == ((16, 16, channels), "uint8")

    refused(check, error=UnreadableImage)


@examples(200)
@given(content=st.binary(max_size=200))
def test_arbitrary_bytes_are_decoded_or_refused(content: bytes) -> None:
    refused(lambda: decode(content, image_size=16, channels=3, resize="pad"), error=UnreadableImage)


# archives


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("raw")
    return {
        "imagefolder": image_folder(parent / "imagefolder", plain_files(per_class=2)),
        "cifar10": cifar_folder(parent / "cifar10", per_batch=1),
    }


@pytest.fixture(scope="module")
def archives(folders: dict[str, Path]) -> dict[str, bytes]:
    return {name: archive_in(folder).read_bytes() for name, folder in folders.items()}


def archive_in(folder: Path) -> Path:
    return next(folder.glob("*.tar*"))


def read_all(folder: Path) -> bytes:
    """Return all pixels and labels of a raw folder, after its checksums are renewed for the damaged files."""
    write_checksums(folder)
    return b"".join(
        block.images.tobytes() + block.labels.tobytes() for block in open_source(folder, params=params()).blocks
    )


def with_tar_checksums(content: bytes) -> bytes:
    """Return the content with correct checksums of its tar headers, so that other damage in a header is parsed."""
    result = bytearray(content)
    for start in range(0, len(result) - 511, 512):
        header = bytes(result[start : start + 512])
        if header[257:262] == b"ustar":
            result[start + 148 : start + 156] = b"%06o\0 " % checksum(header)
    return bytes(result)


@examples(250)
@given(changes=CHANGES, dataset=st.sampled_from(["imagefolder", "cifar10"]))
def test_raw_data_damaged_after_the_download_are_refused(
    folders: dict[str, Path], archives: dict[str, bytes], changes: list[Change], dataset: str
) -> None:
    path, content = archive_in(folders[dataset]), archives[dataset]
    path.write_bytes(content)
    write_checksums(folders[dataset])
    path.write_bytes(damaged(content, changes))
    assert refused(lambda: verify(folders[dataset])) or path.read_bytes() == content


@examples(250)
@given(changes=CHANGES)
def test_a_damaged_tar_of_images_is_read_or_refused(
    folders: dict[str, Path], archives: dict[str, bytes], changes: list[Change]
) -> None:
    folder = folders["imagefolder"]
    archive_in(folder).write_bytes(with_tar_checksums(damaged(archives["imagefolder"], changes, head=512)))
    refused(lambda: read_all(folder))


@examples(120)
@given(changes=CHANGES, outside=st.booleans())
def test_a_damaged_cifar_archive_is_read_or_refused(
    folders: dict[str, Path], archives: dict[str, bytes], changes: list[Change], outside: bool
) -> None:
    folder, content = folders["cifar10"], archives["cifar10"]
    if outside:
        content = damaged(content, changes)
    else:
        content = gzip.compress(
            with_tar_checksums(damaged(gzip.decompress(content), changes, head=2048)), compresslevel=1
        )
    archive_in(folder).write_bytes(content)
    refused(lambda: read_all(folder))


PICKLES = [pickle.dumps(cifar_batch(1, 1), protocol) for protocol in (0, 2, 4)]
PICKLES += [pickle.dumps({"label_names": ["cat", "dog"], "x": (1.5, None, True, -1, 2**40)}, 0)]


@examples(800)
@given(content=st.sampled_from(PICKLES), changes=CHANGES)
def test_a_damaged_pickle_is_read_or_refused(content: bytes, changes: list[Change]) -> None:
    refused(lambda: load_pickle(damaged(content, changes, head=60)), error=DamagedArchive)


PLAIN: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.binary(), inner) | st.tuples(inner, inner),
    max_leaves=10,
)


@examples(200)
@given(value=st.dictionaries(st.text(), PLAIN, max_size=4), protocol=st.integers(0, 4))
def test_a_pickle_is_read_as_it_was_written(value: Any, protocol: int) -> None:
    found: list[Any] = []
    if refused(lambda: found.append(load_pickle(pickle.dumps(value, protocol))), error=DamagedArchive):
        assert protocol < 3  # protocols below 3 write empty bytes as a call of another function
    else:
        assert found == [value]
