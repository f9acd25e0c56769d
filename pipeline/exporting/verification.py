"""Compare an exported network with the original one: probabilities, classes, and the time for a batch."""

import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.artifacts import Images
from pipeline.core.errors import UserError
from pipeline.exporting.formats import Run
from pipeline.exporting.images import spread
from pipeline.exporting.preprocess import FORMATS, REFUSED_MODES
from pipeline.prediction.image_files import read_image
from pipeline.prediction.inputs import Input
from pipeline.prediction.model import LoadedModel

BATCH_SIZES = (1, 2, 7, 64)
MAX_DIFFERENCE = 1e-4
# the first minus the second probability of an image, above which the most probable class must be the same: two
# probabilities that each change by MAX_DIFFERENCE cannot change places
MIN_MARGIN = 2 * MAX_DIFFERENCE
MIN_PHOTOGRAPHS, MAX_PHOTOGRAPHS = 200, 1000
MIN_AGREEMENT = 0.99  # fraction of photographs with the same class
PHOTOGRAPHS_PER_BLOCK = 32
MEASURED_BATCH_SIZES = (1, 64)
MIN_ROUNDS, MAX_ROUNDS = 3, 31  # how often the time for a batch is measured
MAX_SECONDS = 10.0  # for all rounds of one batch size, unless MIN_ROUNDS take longer

Probabilities = npt.NDArray[Any]  # (N, num_classes)


@dataclass(frozen=True)
class Agreement:
    """How the probabilities of an export differ from those of the original on the same images.

    `differences` are the largest absolute ones by batch size. `num_clear` images have a margin above MIN_MARGIN, and of
    these, `num_other_class` have another most probable class in a batch of at least one size.
    """

    num_images: int
    differences: dict[int, float]
    num_clear: int
    num_other_class: int

    @property
    def largest_difference(self) -> float:
        """Return the largest absolute difference of a probability; NaN where one is NaN."""
        return float(np.max(list(self.differences.values())))


@dataclass(frozen=True)
class PhotographAgreement:
    """How the classes differ between a photograph's way by the original and by the exported network and preprocessing.

    `num_same_pixels` photographs have the same pixels, bit for bit, and `num_same_class` the same most probable class,
    of `num_compared`. `num_failed` of these have no class, as `preprocess.py` cannot read them. `num_refused` other
    photographs have a format or mode that it does not support, and `num_unreadable` cannot be read by ourselves either.
    """

    num_compared: int
    num_failed: int
    num_same_pixels: int
    num_same_class: int
    largest_difference: float
    num_refused: int
    num_unreadable: int

    @property
    def fraction(self) -> float:
        """Return the fraction of the compared photographs with the same class."""
        return self.num_same_class / self.num_compared


def compare(expected: Probabilities, run: Run, images: Images) -> Agreement:
    """Run an export on images (N, H, W, C) uint8 in batches of each size, and compare with the expected probabilities.

    The last batch is filled up with the first images, so that each batch is of the stated size.
    """
    ordered = np.sort(expected, axis=1)
    margins = ordered[:, -1] - ordered[:, -2] if expected.shape[1] > 1 else np.ones(len(expected))
    clear = margins > MIN_MARGIN
    differences, other_class = {}, np.zeros(len(images), bool)
    for size in BATCH_SIZES:
        found = _in_batches(run, images, size=size)
        differences[size] = float(np.abs(found - expected).max())
        other_class |= found.argmax(1) != expected.argmax(1)
    return Agreement(len(images), differences, int(clear.sum()), int((other_class & clear).sum()))


