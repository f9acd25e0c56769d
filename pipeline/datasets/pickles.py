"""Read the data in a pickle: numbers, texts, lists, dictionaries and arrays of numbers.

Anything else in a pickle is refused, so that it cannot run code. Memory and time are not limited: read only files whose
checksum was compared.
"""

import pickle  # only as the base of an unpickler that allows a few names
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.core.errors import first_line
from pipeline.datasets.archives import DamagedArchive

# codes of the allowed types of arrays; the byte order is not read, as CIFAR-10's numbers are single bytes
_NUMBER_TYPES = ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f4", "f8")


def load_pickle(content: bytes) -> Any:
    """Return the data in a pickle; byte strings of Python 2 become text (latin-1).

    Raises DamagedArchive where the pickle is damaged, or holds anything but data.
    """
    try:
        return _DataUnpickler(BytesIO(content), encoding="latin1").load()
    except DamagedArchive:
        raise
    # a damaged pickle makes the unpickler raise nearly anything: IndexError, TypeError, KeyError, MemoryError, …
    except Exception as error:
        raise DamagedArchive(f"damaged: {first_line(error)}") from None


def _empty_array(*_: object) -> npt.NDArray[np.uint8]:
    """Return an empty array in place of numpy's `_reconstruct`; the array's own `__setstate__` then fills it."""
    return np.empty(0, np.uint8)


def _number_type(code: str, *_: object) -> np.dtype[Any]:
    """Return the dtype in place of `numpy.dtype`; raises DamagedArchive unless it is a type of numbers.

    Arrays of objects would use bytes of the file as addresses in memory.
    """
    if code not in _NUMBER_TYPES:
        raise DamagedArchive("an array of anything but numbers is not allowed")
    return np.dtype(code)


def _encode_latin1(text: str, encoding: str) -> bytes:
    """Return the bytes in place of `_codecs.encode`, by which Python 3 writes bytes in old protocols."""
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
    """An unpickler that knows only the names that arrays of numbers need."""

    def find_class(self, module: str, name: str) -> Any:
        """Return our function for an allowed name; raises DamagedArchive for any other name."""
        if (module, name) not in _ALLOWED:
            raise DamagedArchive(f"{f'{module}.{name}'[:80]!r} is not allowed")
        return _ALLOWED[module, name]
