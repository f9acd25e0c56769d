"""Define blocks of decoded images, the unit in which images are read and written."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.artifacts import Images, Labels

SPLITS = ("train", "validation", "test")
BLOCK_IMAGES = 1024  # most images in a block
BLOCK_BYTES = 2**25  # size of a block; a larger image is a block of its own


@dataclass(frozen=True)
class Block:
    """Consecutive images of one split, and the files between them that could not be read."""

    split: str
    images: Images  # (n, S, S, C) uint8
    labels: Labels  # (n,) int64
    names: list[str]  # n names, each unique in the source
    unreadable: list[tuple[str, str]]  # (name, reason)
    content_hashes: Sequence[int]  # n results of `hash_content`, which decide in which split an image is put
    groups: Sequence[str] = ()  # the group of each image, "" for none; empty where the source has no groups


def block_length(image_bytes: int) -> int:
    """Return the number of images for a block, where an image has this many bytes."""
    return min(BLOCK_IMAGES, max(1, BLOCK_BYTES // image_bytes))


def hash_content(content: bytes) -> int:
    """Return the 64-bit BLAKE2b of what the source has of an image: the bytes of its file, or its original pixels.

    Unlike the decoded pixels, these do not depend on the size of the arrays and, except for images that `download`
    writes again as PNG, not on the version of a decoder. The bytes of such a PNG file depend on the versions of Pillow,
    zlib and the decoder.
    """
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
