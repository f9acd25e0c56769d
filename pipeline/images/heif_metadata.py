"""Overwrite with zeros all that is not the picture in HEIC and AVIF files (ISO 14496-12 and 23008-12).

Such a file consists of boxes: `meta` lists items, which are pictures, EXIF data or others, and where in the file the
content of each item is. Removing bytes would move the others, so that they are overwritten instead.
"""

import itertools
import struct
from collections.abc import Iterator
from typing import NamedTuple

_ITEM_TYPE_BYTES = 4
# properties that a decoder needs: sizes, codec configurations, rotation, mirroring, crop, kind of auxiliary picture
_PROPERTIES = frozenset({
    *(b"ispe", b"pixi", b"hvcC", b"av1C", b"lhvC", b"avcC", b"irot", b"imir", b"clap", b"pasp", b"auxC", b"a1op"),
    *(b"a1lx", b"lsel", b"clli", b"mdcv"),
})  # fmt: skip
_WHOLE_BOXES = frozenset({b"pitm", b"iloc", b"iref", b"ipma"})


class StructureError(ValueError):
    """The error for a file whose segments or boxes are not as its format says, or are of a kind that is not known."""


class _Box(NamedTuple):
    """A box: its kind, and the positions in the file where it and its payload start, and where it ends."""

    kind: bytes
    start: int
    payload: int
    end: int


class _Range(NamedTuple):
    """A part of the file."""

    start: int
    end: int


def strip_heif(content: bytes) -> bytes:
    """Return a HEIC or AVIF file with its main picture only, and zeros in place of all that stands before its end.

    Raises StructureError for an image sequence and for a file that is not as expected.
    """
    boxes = list(_boxes(content, _Range(0, len(content))))
    meta = [box for box in boxes if box.kind == b"meta"]
    if len(meta) != 1 or any(box.kind in (b"moov", b"moof") for box in boxes):
        raise StructureError
    # what stands behind these boxes, such as a video, is removed and not overwritten
    size = max(box.end for box in boxes if box.kind in (b"ftyp", b"meta", b"mdat"))
    kept = [_Range(box.start, box.payload) for box in boxes if box.end <= size]
    kept += [_Range(box.start, box.end) for box in boxes if box.kind == b"ftyp"]
    kept += _kept_of_meta(content, meta[0])
    result = bytearray(size)
    for start, end in kept:
        if end > size:
            raise StructureError
        result[start:end] = content[start:end]
    return bytes(result)


def _boxes(content: bytes, part: _Range) -> Iterator[_Box]:
    """Yield the boxes in a part of the file; raises StructureError where they do not fill it."""
    position = part.start
    while position < part.end:
        size, kind = struct.unpack_from(">I4s", content, position)
        header = 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", content, position + 8)
            header = 16
        elif size == 0:
            size = part.end - position
        if size < header or position + size > part.end:
            raise StructureError
        yield _Box(kind, position, position + header, position + size)
        position += size


def _kept_of_meta(content: bytes, meta: _Box) -> Iterator[_Range]:
    """Yield the parts of the file that the box `meta` needs, and those that its pictures need."""
    yield _Range(meta.start, meta.payload + 4)
    boxes = {box.kind: box for box in _boxes(content, _Range(meta.payload + 4, meta.end))}
    if not {b"pitm", b"iloc", b"iinf", b"iprp"} <= boxes.keys():
        raise StructureError
    items = _picture_items(content, boxes)
    for kind, box in boxes.items():
        yield _Range(box.start, box.payload)
        if kind in _WHOLE_BOXES:
            yield _Range(box.start, box.end)
        elif kind == b"hdlr":
            yield _Range(box.payload, box.payload + 24)  # without the name
    yield from _kept_of_item_list(content, boxes[b"iinf"], items)
    yield from _kept_of_properties(content, boxes[b"iprp"])
    contents = sorted(_item_contents(content, boxes), key=lambda each: each[1])
    if any(after[1].start < before[1].end for before, after in itertools.pairwise(contents)):
        raise StructureError  # then what is kept of one item may be another, such as EXIF data
    yield from (part for item, part in contents if item in items)


def _version(content: bytes, box: _Box) -> int:
    return content[box.payload]


