"""Raw data as `download` left it, decoded block by block: memory stays flat however many images there are."""

import multiprocessing
import os
import signal
import tarfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from pipeline.artifacts import CIFAR10_ARCHIVE, IMAGEFOLDER_ARCHIVE, Images, Labels, missing, read_array, read_json
from pipeline.core.errors import UserError
from pipeline.core.processes import num_cores
from pipeline.core.validation import first_problem
from pipeline.datasets.archives import DamagedArchive, load_pickle, members, open_compressed_tar, open_tar, read_member
from pipeline.images.blocks import SPLITS, Block, block_length
from pipeline.images.decode import UnreadableImage, decode, resize_pixels
from pipeline.params import Channels, NormalizeParams, Resize

AGAIN = "run `dvc repro download --force`"
MAX_FILE_BYTES = 2**30
"""Largest image file that is read."""
POOL_BYTES = 2**24
"""Archives smaller than this are decoded in this process: to start others would take longer (about a second)."""
CIFAR_FOLDER = "cifar-10-batches-py"
CIFAR_BATCHES = (*((f"data_batch_{number}", "train") for number in range(1, 6)), ("test_batch", "test"))
CIFAR_SIZE = 32


@dataclass(frozen=True)
class Source:
    """A data set to be read once, from first to last block."""

    dataset: str
    class_names: tuple[str, ...]
    channels: int
    num_files: int
    """Readable or not."""
    ignored_files: list[str]
    """Files in the class folders that are not used and are no images."""
    blocks: Iterator[Block]
    """At most BLOCK_IMAGES images and about BLOCK_BYTES each, in an order that only the data determines."""
    undecodable_files: tuple[tuple[str, str], ...] = ()
    """(name, reason) of images in formats without a decoder, which are in no block."""


