"""Remove from image files what is not the picture: positions, times, cameras, comments, thumbnails, second pictures.

JPEG, PNG and WebP files are copied segment by segment, without those that `decode` does not need. HEIC and AVIF files
are copied too, with zeros in place of what is not the picture (`heif_metadata.py`). Every other file is decoded and
written again as PNG, and so is one whose structure is not exactly as its format says. `decode` returns the same pixels
as before, except for a large JPEG file that was written again, which is no longer decoded at reduced size.
"""

import re
import struct
import zlib
from collections.abc import Iterator

from pipeline.images.decode import can_open, read_orientation, to_png
from pipeline.images.heif_metadata import StructureError, strip_heif

_JPEG_START, _PNG_START = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
# the next marker of a JPEG file: neither a stuffed byte, nor a restart of the decoder, nor a fill byte
_JPEG_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
_HUFFMAN_TABLES, _END_OF_IMAGE, _START_OF_SCAN, _QUANTIZATION_TABLES = 0xC4, 0xD9, 0xDA, 0xDB
_FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # sequential and progressive; others are rare, and are written again
_NUMBERS = frozenset({0xDC, 0xDD})  # of lines, and of blocks between restarts
_APPLICATION_DATA, _COMMENT = frozenset(range(0xE0, 0xF0)), 0xFE
# the most that these chunks can hold of a picture
_PNG_MAX_BYTES = {b"IHDR": 13, b"PLTE": 768, b"tRNS": 256, b"IEND": 0}
_PNG_PICTURE = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_PNG_ORIENTATION = re.compile(rb"XML:com\.adobe\.xmp\0|Raw profile type exif\0")  # starts of text that Pillow reads
_WEBP_PICTURE = frozenset({b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"})
_WEBP_ALPHA_AND_ANIMATION, _WEBP_HAS_EXIF = 0x12, 0x08  # bits of the first byte of VP8X
_ANMF_HEADER_BYTES = 16


def remove_metadata(content: bytes) -> bytes:
    """Return an image file with nothing but the first picture and its orientation, for which `decode` does the same.

    An empty file stays as it is. Raises UnreadableImage, with the reason that `decode` gives, where another file can
    neither be copied nor decoded.
    """
    if not content:
        return content
    try:
        if content.startswith(_JPEG_START):
            return _strip_jpeg(content)
        if content.startswith(_PNG_START):
            return _strip_png(content)
        if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
            return _strip_webp(content)
        if content[4:8] == b"ftyp" and can_open(stripped := strip_heif(content)):
            return stripped
    except (StructureError, struct.error, IndexError):
        pass
    return to_png(content)


def _exif(orientation: int) -> bytes:
    """Return EXIF data, a TIFF file in big-endian byte order, with one entry: tag 0x0112, type SHORT, count 1."""
    return struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def _strip_jpeg(content: bytes) -> bytes:
    """Return a JPEG file without application data and comments, up to the end of its first picture."""
    kept: list[bytes | memoryview] = [b"\xff\xd8"]
    if (orientation := read_orientation(content)) != 1:
        kept.append(_jpeg_segment(0xE1, b"Exif\0\0" + _exif(orientation)))
    position, in_scan = 2, False
    while found := _JPEG_MARKER.search(content, position):
        marker = found[1][0]
        if in_scan:
            kept.append(memoryview(content)[position : found.start()])
        if marker == _END_OF_IMAGE:
            return b"".join([*kept, b"\xff\xd9"])
        (length,) = struct.unpack_from(">H", content, found.end())
        position, in_scan = found.end() + length, marker == _START_OF_SCAN
        if length < 2 or position > len(content):
            raise StructureError
        kept.append(_kept_of_segment(marker, content[found.end() + 2 : position]))
    raise StructureError  # the file is truncated


def _jpeg_segment(marker: int, payload: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


def _kept_of_segment(marker: int, payload: bytes) -> bytes:
    """Return what is kept of a JPEG segment; of application data, what states the color space."""
    if marker == 0xE0 and payload.startswith(b"JFIF\0") and len(payload) >= 14:
        return _jpeg_segment(marker, payload[:12] + b"\0\0")  # 0 x 0 pixels of thumbnail
    if marker == 0xEE and payload.startswith(b"Adobe") and len(payload) >= 12:
        return _jpeg_segment(marker, payload[:12])
    if marker in _APPLICATION_DATA or marker == _COMMENT:
        return b""
    if len(payload) != _expected_length(marker, payload):
        raise StructureError
    return _jpeg_segment(marker, payload)


def _expected_length(marker: int, payload: bytes) -> int:
    """Return the length that the content of a segment with this marker has; -1 for another marker.

    A segment of metadata with a damaged marker, which would otherwise be kept, has hardly ever this length.
    """
    if marker in _FRAMES:
        return 6 + 3 * payload[5]
    if marker == _START_OF_SCAN:
        return 4 + 2 * payload[0]
    if marker in _NUMBERS:
        return 2
    length = 0
    if marker == _QUANTIZATION_TABLES:
        while length < len(payload):
            length += 65 if payload[length] < 16 else 129  # 64 numbers of 1 or 2 bytes
        return length
    if marker == _HUFFMAN_TABLES:
        while length < len(payload):
            length += 17 + sum(payload[length + 1 : length + 17])
        return length
    return -1


def _strip_png(content: bytes) -> bytes:
    """Return a PNG file with the chunks of its first picture; of an animation, the other pictures are removed."""
    kept, may_be_turned = [_PNG_START], False
    for kind, payload, chunk in _png_chunks(content):
        if kind in _PNG_PICTURE:
            kept.append(chunk)
        may_be_turned |= kind == b"eXIf" or _PNG_ORIENTATION.match(payload) is not None
    if may_be_turned and (orientation := read_orientation(content)) != 1:
        kept.insert(2, _png_chunk(b"eXIf", _exif(orientation)))
    return b"".join(kept)


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Yield (kind, payload, whole chunk) up to the end of the image; raises StructureError at a damaged one."""
    position, kind = len(_PNG_START), b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", content, position)
        end = position + 12 + length
        chunk = content[position:end]
        if kind in _PNG_PICTURE and (len(chunk) < 12 or chunk[-4:] != _png_checksum(chunk[4:-4])):
            raise StructureError
        if length > _PNG_MAX_BYTES.get(kind, length):
            raise StructureError
        yield kind, chunk[8:-4], chunk
        position = end


def _png_chunk(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + kind + payload + _png_checksum(kind + payload)


def _png_checksum(kind_and_payload: bytes) -> bytes:
    return struct.pack(">I", zlib.crc32(kind_and_payload))


def _strip_webp(content: bytes) -> bytes:
    """Return a WebP file with the chunks of its pictures; `VP8X` says which other chunks there are."""
    (size,) = struct.unpack_from("<I", content, 4)
    if size + 8 > len(content):
        raise StructureError
    found = list(_webp_chunks(content[12 : size + 8]))
    may_be_turned = any(kind in (b"EXIF", b"XMP ") for kind, _ in found)
    orientation = read_orientation(content) if may_be_turned else 1
    chunks = [chunk for chunk in found if chunk[0] in _WEBP_PICTURE]
    if orientation != 1:
        chunks.append((b"EXIF", _exif(orientation)))
    kept = [_kept_of_chunk(*chunk, has_exif=orientation != 1) for chunk in chunks]
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _kept_of_chunk(kind: bytes, payload: bytes, *, has_exif: bool) -> bytes:
    """Return what is kept of a WebP chunk."""
    if kind == b"VP8X":
        flags = payload[0] & _WEBP_ALPHA_AND_ANIMATION | (_WEBP_HAS_EXIF if has_exif else 0)
        return _webp_chunk(kind, bytes([flags]) + payload[1:])
    if kind == b"ANMF":
        frame = [each for each in _webp_chunks(payload[_ANMF_HEADER_BYTES:]) if each[0] in _WEBP_PICTURE]
        return _webp_chunk(kind, payload[:_ANMF_HEADER_BYTES] + b"".join(_webp_chunk(*each) for each in frame))
    return _webp_chunk(kind, payload)


def _webp_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield (kind, payload) of each chunk."""
    position = 0
    while position < len(content):
        kind, length = struct.unpack_from("<4sI", content, position)
        payload = content[position + 8 : position + 8 + length]
        if len(payload) < length:
            raise StructureError
        yield kind, payload
        position += 8 + length + length % 2


def _webp_chunk(kind: bytes, payload: bytes) -> bytes:
    return kind + struct.pack("<I", len(payload)) + payload + b"\0" * (len(payload) % 2)
