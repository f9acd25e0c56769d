"""Read a folder of the user's own images: `download` packs them into one archive, `normalize` decodes that."""

import os
import tarfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from pipeline.artifacts import add_path_to_errors, atomic, expand, missing_file_message
from pipeline.core.errors import TemporaryError, UserError, escape_control_chars
from pipeline.core.processes import num_cores
from pipeline.core.progress import format_bytes, progress
from pipeline.core.project import copy_hint
from pipeline.datasets.archives import members, open_tar, report_damage
from pipeline.datasets.decoding_pool import decode_in_processes
from pipeline.datasets.folder_scan import HIDDEN, UNDECODABLE, Scan, describe, image_files, scan
from pipeline.datasets.source import (
    DESCRIPTION,
    DOWNLOAD_AGAIN,
    Description,
    Source,
    check_class_names,
    choose_channels,
)
from pipeline.images.blocks import SPLITS, Block, block_length, hash_content
from pipeline.images.decode import MAX_FILE_BYTES, UnreadableImage, decode
from pipeline.params import Channels, DownloadParams, NormalizeParams, Resize

ARCHIVE = "images.tar"
# a smaller archive is decoded in this process, as starting others takes longer (about a second)
MIN_BYTES_FOR_POOL = 2**24


def download(folder: Path, *, params: DownloadParams) -> Mapping[str, Any]:
    """Write the images of `params.folder` to `images.tar`; print and return which files were found and used.

    Raises UserError where the folder's layout or content is not allowed, TemporaryError where it changes meanwhile.
    """
    found = _scan(expand(params.folder))
    size = pack(found, folder / ARCHIVE)
    splits = ", ".join(f"{split} {sum(counts.values()):,}" for split, counts in found.counts.items())
    print(f"imagefolder: {found.total:,} images of {len(found.class_names)} classes ({splits}), {format_bytes(size)}")
    for line in describe(found):
        print(f"imagefolder: {escape_control_chars(line)}")
    if found.not_used.get(UNDECODABLE):
        print("imagefolder: images that cannot be decoded count as unreadable in normalize.max_unreadable_fraction")
    # systems create and remove hidden files, and `source.json` must not change with them
    not_used = {reason: number for reason, number in found.not_used.items() if reason != HIDDEN}
    return {
        "class_names": found.class_names,
        "counts": found.counts,
        "ignored_files": found.ignored,
        "undecodable_files": [{"file": name, "reason": reason} for name, reason in found.undecodable],
        "files": {"found": found.total + sum(not_used.values()), "used": found.total, "not_used": not_used},
    }


def _scan(folder: Path) -> Scan:
    """Scan the folder; an error message has a hint where the current folder is a temporary copy of DVC."""
    try:
        return scan(folder)
    except UserError as error:
        raise UserError(f"{error}{copy_hint(folder)}") from None