def _read_id(content: bytes, position: int, *, is_long: bool) -> tuple[int, int]:
    """Return a number of 2 or 4 bytes, and the position behind it."""
    (number,) = struct.unpack_from(">I" if is_long else ">H", content, position)
    return number, position + (4 if is_long else 2)


def _picture_items(content: bytes, boxes: dict[bytes, _Box]) -> set[int]:
    """Return the items that make up the main picture: itself, its tiles, and auxiliary ones such as transparency."""
    main = boxes[b"pitm"]
    items = {_read_id(content, main.payload + 4, is_long=_version(content, main) > 0)[0]}
    references = list(_references(content, boxes[b"iref"])) if b"iref" in boxes else []
    size = 0
    while len(items) != size:
        size = len(items)
        for kind, source, targets in references:
            if kind == b"dimg" and source in items:
                items |= set(targets)
            elif kind == b"auxl" and items & set(targets):
                items.add(source)
    return items


def _references(content: bytes, iref: _Box) -> Iterator[tuple[bytes, int, list[int]]]:
    """Yield (kind, item, items to which it refers)."""
    is_long = _version(content, iref) > 0
    for box in _boxes(content, _Range(iref.payload + 4, iref.end)):
        source, position = _read_id(content, box.payload, is_long=is_long)
        number, position = _read_id(content, position, is_long=False)
        targets = []
        for _ in range(number):
            target, position = _read_id(content, position, is_long=is_long)
            targets.append(target)
        yield box.kind, source, targets


def _kept_of_item_list(content: bytes, iinf: _Box, items: set[int]) -> Iterator[_Range]:
    """Yield the parts of the list of items without names, and without the types of items that are overwritten."""
    first = iinf.payload + (8 if _version(content, iinf) else 6)
    yield _Range(iinf.payload, first)
    for box in _boxes(content, _Range(first, iinf.end)):
        version = _version(content, box)
        if version not in (2, 3):
            raise StructureError
        item, position = _read_id(content, box.payload + 4, is_long=version == 3)
        position += 2  # protection
        yield _Range(box.start, position + (_ITEM_TYPE_BYTES if item in items else 0))


def _kept_of_properties(content: bytes, iprp: _Box) -> Iterator[_Range]:
    """Yield the parts of the properties that a decoder needs; color profiles are not applied."""
    for box in _boxes(content, _Range(iprp.payload, iprp.end)):
        yield _Range(box.start, box.end if box.kind == b"ipma" else box.payload)
        if box.kind != b"ipco":
            continue
        for each in _boxes(content, _Range(box.payload, box.end)):
            is_needed = each.kind in _PROPERTIES or content[each.payload : each.payload + 4] == b"nclx"
            yield _Range(each.start, each.end if is_needed else each.payload)
            if each.kind == b"colr":
                yield _Range(each.payload, each.payload + 4)


def _item_contents(content: bytes, boxes: dict[bytes, _Box]) -> Iterator[tuple[int, _Range]]:
    """Yield each item with the parts of the file where its content is, as the box `iloc` has them."""
    iloc, version = boxes[b"iloc"], _version(content, boxes[b"iloc"])
    sizes = struct.unpack_from(">BB", content, iloc.payload + 4)
    offset_size, length_size, base_size, index_size = (nibble for byte in sizes for nibble in (byte >> 4, byte & 15))
    number, position = _read_id(content, iloc.payload + 6, is_long=version == 2)
    known = set[int]()

    def read(size: int) -> int:
        nonlocal position
        position += size
        return int.from_bytes(content[position - size : position], "big")

    for _ in range(number):
        item = read(4 if version == 2 else 2)
        method = read(2) & 15 if version else 0
        read(2)  # the file in which the content is: 0 for this one
        base, num_extents = read(base_size), read(2)
        if item in known or method > 1 or position > iloc.end:
            raise StructureError
        known.add(item)
        if method == 1:
            base += boxes[b"idat"].payload if b"idat" in boxes else len(content)
        for _ in range(num_extents):
            read(index_size if version else 0)
            start, length = base + read(offset_size), read(length_size)
            yield item, _Range(start, start + length)
