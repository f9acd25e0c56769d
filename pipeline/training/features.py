"""Train the head of a frozen network on features, the input of the head, which are computed once and kept.

The training always goes over features where the backbone is frozen, no pixel changes from epoch to epoch, and the
output of the network is exactly that of its head. The files in `.cache/features/` only save time: a missing or damaged
one is computed again, with the same bits. The name of a file holds a key, the hash of all that decides its bits, and
the MD5 of its content.
"""

import itertools
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save
from torch import Tensor, nn

from pipeline.arrays import Split, evaluation_batches
from pipeline.artifacts import bytes_md5, cache_folder, file_md5, write_array
from pipeline.core.errors import UserError
from pipeline.core.progress import progress
from pipeline.models.build import Classifier
from pipeline.models.freezing import head_modules
from pipeline.params import TrainParams
from pipeline.training.augmentation import Augmentation
from pipeline.training.checkpoints import fingerprint

BATCH_SIZE = 64  # another size may round sums differently, so it is not a parameter
MAX_KEPT_BYTES = 10 * 2**30
MIN_SECONDS_KEPT = 24 * 3600  # after the last use: a training may read its file as long as it runs
Features = npt.NDArray[np.float32]  # (N, D)


def select_trained(classifier: Classifier, split: Split, *, params: TrainParams) -> nn.Module:
    """Return the module to train: the head where the training goes over features, else the whole classifier."""
    if params.freeze != "backbone" or changes_pixels(params):
        return classifier
    head = find_separable_head(classifier, split)
    if head is not None:
        return head
    print(
        f"train.freeze is backbone, but the output of {params.model} is not that of its last layer alone: "
        "each epoch passes all images through the whole network",
        flush=True,
    )
    return classifier


def changes_pixels(params: TrainParams) -> bool:
    """Return whether augmentation changes the pixels of an image from epoch to epoch."""
    return replace(Augmentation.of(params), input_size=None) != Augmentation()


@torch.no_grad()
def find_separable_head(classifier: Classifier, split: Split) -> nn.Module | None:
    """Return the head if the output of the network is exactly what the head makes of features (B, D), else None.

    That is tried on random images of the shape of those in `split`.
    """
    height, width, channels = split.images.shape[1:]
    # a generator of its own: the training draws from the global one
    images = torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(0)).to(split.labels.device)
    for name in filter(None, head_modules(classifier)):  # googlenet and inception_v3 also have heads for training only
        head = classifier.network.get_submodule(name)
        output, inputs = _run(classifier, head, images)
        is_matrix = len(inputs) == 1 and isinstance(inputs[0], Tensor) and inputs[0].ndim == 2
        if is_matrix and torch.equal(head(inputs[0]), output):
            return head
    return None


def _run(classifier: Classifier, head: nn.Module, images: Tensor) -> tuple[Tensor, list[Any]]:
    """Return the output of the classifier in evaluation mode, and the first argument of each call of its head."""
    inputs: list[Any] = []
    hook = head.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0] if arguments else None))
    was_training = classifier.training
    try:
        return classifier.eval()(images), inputs
    finally:
        classifier.train(was_training)
        hook.remove()


@torch.no_grad()
def compute_features(classifier: Classifier, head: nn.Module, split: Split, *, name: str) -> Iterator[Features]:
    """Yield the features of a split in its order, in blocks (B, D) float32; the name of the split is for the progress.

    The split is read batch by batch, so its images need not fit into the memory.
    """
    with progress(f"features of {name}", total=len(split), unit="images", leave=False) as advance:
        for images, _ in evaluation_batches(split, batch_size=BATCH_SIZE):
            _, [features] = _run(classifier, head, images)
            yield features.float().cpu().numpy()
            advance(len(images))


