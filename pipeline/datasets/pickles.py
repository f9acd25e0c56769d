"""Read a pickle as data: numbers, texts, lists, dictionaries and arrays of numbers.

Whatever else a pickle names is refused, so that none can run code, whoever made it. Nothing bounds the memory and the
time that a hostile one takes: read only files whose checksum was compared.
"""

import pickle  # only as the base of an unpickler that admits four names
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.core.errors import first_line
from pipeline.datasets.archives import DamagedArchive

_NUMBER_TYPES = ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f4", "f8")
"""Codes of the types of arrays; the byte order is not read, as CIFAR-10's numbers are single bytes."""


def load_pickle(content: bytes) -> Any:
    """Return what a pickle holds; byte strings of Python 2 come as text (latin-1).

    Raises DamagedArchive where it is damaged, or holds more than data.
    """
    try:
        return _DataUnpickler(BytesIO(content), encoding="latin1").load()
    except DamagedArchive:
        raise
    # a damaged pickle makes the unpickler raise nearly anything: IndexError, TypeError, KeyError, MemoryError, …
    except Exception as error:
        raise DamagedArchive(f"damaged: {first_line(error)}") from None


def _empty_array(*_: object) -> npt.NDArray[np.uint8]:
    """Stand in for numpy's `_reconstruct`; the array's own `__setstate__` fills it."""
    return np.empty(0, np.uint8)


def _number_type(code: str, *_: object) -> np.dtype[Any]:
    """Stand in for `numpy.dtype`: arrays of objects or of records would take bytes for addresses."""
    if code not in _NUMBER_TYPES:
        raise DamagedArchive("an array of anything but numbers is not allowed")
    return np.dtype(code)


def _encode_latin1(text: str, encoding: str) -> bytes:
    """Stand in for `_codecs.encode`, as which Python 3 writes bytes in old protocols."""
    if encoding not in ("latin1", "latin-1"):
        raise DamagedArchive("bytes in another encoding than latin-1 are not allowed")
    return text.encode("latin1")


_ALLOWED: Mapping[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
    ("numpy", "ndarray"): None,  # an argument that `_empty_array` ignores
    ("numpy", "dtype"): _number_type,
    ("_codecs", "encode"): _encode_latin1,
}


class _DataUnpickler(pickle.Unpickler):
    """An unpickler for which no names exist but those that arrays of numbers need."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name; raises DamagedArchive for one that is not allowed."""
        if (module, name) not in _ALLOWED:
            raise DamagedArchive(f"{f'{module}.{name}'[:80]!r} is not allowed")
        return _ALLOWED[module, name]
