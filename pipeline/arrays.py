"""Read the arrays of `artifacts/normalize/` as tensors: whole splits on a device, or slices from a file."""

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
from pipeline.core.errors import UserError
from pipeline.core.validation import first_problem
from pipeline.params import Channels, Resize

WINDOW_BYTES = 8 * 2**30  # default limit for the images that are on the device at a time
CPU = torch.device("cpu")


class DatasetInfo(BaseModel):
    """The content of `dataset.json`, which describes the arrays in the same folder."""

    model_config = ConfigDict(frozen=True)

    dataset: str
    class_names: Annotated[tuple[str, ...], Field(min_length=1)]
    image_size: PositiveInt
    channels: Channels
    resize: Resize
    mean: tuple[FiniteFloat, ...]
    std: tuple[FiniteFloat, ...]
    counts: dict[str, dict[str, NonNegativeInt]]  # images by split and class
    test_duplicates: tuple[NonNegativeInt, ...]  # indices of test images with a duplicate in another split
    md5: str  # of dataset.json itself

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean and std must have {self.channels} numbers each, one for each channel")
        if self.counts.keys() != {"train", "validation", "test"}:
            raise ValueError("counts must have the keys train, validation and test")
        if max(self.test_duplicates, default=0) >= max(1, sum(self.counts["test"].values())):
            raise ValueError("test_duplicates must hold indices of test images")
        return self

    @classmethod
    def read(cls, folder: Path = NORMALIZE) -> Self:
        """Read `dataset.json`; raises UserError where it is missing or damaged."""
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
    """The images of one split, `images` (N, H, W, C) uint8, and their `labels` (N,) int64.

    Instead of images, it may hold features that a frozen network computed from them: (N, 1, 1, D) float32.

    The labels are on the device. The images are too, unless they have more than `window_bytes`: then they stay in
    `file`, from which `pixels` reads slices. `scale` and `shift` are (H * W * C,) float32: pixels times scale plus
    shift are the input of the network, by default of mean 0 and standard deviation 1 over the train split.
    """

    images: Tensor
    labels: Tensor
    scale: Tensor
    shift: Tensor
    file: "np.memmap[Any, Any] | None"
    window_bytes: int

    @classmethod
    def read(
        cls,
        name: str,
        *,
        info: DatasetInfo,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        device: torch.device = CPU,
        folder: Path = NORMALIZE,
        window_bytes: int = WINDOW_BYTES,
    ) -> Self:
        """Read the split `name` from `artifacts/normalize/`, or from another folder, to a device.

        `mean` and `std`, one number for each channel, are by default those of the data set; a pretrained network needs
        those of its `model.json`.
        Raises UserError where an array is missing, damaged, or does not agree with `dataset.json`.
        """
        images, labels = read_split(name, folder=folder)
        expected = (sum(info.counts[name].values()), info.image_size, info.image_size, info.channels)
        if images.shape != expected:
            raise UserError(
                f"{folder / f'{name}_images.npy'}: its shape is {images.shape}, but dataset.json states {expected}; "
                "`dvc repro normalize --force` makes both again"
            )
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(info.class_names):
            raise UserError(
                f"{folder / f'{name}_labels.npy'}: found labels from {labels.min()} to {labels.max()}; allowed: 0 to "
                f"{len(info.class_names) - 1}; `dvc repro normalize --force` makes them again"
            )
        mean, std = mean or info.mean, std or info.std
        return cls.of(images, labels, mean=mean, std=std, device=device, window_bytes=window_bytes)

    @classmethod
    def of(
        cls,
        images: Any,
        labels: Any,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device = CPU,
        window_bytes: int = WINDOW_BYTES,
    ) -> Self:
        """Create a split from arrays: images (N, H, W, C) uint8 and labels (N,) int64.

        `mean` and `std`, one number for each channel, are subtracted from pixels / 255, and then divide them.
        """
        # the clamp: a channel without contrast, whose deviation is 0, is only centered
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
        """Return the size of one image in bytes."""
        return math.prod(self.images.shape[1:]) * self.images.element_size()

    def pixels(self, start: int, stop: int) -> Tensor:
        """Return the images (or features) from `start` up to `stop` on the device: (stop - start, H, W, C).

        Raises UserError where the file has become shorter.
        """
        if self.file is None:
            return self.images[start:stop]
        # not by the memory map: the pages that it reads count as memory of this process
        offset, size = self.file.offset + start * self.image_bytes, (stop - start) * math.prod(self.images.shape[1:])
        try:
            content = np.fromfile(str(self.file.filename), self.file.dtype, size, offset=offset)
        except FileNotFoundError:  # the memory map keeps a deleted file
            content = np.array(self.file[start:stop]).reshape(-1)
        if len(content) < size:
            raise UserError(f"{self.file.filename}: became shorter while it was read; `dvc repro` makes it again")
        return torch.from_numpy(content).view(-1, *self.images.shape[1:]).to(self.labels.device)


def evaluation_batches(
    split: Split, *, batch_size: int, between: tuple[int, int] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of a split in its order: normalized images (B, C, H, W) float32 and labels (B,) int64.

    A split of features has batches (B, D) float32 instead of images. `between` limits the batches to the images from
    its first index up to its second.
    """
    first, end = between or (0, len(split))
    for start in range(first, end, batch_size):
        stop = min(start + batch_size, end)
        yield normalize_pixels(split.pixels(start, stop), split=split), split.labels[start:stop]


def normalize_pixels(pixels: Tensor, *, split: Split) -> Tensor:
    """Return (B, H, W, C) uint8 pixels as (B, C, H, W) float32, normalized with the split's scale and shift.

    The result is channels last in memory. Height and width may differ from those of the split. Features (B, 1, 1, D)
    float32 are returned as (B, D), with the same values.
    """
    if pixels.is_floating_point():
        return pixels.flatten(1)
    # scale and shift have a number for each value of an image: six times as fast on the CPU as one for each channel
    length = math.prod(pixels.shape[1:])
    shift, scale = _of_length(split.shift, length), _of_length(split.scale, length)
    rows = torch.addcmul(shift, pixels.flatten(1).float(), scale)
    return rows.view(pixels.shape).permute(0, 3, 1, 2)


def _of_length(values: Tensor, length: int) -> Tensor:
    """Return the first `length` of the values, which repeat with the channels, so that more of them can be made."""
    return (values if length <= len(values) else values.repeat(math.ceil(length / len(values))))[:length]
