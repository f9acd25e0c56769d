"""Read a folder of the user's own images.

`download` packs them, without metadata, into one archive; `normalize` decodes that.
"""

import os
import tarfile
from collections.abc import Iterator, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from pipeline.artifacts import add_path_to_errors, atomic, expand, missing_file_message, read_csv, write_csv
from pipeline.core.errors import TemporaryError, UserError, escape_control_chars
from pipeline.core.processes import num_cores
from pipeline.core.progress import format_bytes, progress
from pipeline.core.project import copy_hint
from pipeline.datasets.archives import members, open_tar, report_damage
from pipeline.datasets.decoding_pool import decode_in_processes
from pipeline.datasets.folder_scan import HIDDEN, UNDECODABLE, Scan, describe, image_files
from pipeline.datasets.labeled_images import find_images
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
from pipeline.images.metadata import remove_metadata
from pipeline.images.spool import hash_group
from pipeline.params import Channels, DownloadParams, NormalizeParams, Resize

ARCHIVE = "images.tar"
GROUPS = "groups.csv"  # the groups that a table of labels gives, if any: hashes, as names may be those of patients
# a smaller archive is decoded in this process, as starting others takes longer (about a second)
MIN_BYTES_FOR_POOL = 2**24


def download(folder: Path, *, params: DownloadParams) -> Mapping[str, Any]:
    """Write the images of `params.folder`, without metadata, to `images.tar`; print and return which files were used.

    Raises UserError where the folder's layout or content is not allowed, TemporaryError where it changes meanwhile.
    """
    found = _find_images(expand(params.folder), labels=params.labels)
    unreadable = pack(found, folder / ARCHIVE)
    _report(found, unreadable, size=(folder / ARCHIVE).stat().st_size)
    if found.groups:
        rows = [{"image": name, "group": f"{hash_group(group):016x}"} for name, group in found.groups.items()]
        write_csv(folder / GROUPS, rows)
    # systems create and remove hidden files, and `source.json` must not change with them
    not_used = {reason: number for reason, number in found.not_used.items() if reason != HIDDEN}
    return {
        "class_names": found.class_names,
        "counts": _without(found.counts, unreadable),
        **({"num_groups": len(set(found.groups.values()))} if found.groups else {}),
        "ignored_files": found.ignored,
        "undecodable_files": [{"file": name, "reason": reason} for name, reason in found.undecodable + unreadable],
        "files": {"found": found.total + sum(not_used.values()), "used": found.total, "not_used": not_used},
    }


def _find_images(folder: Path, *, labels: str) -> Scan:
    """Find the images and their labels; an error has a hint where the current folder is a temporary copy of DVC."""
    try:
        return find_images(folder, labels=labels)
    except UserError as error:
        raise UserError(f"{error}{copy_hint(folder)}") from None


def _report(found: Scan, unreadable: list[tuple[str, str]], *, size: int) -> None:
    """Print which files were found, used and not used; `size` is that of the archive in bytes."""
    splits = ", ".join(f"{split} {sum(counts.values()):,}" for split, counts in found.counts.items())
    print(f"imagefolder: {found.total:,} images of {len(found.class_names)} classes ({splits}), {format_bytes(size)}")
    for line in describe(found):
        print(f"imagefolder: {escape_control_chars(line)}")
    if unreadable:
        name, reason = unreadable[0]
        print(f"imagefolder: {len(unreadable):,} images cannot be read, such as {name}: {reason}")
    if found.not_used.get(UNDECODABLE) or unreadable:
        print("imagefolder: images that cannot be decoded count as unreadable in normalize.max_unreadable_fraction")


def _without(counts: Mapping[str, Mapping[str, int]], unreadable: list[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Return the numbers of images by split and class without the unreadable ones."""
    left = {split: dict(of_split) for split, of_split in counts.items()}
    for name, _ in unreadable:
        split, class_name, _ = name.split("/", 2)
        left[split][class_name] -= 1
    return left


def pack(found: Scan, path: Path) -> list[tuple[str, str]]:
    """Write the images to a tar archive that depends only on their names and contents, without their metadata.

    Returns (name, reason) of the images that can be decoded in no way, and therefore are not in the archive.
    """
    packed, unreadable = 0, list[tuple[str, str]]()
    with (
        atomic(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8") as archive,
        progress("packing", total=found.total, unit="images") as advance,
    ):
        for name, image in image_files(found):
            try:
                _add_file(archive, name, image)
            except UnreadableImage as error:
                unreadable.append((name, str(error)))
            packed += 1
            advance(1)
        if packed != found.total:
            raise TemporaryError(
                f"download.folder: found {packed} images, but {found.total} a moment before; try again when it does "
                "not change"
            )
    return unreadable


def _add_file(archive: tarfile.TarFile, name: str, path: Path) -> None:
    """Append the file, without its metadata, to the archive under this name; raises UnreadableImage."""
    with path.open("rb") as file, add_path_to_errors(path):
        size = os.fstat(file.fileno()).st_size
        if size > MAX_FILE_BYTES:
            raise UnreadableImage(f"{size:,} bytes; allowed: {MAX_FILE_BYTES:,}")
        content = remove_metadata(file.read())
    member = tarfile.TarInfo(name)  # owner 0, time 0 and mode 0644, the same on any machine
    member.size = len(content)
    archive.addfile(member, BytesIO(content))
    archive.members.clear()  # type: ignore[attr-defined]  # tarfile collects all headers: 1 KB for each file


class ImageFile(NamedTuple):
    """An image file in the archive: its name, class and group, and the position and size of its content in bytes."""

    name: str
    label: int
    offset: int
    size: int
    group: str


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
    groups = _read_groups(folder / GROUPS, num_groups=description.num_groups)
    chunks = _chunks(archive, class_names=class_names, num_files=num_files, groups=groups, length=length)
    decode_chunk = partial(
        _decode_chunk,
        archive,
        image_size=params.image_size,
        channels=channels,
        resize=params.resize,
        has_groups=bool(groups),
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


def _read_groups(path: Path, *, num_groups: int) -> dict[str, str]:
    """Return the group of each image that has one, by its name in the archive; no groups need no table."""
    if not num_groups:
        return {}
    if not path.is_file():
        raise UserError(missing_file_message(path))
    rows = read_csv(path)
    if not rows or set(rows[0]) != {"image", "group"} or len({row["group"] for row in rows}) != num_groups:
        raise UserError(f"{path}: not the table of {num_groups} groups that {DESCRIPTION} names; {DOWNLOAD_AGAIN}")
    return {row["image"]: row["group"] for row in rows}


def _chunks(
    archive: Path, *, class_names: tuple[str, ...], num_files: int, groups: Mapping[str, str], length: int
) -> Iterator[Chunk]:
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
        group = groups.get(member.name, "")
        files.append(ImageFile(member.name, labels[class_name], member.offset_data, member.size, group))
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


def _decode_chunk(
    archive: Path, chunk: Chunk, *, image_size: int, channels: Channels, resize: Resize, has_groups: bool
) -> Block:
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
    return Block(
        chunk.split,
        images[: len(readable)],
        labels,
        [file.name for file in readable],
        unreadable,
        hashes,
        groups=[file.group for file in readable] if has_groups else (),
    )


def _read_bytes(content: IO[bytes], file: ImageFile) -> bytes:
    """Return the content of a file in the opened archive; raises UnreadableImage where it is too large."""
    if file.size > MAX_FILE_BYTES:
        raise UnreadableImage(f"{file.size:,} bytes; allowed: {MAX_FILE_BYTES:,}")
    content.seek(file.offset)
    return content.read(file.size)