def kept_features(classifier: Classifier, head: nn.Module, split: Split, *, name: str, key: str) -> Split:
    """Return the split with features in place of its images, from the file with this key or computed and kept there.

    Features larger than `split.window_bytes` stay in the file. Where the file cannot be written, a warning is printed,
    and the features stay in memory.
    """
    folder = cache_folder("features")
    found = _read(folder, name=name, key=key, window_bytes=split.window_bytes)
    if found is None:
        try:
            path = _write(compute_features(classifier, head, split, name=name), folder, name=name, key=key, split=split)
            found = _load(path, window_bytes=split.window_bytes)
        except OSError as error:
            print(f"warning: {error.filename}: {error.strerror}; the features of {name} are not kept", flush=True)
            found = np.concatenate(list(compute_features(classifier, head, split, name=name)))
            if found.nbytes > split.window_bytes:  # in memory they would be shuffled otherwise than in a file
                raise UserError(
                    f"the features of {name} have {found.nbytes:,} bytes, more than train.window_megabytes allows in "
                    f"memory, and {folder} cannot be written ({error.strerror}); free space there"
                ) from None
        else:
            _remove_unused(folder)
            print(f"features of {name}: computed for {len(split):,} images, kept in {folder}", flush=True)
    return with_features(split, found)


def with_features(split: Split, features: Features) -> Split:
    """Return the split with features in place of its images: on the device, or in their file if memory-mapped."""
    tensor = torch.from_numpy(features).view(len(split), 1, 1, -1)
    if isinstance(features, np.memmap):
        return replace(split, images=tensor, file=features)
    return replace(split, images=tensor.to(split.labels.device), file=None)


def feature_key(classifier: Classifier, *, params: TrainParams, determinants: Mapping[str, Any]) -> str:
    """Return the hash of all that decides the bits of features.

    `determinants` are the data, the network and the preparation of its input, the code and the hardware; added are the
    frozen weights, how they lie in memory, and versions of the packages that compute.
    """
    frozen = {
        name: tensor.cpu().contiguous()
        for name, tensor in classifier.network.state_dict().items()
        if name not in classifier.head
    }
    return fingerprint(
        **determinants,
        frozen=bytes_md5(save(frozen)),
        channels_last=params.channels_last,
        deterministic=params.deterministic,
        batch_size=BATCH_SIZE,
        versions=[version(package) for package in ("torch", "torchvision", "timm")],
    )


def _read(folder: Path, *, name: str, key: str, window_bytes: int) -> Features | None:
    """Return the content of the file with this key, or None; print a warning for a damaged file, and delete it."""
    for path in folder.glob(f"{name}-{key}-*.npy"):
        with suppress(OSError):  # the file may be deleted at any time
            if file_md5(path) == path.stem.rpartition("-")[2]:
                os.utime(path)  # the time of the last use, by which `_remove_unused` chooses
                found = _load(path, window_bytes=window_bytes)
                print(f"features of {name}: read from {path}", flush=True)
                return found
            print(f"warning: {path}: damaged (its MD5 is not the one in its name); it is computed again", flush=True)
            path.unlink()
    return None


def _load(path: Path, *, window_bytes: int) -> Features:
    """Return the features (N, D) of a file: in memory, or memory-mapped if they are larger than `window_bytes`."""
    fits = path.stat().st_size <= window_bytes
    found: Features = np.load(path, mmap_mode=None if fits else "c", allow_pickle=False)
    return found


def _write(blocks: Iterator[Features], folder: Path, *, name: str, key: str, split: Split) -> Path:
    """Write the file of a split's features, whole or not at all, and return its path; raises OSError on failure."""
    first = next(blocks)
    unnamed = folder / f"{name}-{key}.{os.getpid()}.npy"
    md5 = write_array(unnamed, itertools.chain([first], blocks), shape=(len(split), first.shape[1]), dtype=np.float32)
    return unnamed.replace(folder / f"{name}-{key}-{md5}.npy")


def _remove_unused(folder: Path) -> None:
    """Remove the least recently used files beyond MAX_KEPT_BYTES, but none used in the last MIN_SECONDS_KEPT.

    A file that a killed process was writing is treated like any other.
    """
    found = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another training may rename or remove it at the same time
            found.append((path.stat(), path))
    found.sort(key=lambda each: -each[0].st_mtime)
    size = 0
    for status, path in found:
        size += status.st_size
        if size > MAX_KEPT_BYTES and status.st_mtime < time.time() - MIN_SECONDS_KEPT:
            path.unlink(missing_ok=True)
