"""Make image files with metadata in every place where their format can have some."""

import io
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin, TiffImagePlugin

from tests.raw_folders import encoded, noise

MARK = b"PLANTED-7f3a"
SECONDS = 1234578919  # the numerator of a position, which EXIF stores as 4 bytes
TRACES = (MARK, struct.pack(">I", SECONDS), struct.pack("<I", SECONDS), str(SECONDS).encode())
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf>' + MARK + b"</rdf></x:xmpmeta>"
SIDE = 64


def picture(mode: str = "RGB", *, seed: int = 1) -> Image.Image:
    return Image.fromarray(noise(seed, size=SIDE)).convert(mode)


def exif(orientation: int) -> Image.Exif:
    values = Image.Exif()
    values[0x010E] = values[0x010F] = MARK.decode()  # description, camera
    values[0x0112] = orientation
    values.get_ifd(0x8825)[1] = "N"
    values.get_ifd(0x8825)[2] = (48.0, 51.0, TiffImagePlugin.IFDRational(SECONDS, 10**8))
    return values


def jpeg_segment(marker: int, payload: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


def jpeg(orientation: int = 1, *, mode: str = "RGB", **options: Any) -> bytes:
    content = encoded(
        picture(mode), "JPEG", exif=exif(orientation), xmp=XMP, comment=MARK, icc_profile=MARK * 99, **options
    )
    iptc = jpeg_segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\0\0" + struct.pack(">I", len(MARK)) + MARK)
    thumbnail = jpeg_segment(0xE0, b"JFXX\0\x10" + MARK)
    return content[:2] + iptc + thumbnail + content[2:] + MARK + b"\0\0\0\x18ftypmp42" + MARK


def jfif_thumbnail(orientation: int = 1) -> bytes:
    """Return a JPEG file whose first segment has a thumbnail of 2 x 2 pixels, 12 bytes."""
    content = jpeg(orientation)
    start = content.index(b"\xff\xe0\0\x10JFIF")
    segment = jpeg_segment(0xE0, content[start + 4 : start + 16] + b"\2\2" + MARK)
    return content[:start] + segment + content[start + 18 :]


def mpo(orientation: int = 1) -> bytes:
    second = Image.open(io.BytesIO(jpeg(orientation)))
    stream = io.BytesIO()
    picture().save(stream, "MPO", save_all=True, append_images=[second], exif=exif(orientation))
    return stream.getvalue()


def png(orientation: int = 1, *, mode: str = "RGB", **options: Any) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", MARK.decode())
    info.add_itxt("XML:com.adobe.xmp", XMP.decode())
    info.add(b"tIME", bytes(7))
    info.add(b"prVt", MARK)
    content = encoded(picture(mode), exif=exif(orientation), pnginfo=info, icc_profile=MARK * 9, **options)
    return content + MARK


def webp(orientation: int = 1, *, mode: str = "RGB", **options: Any) -> bytes:
    content = encoded(picture(mode), "WEBP", exif=exif(orientation), xmp=XMP, icc_profile=MARK, **options)
    content += b"ABCD" + struct.pack("<I", len(MARK)) + MARK
    return content[:4] + struct.pack("<I", len(content) - 8) + content[8:] + MARK


def webp_animation(orientation: int = 1) -> bytes:
    return webp(orientation, save_all=True, append_images=[picture(seed=2)])


def gif(orientation: int = 1) -> bytes:
    del orientation  # the format has none
    return encoded(picture("P"), "GIF", comment=MARK, save_all=True, append_images=[picture("P", seed=2)]) + MARK


def tiff(orientation: int = 1, *, mode: str = "RGB") -> bytes:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[270] = tags[271] = MARK.decode()
    tags[700], tags[274] = XMP, orientation
    image = picture(mode) if mode != "I;16" else Image.fromarray(noise(1, size=SIDE)[..., 0].astype(np.uint16) * 257)
    return encoded(image, "TIFF", tiffinfo=tags) + MARK


def heif(orientation: int = 1, *, mode: str = "RGB", file_format: str = "HEIF", **options: Any) -> bytes:
    content = encoded(picture(mode), file_format, exif=exif(orientation).tobytes(), xmp=XMP, **options)
    return content + struct.pack(">I", 8 + len(MARK)) + b"mpvd" + MARK  # a video, as in a photograph that moves


def box(kind: bytes, *payload: bytes) -> bytes:
    content = b"".join(payload)
    return struct.pack(">I4s", 8 + len(content), kind) + content


def boxes(content: bytes) -> dict[bytes, bytes]:
    """Return the payloads of boxes by kind."""
    found, position = {}, 0
    while position < len(content):
        size, kind = struct.unpack_from(">I4s", content, position)
        found[kind] = content[position + 8 : position + size]
        position += size
    return found


def heic_of_two_tiles(orientation: int = 1) -> bytes:
    """Return a HEIC file whose main picture consists of tiles, as those of phones do, beside EXIF data.

    Two pictures are encoded (items 1 and 3, with EXIF data as items 2 and 4); a grid of them is added as item 5, whose
    description is in the box `idat`.
    """
    del orientation  # EXIF has none that counts: the format has properties for it
    content = encoded(
        picture(), "HEIF", save_all=True, append_images=[picture(seed=2)], quality=90, exif=exif(1).tobytes()
    )
    top = boxes(content)
    meta = boxes(top[b"meta"][4:])
    infe = box(b"infe", struct.pack(">BxxxHH4s", 2, 5, 0, b"grid"), MARK, b"\0")
    iinf = struct.pack(">IH", 0, 5) + meta[b"iinf"][6:] + infe
    iref = meta[b"iref"] + box(b"dimg", struct.pack(">HHHH", 5, 2, 1, 3))
    iprp = boxes(meta[b"iprp"])
    ipco = iprp[b"ipco"] + box(b"ispe", struct.pack(">III", 0, 2 * SIDE, SIDE)) + box(b"udes", bytes(4), MARK, bytes(4))
    ipma = struct.pack(">II", 0, 3) + iprp[b"ipma"][8:] + struct.pack(">HBBB", 5, 2, 5, 4)
    grid = struct.pack(">BBBBHH", 0, 0, 0, 1, 2 * SIDE, SIDE)
    entries = [struct.unpack_from(">HHIHII", meta[b"iloc"], 8 + 18 * n) for n in range(4)]

    def whole(shift: int) -> bytes:
        places = [struct.pack(">HHHHII", item, 0, 0, 1, base + offset + shift, length)
                  for item, _, base, _, offset, length in entries]  # fmt: skip
        places.append(struct.pack(">HHHHII", 5, 1, 0, 1, 0, len(grid)))
        iloc = struct.pack(">IBBH", 0x01000000, 0x44, 0, 5) + b"".join(places)
        parts = [box(b"hdlr", meta[b"hdlr"]), box(b"pitm", struct.pack(">IH", 0, 5)), box(b"iloc", iloc)]
        parts += [box(b"iinf", iinf), box(b"iref", iref), box(b"iprp", box(b"ipco", ipco), box(b"ipma", ipma))]
        parts.append(box(b"idat", grid, MARK))
        return box(b"ftyp", top[b"ftyp"]) + box(b"meta", bytes(4), *parts) + box(b"mdat", top[b"mdat"])

    return whole(len(whole(0)) - len(content))


def ppm(orientation: int = 1) -> bytes:
    del orientation
    content = encoded(picture(), "PPM")
    return b"P6\n# " + MARK + content[2:] + MARK


def jpeg2000(orientation: int = 1) -> bytes:
    del orientation
    return encoded(picture(), "JPEG2000", comment=MARK) + MARK


def turned_by_xmp(make: Callable[..., bytes], orientation: int) -> bytes:
    """Return a file whose orientation is written in XMP only."""
    xmp = b'<x:xmpmeta><rdf tiff:Orientation="%d">' % orientation + MARK + b"</rdf></x:xmpmeta>"
    if make is jpeg:
        return encoded(picture(), "JPEG", xmp=xmp)
    if make is webp:
        return encoded(picture(), "WEBP", xmp=xmp, lossless=True)
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp.decode())
    return encoded(picture(), pnginfo=info)


