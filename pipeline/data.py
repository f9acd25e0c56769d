"""Batches for the network: from uint8 arrays to normalised, augmented floats, made on the device.

Pixels stay uint8 until a batch is asked for. All randomness is a function of (seed, epoch), drawn on the CPU, so that
every device sees the same order, crops and flips; it is drawn for many batches together, so that no step waits for it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)
from torch import Tensor

from pipeline.artifacts import NORMALIZE, file_md5, read_json, read_split
from pipeline.errors import UserError
from pipeline.params import Channels, Resize, first_problem

WINDOW_BYTES = 8 * 2**30
"""Of images that are on the device at a time, unless told otherwise."""
BLOCK_BYTES = 2**20
"""As many at most are read from a file at once, which costs a disk little more than to find them."""
WINDOW_STREAM = 2
"""The random numbers of the windows are the streams from here on; see `generator`."""


class DatasetInfo(BaseModel):
    """What `dataset.json` says of the arrays beside it."""

    model_config = ConfigDict(frozen=True)

    dataset: str
    class_names: Annotated[tuple[str, ...], Field(min_length=1)]
    image_size: PositiveInt
    channels: Channels
    resize: Resize
    mean: tuple[FiniteFloat, ...]
    std: tuple[FiniteFloat, ...]
    counts: dict[str, dict[str, NonNegativeInt]]
    test_duplicates: tuple[NonNegativeInt, ...]
    md5: str

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError("mean and std are not one number a channel each")
        if self.counts.keys() != {"train", "validation", "test"}:
            raise ValueError("counts is not of train, validation and test")
        if max(self.test_duplicates, default=0) >= max(1, sum(self.counts["test"].values())):
            raise ValueError("test_duplicates has a number that no test image has")
        return self

    @classmethod
    def read(cls, folder: Path = NORMALIZE) -> Self:
        """Raises UserError where `dataset.json` is missing or damaged."""
        path = folder / "dataset.json"
        values = read_json(path)
        try:
            return cls.model_validate({**values, "md5": file_md5(path)} if isinstance(values, dict) else values)
        except ValidationError as error:
            raise UserError(
                f"{path}: damaged ({first_problem(error)}); `dvc repro normalize --force` makes it again"
            ) from None


@dataclass(frozen=True)
class Split:
    """The images of one split: `images` (N, H, W, C) uint8 and `labels` (N,) int64.

    The labels are on the device. So are the images, unless they are more than `window_bytes`: then they stay in their
    file, and `pixels` brings a part of them.
    """

    images: Tensor
    labels: Tensor
    scale: Tensor
    """(H * W * C,) float32: pixels times scale plus shift have mean 0 and deviation 1."""
    shift: Tensor
    file: "np.memmap[Any, Any] | None"
    """Where the images lie, if not on the device."""
    window_bytes: int
    """As many of them are on the device at a time."""

    @classmethod
    def read(
        cls,
        name: str,
        *,
        info: DatasetInfo,
        device: torch.device,
        folder: Path = NORMALIZE,
        window_bytes: int = WINDOW_BYTES,
    ) -> Self:
        """Raises UserError where an array is missing, damaged, or does not agree with `dataset.json`."""
        images, labels = read_split(name, folder=folder)
        expected = (sum(info.counts[name].values()), info.image_size, info.image_size, info.channels)
        if images.shape != expected:
            raise UserError(
                f"{folder / f'{name}_images.npy'}: its shape is {images.shape}, but dataset.json announces {expected}; "
                "`dvc repro normalize --force` makes both again"
            )
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(info.class_names):
            raise UserError(
                f"{folder / f'{name}_labels.npy'}: found labels from {labels.min()} to {labels.max()}; allowed: 0 to "
                f"{len(info.class_names) - 1}; `dvc repro normalize --force` makes them again"
            )
        return cls.of(images, labels, mean=info.mean, std=info.std, device=device, window_bytes=window_bytes)

    @classmethod
    def of(
        cls,
        images: Any,
        labels: Any,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        window_bytes: int = WINDOW_BYTES,
    ) -> Self:
        """From arrays (N, H, W, C) uint8 and (N,) int64, and each channel's mean and deviation of pixels / 255."""
        # a channel without any contrast is only centred
        scale = 1 / (255 * torch.tensor(std, dtype=torch.float64)).clamp(min=1e-3)
        shift = -255 * torch.tensor(mean, dtype=torch.float64) * scale
        pixels = images.shape[1] * images.shape[2]
        file = images if images.nbytes > window_bytes and isinstance(images, np.memmap) else None
        tensor = torch.from_numpy(images)
        return cls(
            images=tensor.to(device) if file is None else tensor,
            labels=torch.from_numpy(np.ascontiguousarray(labels)).to(device),
            scale=scale.repeat(pixels).to(device, torch.float32),
            shift=shift.repeat(pixels).to(device, torch.float32),
            file=file,
            window_bytes=window_bytes,
        )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_bytes(self) -> int:
        return math.prod(self.images.shape[1:])

    def pixels(self, start: int, stop: int) -> Tensor:
        """The images from `start` up to `stop`, on the device: (stop - start, H, W, C) uint8.

        Raises UserError where the file has become shorter.
        """
        if self.file is None:
            return self.images[start:stop]
        # a plain read: the pages of a memory map count as this process's memory until something else wants them
        offset, size = self.file.offset + start * self.image_bytes, (stop - start) * self.image_bytes
        content = np.fromfile(str(self.file.filename), np.uint8, size, offset=offset)
        if len(content) < size:
            raise UserError(f"{self.file.filename}: it was cut short while it was read; `dvc repro` makes it again")
        return torch.from_numpy(content).view(-1, *self.images.shape[1:]).to(self.labels.device)