def _in_batches(run: Run, images: Images, *, size: int) -> Probabilities:
    indices = np.arange(-(-len(images) // size) * size) % len(images)
    found = [run(images[batch]) for batch in indices.reshape(-1, size)]
    return np.concatenate(found)[: len(images)]


def check_agreement(agreement: Agreement, *, export: str) -> None:
    """Raise UserError where the probabilities or classes differ by more than is allowed."""
    difference, others = agreement.largest_difference, agreement.num_other_class
    if not (difference <= MAX_DIFFERENCE and others == 0):  # the comparison with NaN is false
        raise UserError(
            f"{export}: does not agree with the original on {agreement.num_images} images: the largest difference of a "
            f"probability is {difference:.1e}, and {others} of {agreement.num_clear} clear images have another class; "
            f"allowed: {MAX_DIFFERENCE:.0e} and 0. Nothing was written; export to the other format, or serve the "
            "original with `make serve`"
        )


def compare_photographs(
    model: LoadedModel, run: Run, preprocess: Callable[[Path], Images], paths: Sequence[Path], *, threads: int
) -> PhotographAgreement:
    """Compare file → `decode` → original with file → `preprocess` → export, on up to MAX_PHOTOGRAPHS files.

    Raises UserError where fewer than MIN_PHOTOGRAPHS can be compared.
    """
    paths = spread(paths, MAX_PHOTOGRAPHS)
    counts = {"compared": 0, "failed": 0, "same_pixels": 0, "same_class": 0, "refused": 0, "unreadable": 0}
    largest = 0.0
    for start in range(0, len(paths), PHOTOGRAPHS_PER_BLOCK):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of damaged metadata
            pairs = _read_both(model, preprocess, paths[start : start + PHOTOGRAPHS_PER_BLOCK], counts=counts)
        if not pairs:
            continue
        ours, theirs = (np.stack(images) for images in zip(*pairs, strict=True))
        expected, found = model.probabilities(ours, threads=threads), run(theirs)
        counts["compared"] += len(pairs)
        counts["same_pixels"] += int((ours == theirs).all(axis=(1, 2, 3)).sum())
        counts["same_class"] += int((found.argmax(1) == expected.argmax(1)).sum())
        largest = float(np.maximum(largest, np.abs(found - expected).max()))  # np.maximum keeps NaN
    if counts["compared"] < MIN_PHOTOGRAPHS:
        raise UserError(
            f"--photographs: {counts['compared']} of {len(paths)} files can be compared ({counts['unreadable']} are "
            f"unreadable, {counts['refused']} have a format or mode that preprocess.py does not support); allowed: "
            f"{MIN_PHOTOGRAPHS} or more; name a folder with more photographs"
        )
    return PhotographAgreement(**{f"num_{name}": count for name, count in counts.items()}, largest_difference=largest)


def _read_both(
    model: LoadedModel, preprocess: Callable[[Path], Images], paths: Sequence[Path], *, counts: dict[str, int]
) -> list[tuple[Images, Images]]:
    """Return the pixels of the files by `decode` and by `preprocess`; others are counted by the reason."""
    config, pairs = model.config, []
    for path in paths:
        size, channels, resize = config.image_size, config.channels, config.resize
        ours = read_image(Input(str(path)), image_size=size, channels=channels, resize=resize).pixels
        if ours is None:
            counts["unreadable"] += 1
            continue
        try:
            pairs.append((ours, preprocess(path)))
        except (ValueError, OSError):
            if _is_supported(path):
                counts["compared"] += 1
                counts["failed"] += 1
            else:
                counts["refused"] += 1
    return pairs


def _is_supported(path: Path) -> bool:
    """Return whether an image has a format and mode that `preprocess.py` states to read."""
    with Image.open(path) as image:
        return image.format in (*FORMATS, "MPO") and image.mode not in REFUSED_MODES


def check_photographs(agreement: PhotographAgreement, *, export: str) -> None:
    """Raise UserError where too few photographs have the same class."""
    if agreement.fraction < MIN_AGREEMENT:
        raise UserError(
            f"{export}: {agreement.num_same_class} of {agreement.num_compared} photographs ({agreement.fraction:.1%}) "
            f"have the same class as by the original, and preprocess.py cannot read {agreement.num_failed}; allowed: "
            f"{MIN_AGREEMENT:.0%} or more with the same class. Nothing was written; serve the original with `make "
            "serve`"
        )


def latencies(runs: Mapping[str, Run], images: Images) -> dict[int, dict[str, float]]:
    """Return the median seconds for one batch by batch size and by name of the network; they run in turns.

    The first batch of each network is not measured.
    """
    found: dict[int, dict[str, float]] = {}
    for size in MEASURED_BATCH_SIZES:
        batch = images[np.arange(size) % len(images)]
        for run in runs.values():
            run(batch)
        found[size] = _median_seconds(runs, batch)
    return found


def _median_seconds(runs: Mapping[str, Run], batch: Images) -> dict[str, float]:
    """Return the median seconds for the batch by name of the network."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for finished in range(MAX_ROUNDS):
        if finished >= MIN_ROUNDS and time.perf_counter() - start > MAX_SECONDS:
            break
        for name, run in runs.items():
            before = time.perf_counter()
            run(batch)
            seconds[name].append(time.perf_counter() - before)
    return {name: statistics.median(values) for name, values in seconds.items()}