ALL: dict[str, Callable[[int], bytes]] = {
    "jpeg": jpeg,
    "jpeg progressive": lambda o: jpeg(o, progressive=True),
    "jpeg restarts": lambda o: jpeg(o, restart_marker_blocks=1),
    "jpeg gray": lambda o: jpeg(o, mode="L"),
    "jpeg cmyk": lambda o: jpeg(o, mode="CMYK"),
    "jpeg rgb": lambda o: jpeg(o, keep_rgb=True),
    "jpeg with a JFIF thumbnail": jfif_thumbnail,
    "mpo": mpo,
    "png": png,
    "png palette": lambda o: png(o, mode="P", transparency=3),
    "png gray": lambda o: png(o, mode="L", transparency=9),
    "png gray with alpha": lambda o: png(o, mode="LA"),
    "png with alpha": lambda o: png(o, mode="RGBA"),
    "png bits": lambda o: png(o, mode="1"),
    "png 16 bits": lambda o: png(o, mode="I;16"),
    "png animated": lambda o: png(o, save_all=True, append_images=[picture(seed=2)]),
    "webp": webp,
    "webp lossless": lambda o: webp(o, lossless=True),
    "webp with alpha": lambda o: webp(o, mode="RGBA"),
    "webp animated": webp_animation,
    "gif": gif,
    "tiff": tiff,
    "tiff cmyk": lambda o: tiff(o, mode="CMYK"),
    "tiff 16 bits": lambda o: tiff(o, mode="I;16"),
    "tiff ycbcr": lambda o: tiff(o, mode="YCbCr"),
    "heic": lambda o: heif(o, quality=80, thumbnails=[32]),
    "heic with alpha": lambda o: heif(o, mode="RGBA", quality=80),
    "heic gray": lambda o: heif(o, mode="L"),
    "heic of two tiles": heic_of_two_tiles,
    "avif": lambda o: heif(o, file_format="AVIF"),
    "avif with alpha": lambda o: heif(o, mode="RGBA", file_format="AVIF"),
    "ppm": ppm,
    "jpeg2000": jpeg2000,
}
