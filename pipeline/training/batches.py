"""Make batches for the network on its device: normalized, augmented float32 images, or features of a frozen network.

Pixels stay uint8 until a batch is requested; features are float32 and stay as they are. All random numbers are a
function of (seed, epoch). They are drawn on the CPU, so that every device gets the same order, crops and flips, and for
many batches together, so that no step waits; only the transforms of `augmentation` draw for one image at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from pipeline.arrays import Split, normalize_pixels
from pipeline.params import Sampler, TrainParams
from pipeline.training import distributed
from pipeline.training.augmentation import (
    Augmentation,
    apply_seeded,
    apply_to_each,
    erasing_transform,
    mixing_transform,
    pixel_transform,
)
from pipeline.training.sampling import draw_order

BLOCK_BYTES = 2**20  # how much is read from a file at once; a disk takes little longer for it than for one image
DROPOUT_STREAM = 1  # the `stream` of `generator` for dropout
FIRST_WINDOW_STREAM = 2  # the `stream` of `generator` for window 0; window n has FIRST_WINDOW_STREAM + n
# the streams for transforms of pixels, for erasing (of image `number` of the epoch) and for mixing (of batch `number`);
# they count down from the largest value of 32 bits, so that those of windows do not reach them
PIXELS_STREAM, ERASING_STREAM, MIXING_STREAM = 2**32 - 1, 2**32 - 2, 2**32 - 3


def generator(seed: int, *, epoch: int, stream: int = 0, number: int = 0) -> torch.Generator:
    """Return a random generator on the CPU whose numbers depend on the arguments only.

    `stream` and `number` separate the generators of one epoch that are used for different things.
    """
    state = np.random.SeedSequence([seed, epoch, stream, number]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


def seed_dropout(seed: int, *, epoch: int, number: int = 0) -> None:
    """Seed PyTorch's own generators, which dropout uses; `number` separates the steps and ranks of an epoch."""
    torch.manual_seed(generator(seed, epoch=epoch, stream=DROPOUT_STREAM, number=number).initial_seed())


def seed_dropout_of_rank(seed: int, *, epoch: int, step: int) -> None:
    """Seed dropout for one step, differently on each rank; do nothing where the training has one process.

    A checkpoint holds the random state of rank 0 only, so a resumed training could not restore that of the other ranks.
    """
    num_ranks = distributed.world_size()
    if num_ranks > 1:
        seed_dropout(seed, epoch=epoch, number=step * num_ranks + distributed.rank())


@dataclass(frozen=True)
class _Window:
    """The images that are on the device together, and the random numbers drawn for each of them.

    `images` (M, H, W, C) uint8, or features (M, 1, 1, D) float32, are in the order of the split. `order` (M,) int64
    holds their indices in the order of the epoch; all other fields are in that order: `labels` (M,) int64, `mirrored`
    (M, 1) bool, `shifts` down and right in pixels and `cutout_centers` (row and column), (M, 1) int64 each.
    """

    images: Tensor
    order: Tensor
    labels: Tensor
    mirrored: Tensor
    shifts: tuple[Tensor, Tensor]
    cutout_centers: tuple[Tensor, Tensor]