class _Undecodable(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    file: str
    reason: str


class _Description(BaseModel):
    """What `source.json` says of the files beside it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dataset: Literal["digits", "cifar10", "imagefolder"]
    class_names: list[str] = []
    counts: dict[str, dict[str, NonNegativeInt]] = {}
    ignored_files: list[str] = []
    undecodable_files: list[_Undecodable] = []
    files: dict[str, Any] = {}
    """How many files were found, used and not used; for the reader."""


def open_source(folder: Path, *, params: NormalizeParams) -> Source:
    """The data set in `folder` (see `pipeline.download`), its images brought to params.image_size.

    Raises UserError, here or while blocks are read, where a file is missing, damaged or not what it should be.
    """
    description = _describe(folder)
    dataset = description.dataset
    channels: Channels = params.channels if params.channels != "auto" else (1 if dataset == "digits" else 3)
    if dataset == "digits":
        return _open_digits(folder, image_size=params.image_size, channels=channels)
    if dataset == "cifar10":
        return _open_cifar(folder / CIFAR10_ARCHIVE, image_size=params.image_size, channels=channels)
    return _open_image_folder(folder / IMAGEFOLDER_ARCHIVE, description, params=params, channels=channels)


def _describe(folder: Path) -> _Description:
    path = folder / "source.json"
    try:
        return _Description.model_validate(read_json(path))
    except ValidationError as error:
        raise UserError(f"{path}: damaged ({first_problem(error)}); {AGAIN}") from None


def _check_names(class_names: Sequence[str], *, origin: str) -> tuple[str, ...]:
    """The names, if they could be those of folders: they go into logs, tables and pages as they are."""
    for name in class_names:
        if not name.isprintable() or not name.strip() or "/" in name:
            raise UserError(f"{origin}: found the class name {name!r}; allowed: printable characters without /")
    if len(set(class_names)) < len(class_names):
        raise UserError(f"{origin}: a class name comes twice; allowed: distinct names; {AGAIN}")
    return tuple(class_names)


def _resized(images: Iterable[npt.NDArray[np.uint8]], *, image_size: int, channels: Channels) -> Images:
    return np.stack([resize_pixels(image, image_size=image_size, channels=channels) for image in images])


def _open_digits(folder: Path, *, image_size: int, channels: Channels) -> Source:
    values = read_array(folder / "images.npy", dtype=np.uint8, dimensions=3)
    labels = read_array(folder / "labels.npy", dtype=np.int64, dimensions=1)
    if not 0 < len(values) == len(labels) or 0 in values.shape or values.max() > 16 or not _within(labels, 10):
        raise UserError(f"{folder}: not scikit-learn's digits (values 0-16, labels 0-9); {AGAIN}")
    pixels = np.rint(values * (255 / 16)).astype(np.uint8)  # 16 is white
    blocks = _array_blocks(pixels, labels, split="train", prefix="digits", image_size=image_size, channels=channels)
    return Source("digits", tuple("0123456789"), channels, len(values), [], blocks)


def _array_blocks(
    pixels: npt.NDArray[np.uint8], labels: Labels, *, split: str, prefix: str, image_size: int, channels: Channels
) -> Iterator[Block]:
    """Blocks from (N, H, W) or (N, H, W, 3) uint8."""
    as_it_is = pixels.shape[1:] == (image_size, image_size, channels)
    length = block_length(image_size * image_size * channels)
    for start in range(0, len(pixels), length):
        part = pixels[start : start + length]
        images = part if as_it_is else _resized(part, image_size=image_size, channels=channels)
        names = [f"{prefix}/{number:05}" for number in range(start, start + len(part))]
        yield Block(split, images, labels[start : start + length], names, [])


def _within(labels: Labels, num_classes: int) -> bool:
    return bool(((labels >= 0) & (labels < num_classes)).all())


def _open_cifar(archive: Path, *, image_size: int, channels: Channels) -> Source:
    tar = _open(open_compressed_tar, archive)
    names = _read_pickle(tar, "batches.meta", archive=archive).get("label_names")
    if not isinstance(names, list) or not names or not all(type(name) in (str, bytes) for name in names):
        raise UserError(f"{archive}: batches.meta has no list of label_names; check download.md5")
    texts = [name.decode(errors="replace") if isinstance(name, bytes) else name for name in names]
    class_names = _check_names(texts, origin=f"{archive}: batches.meta")
    blocks = _cifar_blocks(tar, archive, num_classes=len(class_names), image_size=image_size, channels=channels)
    return Source("cifar10", class_names, channels, 60_000, [], blocks)


def _cifar_blocks(
    tar: tarfile.TarFile, archive: Path, *, num_classes: int, image_size: int, channels: Channels
) -> Iterator[Block]:
    """One batch (30 MB) in memory at a time, in the order of their numbers whatever that in the archive is."""
    with tar:
        for batch, split in CIFAR_BATCHES:
            pixels, labels = _cifar_batch(tar, batch, archive=archive, num_classes=num_classes)
            yield from _array_blocks(
                pixels, labels, split=split, prefix=batch, image_size=image_size, channels=channels
            )


def _cifar_batch(
    tar: tarfile.TarFile, batch: str, *, archive: Path, num_classes: int
) -> tuple[npt.NDArray[np.uint8], Labels]:
    """(n, 32, 32, 3) uint8 and (n,) int64."""
    content = _read_pickle(tar, batch, archive=archive)
    data, labels = content.get("data"), content.get("labels")
    row = 3 * CIFAR_SIZE * CIFAR_SIZE
    if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == row):
        found = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise UserError(f"{archive}: data of {batch} is {found}; allowed: uint8 (n, {row}); check download.md5")
    if not (isinstance(labels, list) and len(labels) == len(data) and all(type(label) is int for label in labels)):
        raise UserError(f"{archive}: labels of {batch} are not {len(data)} whole numbers; check download.md5")
    if not all(0 <= label < num_classes for label in labels):
        raise UserError(f"{archive}: labels of {batch} are not all in 0…{num_classes - 1}; check download.md5")
    planes = data.reshape(-1, 3, CIFAR_SIZE, CIFAR_SIZE)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), np.array(labels, np.int64)


def _read_pickle(tar: tarfile.TarFile, name: str, *, archive: Path) -> dict[str, Any]:
    """A pickled dictionary of the archive, its keys as text."""
    try:
        content = read_member(tar, f"{CIFAR_FOLDER}/{name}")
    except KeyError:
        raise UserError(f"{archive}: has no {CIFAR_FOLDER}/{name}; check download.urls and download.md5") from None
    except DamagedArchive as error:
        raise UserError(f"{archive}: damaged ({error}); {AGAIN}") from None
    try:
        value = load_pickle(content)
    except DamagedArchive as error:
        raise UserError(f"{archive}: {name} refused ({error}); check download.urls and download.md5") from None
    if not isinstance(value, dict):
        raise UserError(f"{archive}: {name} is a {type(value).__name__}; allowed: a dictionary; check download.md5")
    return {key.decode("latin1") if isinstance(key, bytes) else key: entry for key, entry in value.items()}


class Member(NamedTuple):
    """Where the content of a file lies in the archive."""

    name: str
    label: int
    offset: int
    size: int


Chunk = tuple[str, list[Member]]
"""Consecutive files of one split."""


def _open_image_folder(
    archive: Path, description: _Description, *, params: NormalizeParams, channels: Channels
) -> Source:
    class_names = _check_names(description.class_names, origin=str(archive.with_name("source.json")))
    num_files = sum(count for counts in description.counts.values() for count in counts.values())
    length = block_length(params.image_size * params.image_size * channels)
    chunks = _chunks(archive, class_names=class_names, num_files=num_files, length=length)
    work = partial(_decode_chunk, archive, image_size=params.image_size, channels=channels, resize=params.resize)
    if not archive.is_file():
        raise UserError(missing(archive))
    pooled = archive.stat().st_size >= POOL_BYTES and num_cores() > 1
    blocks = _in_pool(work, chunks) if pooled else map(work, chunks)
    undecodable = tuple((each.file, each.reason) for each in description.undecodable_files)
    return Source("imagefolder", class_names, channels, num_files, description.ignored_files, blocks, undecodable)


def _chunks(archive: Path, *, class_names: tuple[str, ...], num_files: int, length: int) -> Iterator[Chunk]:
    """All files of the archive, in its order; only the headers are read."""
    labels = {name: label for label, name in enumerate(class_names)}
    split, members, found = "", list[Member](), 0
    for file in _files(archive):
        file_split, class_name = _place(file.name, archive=archive)
        if class_name not in labels:
            raise UserError(f"{archive}: {file.name!r} is of no class in train; allowed: {', '.join(class_names)}")
        if members and (file_split != split or len(members) == length):
            yield split, members
            members = []
        split = file_split
        members.append(Member(file.name, labels[class_name], file.offset_data, file.size))
        found += 1
    if members:
        yield split, members
    if found != num_files:
        raise UserError(f"{archive}: {found} files, but source.json lists {num_files}; {AGAIN}")


def _files(archive: Path) -> Iterator[tarfile.TarInfo]:
    with _open(lambda path: open_tar(path, "r:"), archive) as tar:
        try:
            yield from (member for member in members(tar) if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE))
        except DamagedArchive as error:
            raise UserError(f"{archive}: damaged ({error}); {AGAIN}") from None


def _place(name: str, *, archive: Path) -> tuple[str, str]:
    parts = name.split("/")
    if len(parts) < 3 or parts[0] not in SPLITS or not name.isprintable():
        raise UserError(f"{archive}: found {name!r}; allowed: <split>/<class>/…, split being {', '.join(SPLITS)}")
    return parts[0], parts[1]


def _decode_chunk(archive: Path, chunk: Chunk, *, image_size: int, channels: Channels, resize: Resize) -> Block:
    split, members = chunk
    images = np.empty((len(members), image_size, image_size, channels), np.uint8)
    readable, unreadable = list[Member](), list[tuple[str, str]]()
    with archive.open("rb") as file:
        for member in members:
            try:
                content = _content(file, member)
                images[len(readable)] = decode(content, image_size=image_size, channels=channels, resize=resize)
                readable.append(member)
            except UnreadableImage as error:
                unreadable.append((member.name, str(error)))
    labels = np.array([member.label for member in readable], np.int64)
    return Block(split, images[: len(readable)], labels, [member.name for member in readable], unreadable)


def _content(file: IO[bytes], member: Member) -> bytes:
    if member.size > MAX_FILE_BYTES:
        raise UnreadableImage(f"{member.size:,} bytes; allowed: {MAX_FILE_BYTES:,}")
    file.seek(member.offset)
    return file.read(member.size)


def _in_pool(work: Callable[[Chunk], Block], chunks: Iterator[Chunk]) -> Iterator[Block]:
    """Blocks in the chunks' order from one process a core, a bounded number of them under way.

    Started by `spawn`: forked children would inherit the locks of numpy's and tqdm's threads, held by nobody.
    """
    workers = num_cores()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    pending: deque[tuple[Chunk, Future[Block]]] = deque()
    try:
        for chunk in chunks:
            pending.append((chunk, pool.submit(work, chunk)))
            if len(pending) > workers + 1:
                yield pending[0][1].result()
                pending.popleft()
        for _, future in pending:
            yield future.result()
    except BrokenProcessPool:
        raise UserError(
            "a process that decodes images was killed (out of memory, or a file crashes the decoder), at or soon after "
            f"{pending[0][0][1][0].name if pending else 'the start'}; free memory or remove the file"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends the workers
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """End when the parent is gone, even if it was killed: the pool's own workers would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _open(how: Callable[[Path], tarfile.TarFile], archive: Path) -> tarfile.TarFile:
    try:
        return how(archive)
    except FileNotFoundError:
        raise UserError(missing(archive)) from None
    except DamagedArchive as error:
        raise UserError(f"{archive}: damaged ({error}); {AGAIN}") from None
