"""Read a pickle as data: no pickle is run."""

import pickletools
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.core.errors import first_line
from pipeline.datasets.archives import DamagedArchive


def load_pickle(content: bytes) -> Any:
    """The dictionaries, lists, numbers, texts, bytes and numpy arrays of numbers in a pickle; raises DamagedArchive.

    The opcodes are interpreted here, and whatever could call or import something is no part of that: a pickle that
    wants more is refused. Byte strings of Python 2 come as text (latin-1).
    """
    try:
        return _Reader(limit=2 * len(content)).read(content)
    except DamagedArchive:
        raise
    # a damaged pickle makes the interpreter raise nearly anything: IndexError, TypeError, KeyError, …
    except Exception as error:
        raise DamagedArchive(f"damaged: {first_line(error)}") from None


_LITERALS = (
    {"INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT"}
    | {"STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
    | {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_DTYPE = re.compile(r"[biuf][1248]")


class _Array:
    """An array whose content has not come yet."""

    values: npt.NDArray[Any] | None = None


class _Reader:
    """The stack of pickle's machine. `limit`: bytes that texts may be turned into; each is written but once."""

    def __init__(self, *, limit: int) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._left = limit

    def read(self, content: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "STOP":
                return _plain(self._stack.pop())
            self._step(opcode.name, argument)
        raise DamagedArchive("damaged: no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self._marks.append(len(stack))
            case "EMPTY_DICT" | "EMPTY_LIST":
                stack.append({} if name == "EMPTY_DICT" else [])
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(self._memo[argument])
            case "GLOBAL":
                stack.append(_Name(argument))
            case _ if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case _ if name in _LITERALS:
                stack.append(argument)
            case _:
                self._combine(name)

    def _combine(self, name: str) -> None:
        """The opcodes that take something off the stack."""
        stack = self._stack
        match name:
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case "LIST":
                stack.append(self._since_mark())
            case "DICT":
                pairs = self._since_mark()
                stack.append({})
                self._put(pairs)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND" | "APPENDS":
                items = self._since_mark() if name == "APPENDS" else [stack.pop()]
                _of(list, stack[-1]).extend(items)
            case "SETITEM" | "SETITEMS":
                self._put(self._since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()])
            case "STACK_GLOBAL":
                stack[-2:] = [_Name(f"{_of(str, stack[-2])} {_of(str, stack[-1])}")]
            case "REDUCE":
                stack[-2:] = [self._call(stack[-2], stack[-1])]
            case "BUILD":
                self._build(stack.pop(), stack[-1])
            case _:
                raise DamagedArchive(f"the opcode {name} is not admitted")

    def _put(self, pairs: list[Any]) -> None:
        """Keys and values in turn, into the dictionary on top."""
        keys = [_of((str, bytes), key) for key in pairs[::2]]  # to hash nested tuples may take for ever
        _of(dict, self._stack[-1]).update(zip(keys, pairs[1::2], strict=True))

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _call(self, name: Any, arguments: Any) -> Any:
        """What stands for a call; nothing is called."""
        match name, arguments:
            case "_codecs encode", (str(text), "latin1" | "latin-1"):
                self._left -= len(text)
                if self._left < 0:
                    raise DamagedArchive("it unfolds to more than it holds")
                return text.encode("latin1")
            case (("numpy.core.multiarray _reconstruct" | "numpy._core.multiarray _reconstruct"), _):
                return _Array()
            case "numpy dtype", (str(code), *_) if _DTYPE.fullmatch(code):
                return np.dtype(code)
        raise DamagedArchive(f"{_of(_Name, name)[:80]!r} with such arguments is not admitted")

    def _build(self, state: Any, target: Any) -> None:
        if isinstance(target, np.dtype):
            if state[1] == ">":
                raise DamagedArchive("numbers in big-endian order are not admitted")
            return
        _, shape, dtype, fortran, data = state
        content = data.encode("latin1") if isinstance(data, str) else data
        self._left -= len(content)
        if self._left < 0:
            raise DamagedArchive("it unfolds to more than it holds")
        flat = np.frombuffer(content, _of(np.dtype, dtype))
        _of(_Array, target).values = flat.reshape(shape, order="F" if fortran else "C")


class _Name(str):
    """Module and name of what a pickle would have imported."""

    __slots__ = ()


def _of(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind) or (isinstance(value, _Name) and kind is not _Name):
        raise DamagedArchive(f"a {type(value).__name__} in the wrong place")
    return value


def _plain(value: Any) -> Any:
    """The arrays of a dictionary in the place of what stood for them."""
    if isinstance(value, dict):
        return {key: entry.values if isinstance(entry, _Array) else entry for key, entry in value.items()}
    return value
