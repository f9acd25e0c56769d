"""Batches for the network: from uint8 arrays to normalised, augmented floats, made on the device.

Pixels stay uint8 until a batch is asked for. All randomness is a function of (seed, epoch), drawn on the CPU, so that
every device sees the same order, crops and flips; it is drawn for many batches together, so that no step waits for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from pipeline.arrays import Split, normalize_pixels
from pipeline.params import TrainParams
from pipeline.training import distributed

BLOCK_BYTES = 2**20
"""As many at most are read from a file at once, which costs a disk little more than to find them."""
DROPOUT_STREAM = 1
WINDOW_STREAM = 2
"""The random numbers of the windows are the streams from here on; see `generator`."""


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


def seed_dropout(seed: int, *, epoch: int, number: int = 0) -> None:
    """Seed PyTorch's own generators, from which dropout draws; `number` tells the steps and ranks of an epoch apart."""
    torch.manual_seed(generator(seed, epoch=epoch, stream=DROPOUT_STREAM, number=number).initial_seed())


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
        position: int = 0,
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
        self.position = position

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
        images = normalize_pixels(_pick(window, part, augmentation=self._augmentation), split=self._split)
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


def epoch_batches(split: Split, *, params: TrainParams, epoch: int, position: int = 0) -> TrainingBatches:
    """Return this rank's batches of an epoch (from 1), from the batch of index `position` on."""
    return TrainingBatches(
        split,
        batch_size=params.batch_size,
        seed=params.seed,
        epoch=epoch,
        augmentation=Augmentation(params.flip, params.crop_padding, params.cutout_size),
        position=position,
        rank=distributed.rank(),
        processes=distributed.world_size(),
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
