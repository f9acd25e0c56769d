"""Batches for the network: from uint8 arrays to normalised, augmented floats, drawn on the device.

Pixels stay uint8 until a batch is asked for. All randomness is a function of (seed, epoch), drawn on the CPU, so that
every device sees the same order, crops and flips.
"""

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

RESIDENT_BYTES = 8 * 2**30
"""A split of up to this many bytes is copied to the device whole; a larger one stays memory-mapped, batch by batch."""


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
    """The images of one split: `images` (N, H, W, C) uint8 and `labels` (N,) int64, on one device or memory-mapped."""

    images: Tensor
    labels: Tensor
    mean: Tensor
    """(C, 1, 1) float32, in units of the uint8 pixels."""
    std: Tensor

    @classmethod
    def read(cls, name: str, *, info: DatasetInfo, device: torch.device, folder: Path = NORMALIZE) -> Self:
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
        return cls.of(images, labels, mean=info.mean, std=info.std, device=device)

    @classmethod
    def of(cls, images: Any, labels: Any, *, mean: Sequence[float], std: Sequence[float], device: torch.device) -> Self:
        """From arrays (N, H, W, C) uint8 and (N,) int64, and each channel's mean and deviation of pixels / 255."""
        pixels = torch.from_numpy(images)
        resident = pixels.nbytes <= RESIDENT_BYTES
        return cls(
            images=pixels.to(device) if resident else pixels,
            labels=torch.from_numpy(np.ascontiguousarray(labels)).to(device),
            mean=(255 * torch.tensor(mean, dtype=torch.float32, device=device)).view(-1, 1, 1),
            # a channel without any contrast is only centred
            std=(255 * torch.tensor(std, dtype=torch.float32, device=device)).clamp(min=1e-3).view(-1, 1, 1),
        )

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Augmentation:
    """What is drawn anew for each image in each epoch; sizes in pixels, 0 for none."""

    flip: bool = False
    crop_padding: int = 0
    cutout_size: int = 0


def generator(seed: int, *, epoch: int, stream: int = 0) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments."""
    state = np.random.SeedSequence([seed, epoch, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


class TrainingBatches:
    """An epoch's shuffled batches of exactly `batch_size`: images (B, C, H, W) float32 and labels (B,) int64.

    What does not fill a batch is left out, another part each epoch. `position` is the number of batches given so far.
    """

    def __init__(self, split: Split, *, batch_size: int, seed: int, epoch: int, augmentation: Augmentation) -> None:
        self._split, self._batch_size, self._augmentation = split, batch_size, augmentation
        self._draw = generator(seed, epoch=epoch)
        self._order = torch.randperm(len(split), generator=self._draw)
        self.position = 0

    def __len__(self) -> int:
        return len(self._order) // self._batch_size

    def random_state(self) -> Tensor:
        """Of the augmentation's generator: uint8."""
        return self._draw.get_state()

    def go_to(self, position: int, *, random_state: Tensor) -> None:
        """Be as at that position of the same epoch, when `random_state` was this."""
        self.position = position
        self._draw.set_state(random_state)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        if self.position == len(self):
            raise StopIteration
        split, augmentation = self._split, self._augmentation
        start = self.position * self._batch_size
        index = self._order[start : start + self._batch_size]
        self.position += 1
        pixels = _pick(split, index, augmentation=augmentation, draw=self._draw)
        images = _normalise(pixels, split=split)
        if augmentation.cutout_size:
            images = _cutout(images, size=augmentation.cutout_size, draw=self._draw)
        return images, split.labels[index.to(split.labels.device)]


def evaluation_batches(split: Split, *, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All of the split in its order: images (B, C, H, W) float32 and labels (B,) int64."""
    for start in range(0, len(split), batch_size):
        pixels = split.images[start : start + batch_size]
        yield _normalise(pixels, split=split), split.labels[start : start + batch_size]


def _normalise(pixels: Tensor, *, split: Split) -> Tensor:
    """(B, H, W, C) uint8 → (B, C, H, W) float32 of mean 0 and deviation 1, channels last in memory."""
    floats = pixels.to(split.mean.device, non_blocking=True).permute(0, 3, 1, 2).float()
    return floats.sub_(split.mean).div_(split.std)


def _pick(split: Split, index: Tensor, *, augmentation: Augmentation, draw: torch.Generator) -> Tensor:
    """The images at `index`, shifted and mirrored as drawn: (B, H, W, C) uint8. One gather does it all."""
    device = split.images.device
    if not augmentation.flip and not augmentation.crop_padding:
        return split.images[index.to(device)]
    batch, (height, width) = len(index), split.images.shape[1:3]
    rows = _shifted(batch, height, padding=augmentation.crop_padding, draw=draw)
    columns = _shifted(batch, width, padding=augmentation.crop_padding, draw=draw)
    if augmentation.flip:
        mirrored = torch.rand(batch, 1, generator=draw) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    where = (index.view(-1, 1, 1) * height + rows.unsqueeze(2)) * width + columns.unsqueeze(1)
    flat = split.images.view(-1, split.images.shape[3]).index_select(0, where.view(-1).to(device))
    return flat.view(batch, height, width, -1)


def _shifted(batch: int, size: int, *, padding: int, draw: torch.Generator) -> Tensor:
    """Source positions (B, size) of a random shift by up to `padding` pixels, reflected at the edges."""
    offset = torch.randint(-padding, padding + 1, (batch, 1), generator=draw)
    position = (torch.arange(size) + offset).abs()
    return (size - 1) - (size - 1 - position).abs()


def _cutout(images: Tensor, *, size: int, draw: torch.Generator) -> Tensor:
    """Set one square a side of `size` in each image to the mean (DeVries and Taylor 2017, arXiv:1708.04552)."""
    batch, _, height, width = images.shape
    inside = []
    for length in (height, width):
        centre = torch.randint(0, length, (batch, 1), generator=draw)
        distance = torch.arange(length) - (centre - size // 2)
        inside.append((distance >= 0) & (distance < size))
    hole = inside[0].unsqueeze(2) & inside[1].unsqueeze(1)
    return images.masked_fill_(hole.unsqueeze(1).to(images.device), 0.0)


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
