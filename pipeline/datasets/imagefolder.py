"""A folder of the user's own images: packed into one archive by the download, decoded from it afterwards."""

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
from pipeline.images.blocks import SPLITS, Block, block_length
from pipeline.images.decode import MAX_FILE_BYTES, UnreadableImage, decode
from pipeline.params import Channels, DownloadParams, NormalizeParams, Resize

ARCHIVE = "images.tar"
POOL_BYTES = 2**24
"""Archives smaller than this are decoded in this process: to start others would take longer (about a second)."""


def download(folder: Path, *, params: DownloadParams) -> Mapping[str, Any]:
    """Write the images of `params.folder` to `images.tar`; print and return what was found and used."""
    found = _scan(expand(params.folder))
    size = pack(found, folder / ARCHIVE)
    splits = ", ".join(f"{split} {sum(counts.values()):,}" for split, counts in found.counts.items())
    print(f"imagefolder: {found.total:,} images of {len(found.class_names)} classes ({splits}), {format_bytes(size)}")
    for line in describe(found):
        print(f"imagefolder: {escape_control_chars(line)}")
    if found.not_used.get(UNDECODABLE):
        print("imagefolder: those that cannot be decoded count as unreadable in normalize.max_unreadable_fraction")
    # hidden files come and go, and `source.json` must not change with them
    not_used = {reason: number for reason, number in found.not_used.items() if reason != HIDDEN}
    return {
        "class_names": found.class_names,
        "counts": found.counts,
        "ignored_files": found.ignored,
        "undecodable_files": [{"file": name, "reason": reason} for name, reason in found.undecodable],
        "files": {"found": found.total + sum(not_used.values()), "used": found.total, "not_used": not_used},
    }


def _scan(folder: Path) -> Scan:
    try:
        return scan(folder)
    except UserError as error:
        raise UserError(f"{error}{copy_hint(folder)}") from None


def pack(found: Scan, path: Path) -> int:
    """Write the images to a tar archive that depends on names and contents only; returns its size in bytes."""
    packed = 0
    with (
        atomic(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8") as archive,
        progress("packing", total=found.total, unit="images") as advance,
    ):
        for name, image in image_files(found):
            _add(archive, name, image)
            packed += 1
            advance(1)
        if packed != found.total:
            raise TemporaryError(
                f"download.folder: {packed} images packed, but {found.total} counted before; it changes, try again"
            )
    return path.stat().st_size


def _add(archive: tarfile.TarFile, name: str, path: Path) -> None:
    member = tarfile.TarInfo(name)  # owner 0, time 0 and mode 0644, the same on any machine
    with path.open("rb") as content, add_path_to_errors(path):
        member.size = os.fstat(content.fileno()).st_size
        archive.addfile(member, content)
    archive.members.clear()  # type: ignore[attr-defined]  # it keeps every member, and memory would grow with the folder


class ImageFile(NamedTuple):
    """Where the content of an image lies in the archive."""

    name: str
    label: int
    offset: int
    size: int


class Chunk(NamedTuple):
    """Consecutive files of one split."""

    split: str
    files: list[ImageFile]


def open_imagefolder(folder: Path, *, description: Description, params: NormalizeParams) -> Source:
    """Open the images in `images.tar`; large archives are decoded by several processes."""
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
    if archive.stat().st_size >= POOL_BYTES and num_cores() > 1:
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
    """Yield all files of the archive, in its order; only the headers are read."""
    labels = {name: label for label, name in enumerate(class_names)}
    split, files, found = "", list[ImageFile](), 0
    for member in _members(archive):
        next_split, class_name = _split_and_class(member.name, archive=archive)
        if class_name not in labels:
            raise UserError(f"{archive}: {member.name!r} is of no class in train; allowed: {', '.join(class_names)}")
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


def _members(archive: Path) -> Iterator[tarfile.TarInfo]:
    with report_damage(archive), open_tar(archive, "r:") as tar:
        yield from (member for member in members(tar) if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE))


def _split_and_class(name: str, *, archive: Path) -> tuple[str, str]:
    parts = name.split("/")
    if len(parts) < 3 or parts[0] not in SPLITS or not name.isprintable():
        raise UserError(f"{archive}: found {name!r}; allowed: <split>/<class>/…, split being {', '.join(SPLITS)}")
    return parts[0], parts[1]


def _decode_chunk(archive: Path, chunk: Chunk, *, image_size: int, channels: Channels, resize: Resize) -> Block:
    images = np.empty((len(chunk.files), image_size, image_size, channels), np.uint8)
    readable, unreadable = list[ImageFile](), list[tuple[str, str]]()
    with archive.open("rb") as content:
        for file in chunk.files:
            try:
                images[len(readable)] = decode(
                    _read(content, file), image_size=image_size, channels=channels, resize=resize
                )
                readable.append(file)
            except UnreadableImage as error:
                unreadable.append((file.name, str(error)))
    labels = np.array([file.label for file in readable], np.int64)
    return Block(chunk.split, images[: len(readable)], labels, [file.name for file in readable], unreadable)


def _read(content: IO[bytes], file: ImageFile) -> bytes:
    if file.size > MAX_FILE_BYTES:
        raise UnreadableImage(f"{file.size:,} bytes; allowed: {MAX_FILE_BYTES:,}")
    content.seek(file.offset)
    return content.read(file.size)