@dataclass(frozen=True)
class Augmentation:
    """What is drawn anew for each image in each epoch; sizes in pixels, 0 for none."""

    flip: bool = False
    crop_padding: int = 0
    cutout_size: int = 0


def generator(seed: int, *, epoch: int, stream: int = 0, number: int = 0) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments."""
    state = np.random.SeedSequence([seed, epoch, stream, number]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


@dataclass(frozen=True)
class _Window:
    """Images that are on the device together, and what was drawn for each, in the order of the epoch."""

    images: Tensor
    """(M, H, W, C) uint8, in the order of the split."""
    order: Tensor
    """(M,) int64: places in `images`."""
    labels: Tensor
    """(M,) int64, as all that follows in that order."""
    mirrored: Tensor
    """(M, 1) bool."""
    shifts: tuple[Tensor, Tensor]
    """Down and right, in pixels: (M, 1) int64 each."""
    centres: tuple[Tensor, Tensor]
    """Of the square to cut out: (M, 1) int64 each."""


class TrainingBatches:
    """An epoch's shuffled batches of exactly `batch_size`: images (B, C, H, W) float32 and labels (B,) int64.

    What does not fill a batch is left out, another part each epoch. `position`, which may be set, is the number of
    batches given so far. With several `processes`, number `rank` gets its equal share of each batch.

    A split whose images are not on the device is shuffled in two steps: its blocks of neighbouring images are drawn in
    random order, and as many of them as `split.window_bytes` can hold are read and shuffled together.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        seed: int,
        epoch: int,
        augmentation: Augmentation,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self._split, self._batch_size, self._augmentation = split, batch_size, augmentation
        self._seed, self._epoch = seed, epoch
        self._share, self._rank = batch_size // processes, rank
        self._blocks, self._block_length = self._draw_blocks()
        in_a_batch = max(1, batch_size // self._block_length)
        fit = split.window_bytes // (self._block_length * split.image_bytes)
        self._blocks_a_window = max(1, fit // in_a_batch) * in_a_batch
        # a coin for each image, the same in all epochs; what it says is turned round in every other one
        self._coins = torch.rand(len(split), generator=generator(seed, epoch=0)) < 0.5
        self._window: tuple[int, _Window] | None = None
        self.position = 0

    def __len__(self) -> int:
        return len(self._split) // self._batch_size

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        if self.position == len(self):
            raise StopIteration
        number, start = divmod(self.position * self._batch_size, self._blocks_a_window * self._block_length)
        window = self._window_of(number)
        part = slice(start + self._rank * self._share, start + (self._rank + 1) * self._share)
        self.position += 1
        images = _normalise(_pick(window, part, augmentation=self._augmentation), split=self._split)
        if self._augmentation.cutout_size:
            images = _cutout(images, window, part, size=self._augmentation.cutout_size)
        return images, window.labels[part]

    def _draw_blocks(self) -> tuple[list[tuple[int, int]], int]:
        """(start, stop) of each block in the order of the epoch, an incomplete one last; and the images of a block.

        That is a multiple or a divisor of the batch size, and a window has whole batches.
        """
        split = self._split
        if split.file is None:
            return [(0, len(split))], len(split)
        draw = generator(self._seed, epoch=self._epoch)
        length = _block_length(max(1, BLOCK_BYTES // split.image_bytes), batch_size=self._batch_size)
        used = len(self) * self._batch_size
        first = int(torch.randint(0, len(split) - used + 1, (), generator=draw))
        shuffled = [length * number for number in torch.randperm(used // length, generator=draw).tolist()]
        starts = shuffled + [used - used % length] * (used % length > 0)
        return [(first + start, first + min(start + length, used)) for start in starts], length

    def _window_of(self, number: int) -> _Window:
        if self._window is None or self._window[0] != number:
            self._window = None  # not two of them at a time
            self._window = number, self._make_window(number)
        return self._window[1]

    def _make_window(self, number: int) -> _Window:
        split, padding = self._split, self._augmentation.crop_padding
        blocks = self._blocks[number * self._blocks_a_window : (number + 1) * self._blocks_a_window]
        draw = generator(self._seed, epoch=self._epoch, stream=WINDOW_STREAM + number)
        places = torch.cat([torch.arange(start, stop) for start, stop in blocks])
        order = torch.randperm(len(places), generator=draw)
        height, width = split.images.shape[1:3]
        limits = [(-padding, padding + 1), (-padding, padding + 1), (0, height), (0, width)]
        drawn = (torch.randint(*limit, (len(order), 1), generator=draw) for limit in limits)
        device = split.labels.device
        down, right, row, column = (numbers.to(device) for numbers in drawn)
        return _Window(
            images=_joined(split, blocks),
            order=order.to(device),
            labels=split.labels[places[order].to(device)],
            mirrored=(self._coins[places[order]] ^ bool(self._epoch % 2)).unsqueeze(1).to(device),
            shifts=(down, right),
            centres=(row, column),
        )


def _block_length(most: int, *, batch_size: int) -> int:
    """The largest multiple, or else divisor, of the batch size that is no more than `most`."""
    if most >= batch_size:
        return most - most % batch_size
    return next(length for length in range(most, 0, -1) if batch_size % length == 0)


def _joined(split: Split, blocks: Sequence[tuple[int, int]]) -> Tensor:
    """The images of the blocks, on the device: (M, H, W, C) uint8."""
    if len(blocks) == 1:
        return split.pixels(*blocks[0])
    number = sum(stop - start for start, stop in blocks)
    images = torch.empty((number, *split.images.shape[1:]), dtype=torch.uint8, device=split.labels.device)
    place = 0
    for start, stop in blocks:
        images[place : place + stop - start] = split.pixels(start, stop)
        place += stop - start
    return images


def evaluation_batches(
    split: Split, *, batch_size: int, between: tuple[int, int] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The split in its order, all or a range of it: images (B, C, H, W) float32 and labels (B,) int64."""
    first, end = between or (0, len(split))
    for start in range(first, end, batch_size):
        stop = min(start + batch_size, end)
        yield _normalise(split.pixels(start, stop), split=split), split.labels[start:stop]


def _normalise(pixels: Tensor, *, split: Split) -> Tensor:
    """(B, H, W, C) uint8 → (B, C, H, W) float32 of mean 0 and deviation 1, channels last in memory."""
    # whole images as rows: on the CPU six times as fast as with one number a channel
    rows = torch.addcmul(split.shift, pixels.flatten(1).float(), split.scale)
    return rows.view(pixels.shape).permute(0, 3, 1, 2)


def _pick(window: _Window, part: slice, *, augmentation: Augmentation) -> Tensor:
    """The images of this part, shifted and mirrored as drawn: (B, H, W, C) uint8. One gather does it all."""
    index, (height, width, channels) = window.order[part], window.images.shape[1:]
    if not augmentation.flip and not augmentation.crop_padding:
        return window.images[index]
    down, right = window.shifts
    rows, columns = _shifted(height, down[part]), _shifted(width, right[part])
    if augmentation.flip:
        columns = torch.where(window.mirrored[part], columns.flip(1), columns)
    where = (index.view(-1, 1, 1) * height + rows.unsqueeze(2)) * width + columns.unsqueeze(1)
    picked = window.images.view(-1, channels).index_select(0, where.view(-1))
    return picked.view(len(index), height, width, channels)


def _shifted(size: int, shift: Tensor) -> Tensor:
    """Source positions (B, size) of a shift (B, 1) by less than `size` pixels, reflected at the edges."""
    position = (torch.arange(size, device=shift.device) + shift).abs()
    return (size - 1) - (size - 1 - position).abs()


def _cutout(images: Tensor, window: _Window, part: slice, *, size: int) -> Tensor:
    """Set one square a side of `size` in each image to the mean (DeVries and Taylor 2017, arXiv:1708.04552)."""
    inside = []
    for length, centre in zip(images.shape[2:], window.centres, strict=True):
        distance = torch.arange(length, device=images.device) - (centre[part] - size // 2)
        inside.append((distance >= 0) & (distance < size))
    hole = inside[0].unsqueeze(2) & inside[1].unsqueeze(1)
    return images.masked_fill_(hole.unsqueeze(1), 0.0)


def choose_device(name: str, *, field: str) -> torch.device:
    """The device of a parameter's value; raises UserError naming `field` where this machine has none such."""
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if name == "auto":
        return torch.device(available[0])
    if name not in available:
        raise UserError(
            f"{field} is {name}, but PyTorch finds none here; allowed on this machine: auto, {', '.join(available)}"
        )
    return torch.device(name)