class TrainingBatches:
    """An epoch's shuffled batches of exactly `batch_size`: images (B, C, H, W) float32 and labels (B,) int64.

    A split of features has batches of features (B, D) float32 instead of images. With MixUp or CutMix, the labels are
    the shares of the classes in each image: (B, num_classes) float32.

    With the sampler "balanced" an image can be in several batches or in none: see `draw_order`. Images that do not fill
    a batch are left out; which ones differs from epoch to epoch. `position` is the index of the next batch. With
    several `processes`, each `rank` gets its slice of every batch; all slices have the same length.

    A split whose images are not on the device is shuffled in two steps: its blocks of neighboring images are drawn in
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
        sampler: Sampler = "shuffle",
        num_classes: int | None = None,
        position: int = 0,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self._split, self._batch_size, self._augmentation = split, batch_size, augmentation
        self._seed, self._epoch = seed, epoch
        self._sampler: Sampler = sampler
        self._labels = split.labels.cpu()
        self._class_counts = self._labels.bincount()
        self._slice_length, self._rank = batch_size // processes, rank
        self._blocks, self._block_length = self._draw_blocks()
        blocks_per_batch = max(1, batch_size // self._block_length)
        num_fitting = split.window_bytes // (self._block_length * split.image_bytes)
        self._blocks_per_window = max(1, num_fitting // blocks_per_batch) * blocks_per_batch
        # each image is mirrored in the odd epochs or in the even ones
        self._mirrored_in_even_epochs = torch.rand(len(split), generator=generator(seed, epoch=0)) < 0.5
        self._pixel_transform = pixel_transform(augmentation, image_size=split.images.shape[1])
        self._erasing_transform = erasing_transform(augmentation)
        self._mixing = mixing_transform(augmentation, num_classes=num_classes)
        self._window: tuple[int, _Window] | None = None
        self.position = position

    def __len__(self) -> int:
        return len(self._split) // self._batch_size

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        if self.position == len(self):
            raise StopIteration
        window_index, start = divmod(self.position * self._batch_size, self._blocks_per_window * self._block_length)
        window = self._load_window(window_index)
        batch = slice(start + self._rank * self._slice_length, start + (self._rank + 1) * self._slice_length)
        images = normalize_pixels(self._augmented_pixels(window, batch), split=self._split)
        if self._augmentation.cutout_size:
            images = _cutout(images, window, batch, size=self._augmentation.cutout_size)
        if self._erasing_transform:
            apply_to_each(self._erasing_transform, images, seeds=self._image_seeds(ERASING_STREAM))  # in place
        labels = window.labels[batch]
        if self._mixing:
            # the same draw on all ranks, each of which mixes the images of its slice
            random = generator(self._seed, epoch=self._epoch, stream=MIXING_STREAM, number=self.position)
            images, labels = apply_seeded(self._mixing, images, labels, seed=random.initial_seed())
        self.position += 1
        return images, labels

    def _augmented_pixels(self, window: _Window, batch: slice) -> Tensor:
        """Return a batch after all augmentation of pixels: (B, H, W, C) uint8, or features (B, 1, 1, D) float32."""
        pixels = _shifted_images(window, batch, augmentation=self._augmentation)
        if not self._pixel_transform:
            return pixels
        seeds = self._image_seeds(PIXELS_STREAM)
        images = apply_to_each(self._pixel_transform, pixels.permute(0, 3, 1, 2), seeds=seeds)
        return torch.stack([image.permute(1, 2, 0) for image in images])

    def _image_seeds(self, stream: int) -> list[int]:
        """Return a seed for each image of the next batch, which depends on its index in the epoch, not on the rank."""
        first = self.position * self._batch_size + self._rank * self._slice_length
        numbers = range(first, first + self._slice_length)
        return [
            generator(self._seed, epoch=self._epoch, stream=stream, number=number).initial_seed() for number in numbers
        ]

    def _draw_blocks(self) -> tuple[list[tuple[int, int]], int]:
        """Return (start, stop) of each block in the order of the epoch, an incomplete one last, and a block's length.

        The length is a multiple or a divisor of the batch size, so that a window consists of whole batches.
        """
        split = self._split
        if split.file is None:
            return [(0, len(split))], len(split)
        random = generator(self._seed, epoch=self._epoch)
        length = _block_length(max(1, BLOCK_BYTES // split.image_bytes), batch_size=self._batch_size)
        num_used = len(self) * self._batch_size  # images of the split that this epoch trains on
        first = int(torch.randint(0, len(split) - num_used + 1, (), generator=random))
        shuffled = [length * index for index in torch.randperm(num_used // length, generator=random).tolist()]
        starts = shuffled + [num_used - num_used % length] * (num_used % length > 0)
        return [(first + start, first + min(start + length, num_used)) for start in starts], length

    def _load_window(self, index: int) -> _Window:
        """Return window `index`; a window that is not in memory is read, after the previous window was freed."""
        if self._window is None or self._window[0] != index:
            self._window = None  # free the memory before the next window is read
            self._window = index, self._make_window(index)
        return self._window[1]

    def _make_window(self, index: int) -> _Window:
        """Read the images of the window of this index, and draw its order and augmentation."""
        split, padding = self._split, self._augmentation.crop_padding
        blocks = self._blocks[index * self._blocks_per_window : (index + 1) * self._blocks_per_window]
        random = generator(self._seed, epoch=self._epoch, stream=FIRST_WINDOW_STREAM + index)
        indices = torch.cat([torch.arange(start, stop) for start, stop in blocks])
        labels = self._labels[indices]
        order = draw_order(labels, sampler=self._sampler, class_counts=self._class_counts, random=random)
        height, width = split.images.shape[1:3]
        bounds = [(-padding, padding + 1), (-padding, padding + 1), (0, height), (0, width)]
        drawn = (torch.randint(*bound, (len(order), 1), generator=random) for bound in bounds)
        device = split.labels.device
        down, right, row, column = (values.to(device) for values in drawn)
        return _Window(
            images=_read_blocks(split, blocks),
            order=order.to(device),
            labels=labels[order].to(device),
            mirrored=(self._mirrored_in_even_epochs[indices[order]] ^ bool(self._epoch % 2)).unsqueeze(1).to(device),
            shifts=(down, right),
            cutout_centers=(row, column),
        )


def epoch_batches(
    split: Split, *, params: TrainParams, epoch: int, num_classes: int | None = None, position: int = 0
) -> TrainingBatches:
    """Return this rank's batches of an epoch (from 1), beginning with the batch of index `position`.

    `num_classes` is needed where images are mixed.
    """
    return TrainingBatches(
        split,
        batch_size=params.batch_size,
        seed=params.seed,
        epoch=epoch,
        augmentation=Augmentation.of(params),
        sampler=params.sampler,
        num_classes=num_classes,
        position=position,
        rank=distributed.rank(),
        processes=distributed.world_size(),
    )


def _block_length(limit: int, *, batch_size: int) -> int:
    """Return the largest multiple, or else divisor, of the batch size that is at most `limit`."""
    if limit >= batch_size:
        return limit - limit % batch_size
    return next(length for length in range(limit, 0, -1) if batch_size % length == 0)


def _read_blocks(split: Split, blocks: Sequence[tuple[int, int]]) -> Tensor:
    """Return the images of the blocks on the device: (M, H, W, C) uint8, or features (M, 1, 1, D) float32."""
    if len(blocks) == 1:
        return split.pixels(*blocks[0])
    num_images = sum(stop - start for start, stop in blocks)
    images = torch.empty((num_images, *split.images.shape[1:]), dtype=split.images.dtype, device=split.labels.device)
    position = 0
    for start, stop in blocks:
        images[position : position + stop - start] = split.pixels(start, stop)
        position += stop - start
    return images


def _shifted_images(window: _Window, batch: slice, *, augmentation: Augmentation) -> Tensor:
    """Return the images of a batch, shifted and mirrored as drawn: (B, H, W, C) uint8.

    Features (B, 1, 1, D) float32 are only put in order. One gather does all of it: each pixel of the result is copied
    from its place in the window.
    """
    index, (height, width, channels) = window.order[batch], window.images.shape[1:]
    if not augmentation.flip and not augmentation.crop_padding:
        return window.images[index]
    down, right = window.shifts
    rows, columns = _source_positions(height, down[batch]), _source_positions(width, right[batch])
    if augmentation.flip:
        columns = torch.where(window.mirrored[batch], columns.flip(1), columns)
    source = (index.view(-1, 1, 1) * height + rows.unsqueeze(2)) * width + columns.unsqueeze(1)
    pixels = window.images.view(-1, channels).index_select(0, source.view(-1))
    return pixels.view(len(index), height, width, channels)


def _source_positions(size: int, shift: Tensor) -> Tensor:
    """Return for each position of a shifted row or column the position that its pixel comes from: (B, size) int64.

    `shift` (B, 1) is less than `size` pixels; positions outside the image are reflected at the edge.
    """
    position = (torch.arange(size, device=shift.device) + shift).abs()
    return (size - 1) - (size - 1 - position).abs()


def _cutout(images: Tensor, window: _Window, batch: slice, *, size: int) -> Tensor:
    """Set a square of `size` pixels a side in each image to the mean (DeVries and Taylor 2017, arXiv:1708.04552)."""
    inside = []
    # the centers were drawn for images of the window's size, which a random resized crop may have changed
    for length, drawn, center in zip(images.shape[2:], window.images.shape[1:3], window.cutout_centers, strict=True):
        distance = torch.arange(length, device=images.device) - (center[batch] * length // drawn - size // 2)
        inside.append((distance >= 0) & (distance < size))
    hole = inside[0].unsqueeze(2) & inside[1].unsqueeze(1)
    return images.masked_fill_(hole.unsqueeze(1), 0.0)