def pack(found: Scan, path: Path) -> int:
    """Write the images to a tar archive that depends only on their names and contents; return its size in bytes."""
    packed = 0
    with (
        atomic(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8") as archive,
        progress("packing", total=found.total, unit="images") as advance,
    ):
        for name, image in image_files(found):
            _add_file(archive, name, image)
            packed += 1
            advance(1)
        if packed != found.total:
            raise TemporaryError(
                f"download.folder: found {packed} images, but {found.total} a moment before; try again when it does "
                "not change"
            )
    return path.stat().st_size


def _add_file(archive: tarfile.TarFile, name: str, path: Path) -> None:
    """Append the file to the archive under this name."""
    member = tarfile.TarInfo(name)  # owner 0, time 0 and mode 0644, the same on any machine
    with path.open("rb") as content, add_path_to_errors(path):
        member.size = os.fstat(content.fileno()).st_size
        archive.addfile(member, content)
    archive.members.clear()  # type: ignore[attr-defined]  # tarfile collects all headers: 1 KB for each file


class ImageFile(NamedTuple):
    """An image file in the archive: its name, its class, and the position and size of its content in bytes."""

    name: str
    label: int
    offset: int
    size: int


class Chunk(NamedTuple):
    """Consecutive files of one split, which are decoded together."""

    split: str
    files: list[ImageFile]


def open_imagefolder(folder: Path, *, description: Description, params: NormalizeParams) -> Source:
    """Open the images in `images.tar`; a large archive is decoded by several processes."""
    archive = folder / ARCHIVE
    class_names = check_class_names(description.class_names, origin=str(folder / DESCRIPTION))
    num_files = sum(count for counts in description.counts.values() for count in counts.values())
    channels = choose_channels(params, native=3)
    length = block_length(params.image_size * params.image_size * channels)
    chunks = _chunks(archive, class_names=class_names, num_files=num_files, length=length)
    decode_chunk = partial(
        _decode_chunk, archive, image_size=params.image_size, channels=channels, resize=params.resize
    )
    if not archive.is_file():
        raise UserError(missing_file_message(archive))
    if archive.stat().st_size >= MIN_BYTES_FOR_POOL and num_cores() > 1:
        blocks = decode_in_processes(decode_chunk, chunks, first_name=lambda chunk: chunk.files[0].name)
    else:
        blocks = map(decode_chunk, chunks)
    return Source(
        description.dataset,
        class_names,
        channels,
        num_files=num_files,
        blocks=blocks,
        ignored_files=description.ignored_files,
        undecodable_files=[(each.file, each.reason) for each in description.undecodable_files],
    )


def _chunks(archive: Path, *, class_names: tuple[str, ...], num_files: int, length: int) -> Iterator[Chunk]:
    """Yield the `num_files` image files of the tar archive in archive order, in chunks of up to `length` files.

    All files of a chunk are in the same split. Only the headers of the archive are read, not the images. Raises
    UserError at a file of an unknown class, and after the last chunk if the archive has another number of files.
    """
    labels = {name: label for label, name in enumerate(class_names)}
    split, files, found = "", list[ImageFile](), 0
    for member in _file_headers(archive):
        next_split, class_name = _split_and_class(member.name, archive=archive)
        if class_name not in labels:
            raise UserError(
                f"{archive}: {member.name!r} is in a class that the train split does not have; {DOWNLOAD_AGAIN}"
            )
        if files and (next_split != split or len(files) == length):
            yield Chunk(split, files)
            files = []
        split = next_split
        files.append(ImageFile(member.name, labels[class_name], member.offset_data, member.size))
        found += 1
    if files:
        yield Chunk(split, files)
    if found != num_files:
        raise UserError(f"{archive}: {found} files, but {DESCRIPTION} lists {num_files}; {DOWNLOAD_AGAIN}")


def _file_headers(archive: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the headers of the regular files in the archive."""
    with report_damage(archive), open_tar(archive, "r:") as tar:
        yield from (member for member in members(tar) if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE))


def _split_and_class(name: str, *, archive: Path) -> tuple[str, str]:
    """Return the first two parts of a name in the archive; raises UserError where these are not split and class."""
    parts = name.split("/")
    if len(parts) < 3 or parts[0] not in SPLITS or not name.isprintable():
        raise UserError(
            f"{archive}: found {name!r}; allowed: <split>/<class>/…, split being {', '.join(SPLITS)}; {DOWNLOAD_AGAIN}"
        )
    return parts[0], parts[1]


def _decode_chunk(archive: Path, chunk: Chunk, *, image_size: int, channels: Channels, resize: Resize) -> Block:
    """Decode the files of a chunk; the block lists those that cannot be read, with the reason."""
    images = np.empty((len(chunk.files), image_size, image_size, channels), np.uint8)
    readable, unreadable, hashes = list[ImageFile](), list[tuple[str, str]](), list[int]()
    with archive.open("rb") as content:
        for file in chunk.files:
            try:
                packed = _read_bytes(content, file)
                images[len(readable)] = decode(packed, image_size=image_size, channels=channels, resize=resize)
                readable.append(file)
                hashes.append(hash_content(packed))
            except UnreadableImage as error:
                unreadable.append((file.name, str(error)))
    labels = np.array([file.label for file in readable], np.int64)
    return Block(chunk.split, images[: len(readable)], labels, [file.name for file in readable], unreadable, hashes)


def _read_bytes(content: IO[bytes], file: ImageFile) -> bytes:
    """Return the content of a file in the opened archive; raises UnreadableImage where it is too large."""
    if file.size > MAX_FILE_BYTES:
        raise UnreadableImage(f"{file.size:,} bytes; allowed: {MAX_FILE_BYTES:,}")
    content.seek(file.offset)
    return content.read(file.size)
