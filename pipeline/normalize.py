"""Raw images to arrays of one size, splits, the training split's mean and deviation, and a report on the data.

Run as a step: `python -m pipeline.normalize`. Memory stays flat: pixels pass through a file beside the result, which
needs twice the room of the arrays while it works; some 60 bytes an image are held.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.artifacts import DOWNLOAD, NORMALIZE, Images, Labels, replace_folder, verify, write_array, write_json
from pipeline.core.errors import UserError, report_errors
from pipeline.core.progress import progress
from pipeline.datasets.raw import Source, open_source
from pipeline.images.blocks import SPLITS
from pipeline.images.duplicates import (
    TEST_ROWS,
    ExactDuplicates,
    FeatureBlocks,
    Indices,
    Match,
    exact_duplicates,
    near_duplicates,
)
from pipeline.images.splits import draw_splits
from pipeline.images.spool import Spool
from pipeline.params import NormalizeParams, load_params

EXAMPLES = 20
MIN_DEVIATION = 1 / 255
"""Least standard deviation that is reported: a channel that never changes must not be divided by zero."""


@dataclass(frozen=True)
class Duplicates:
    """Images that occur more than once, by their numbers in the spool."""

    exact: ExactDuplicates
    near: list[Match]


def normalize(raw: Path, result: Path, *, params: NormalizeParams) -> dict[str, Any]:
    """Make the folder `result` (arrays and `dataset.json`) from the folder `raw`; returns the description.

    Work goes on in a folder beside `result`, which takes its place whole; on failure the old one stays as it was.
    Raises UserError: see `open_source`, `check_unreadable` and `draw_splits`.
    """
    source = open_source(raw, params=params)
    md5: dict[str, str] = {}
    with replace_folder(result, known=md5) as folder, Spool(result.parent) as spool:
        with progress("normalize", total=source.num_files, unit="images") as advance:
            for block in source.blocks:
                spool.add(block)
                advance(len(block.names) + len(block.unreadable))
        spool.unreadable += source.undecodable_files
        check_unreadable(spool, params=params)
        splits = draw_splits(spool, class_names=source.class_names, params=params)
        description = _write(folder, spool, splits, source=source, params=params)
        description["ignored_files"] = source.ignored_files
        md5 |= description["md5"]
        write_json(folder / "dataset.json", description)
    return description


def check_unreadable(spool: Spool, *, params: NormalizeParams) -> None:
    """Raises UserError if more than params.max_unreadable_fraction of the files could not be read."""
    unreadable = len(spool.unreadable)
    files = unreadable + len(spool.labels)
    if unreadable > params.max_unreadable_fraction * files:
        first = ", ".join(f"{name} ({reason})" for name, reason in spool.unreadable[:3])
        more = f" and {unreadable - 3} more" if unreadable > 3 else ""
        raise UserError(
            f"normalize.max_unreadable_fraction: {unreadable} of {files} files ({unreadable / files:.2%}) cannot be "
            f"read: {first}{more}; allowed: {params.max_unreadable_fraction:.2%}; mend or remove them, or raise it"
        )


def find_duplicates(spool: Spool, splits: Mapping[str, Indices], *, params: NormalizeParams) -> Duplicates:
    """Identical images in all splits, and images of test nearly like one in train or validation."""
    others = np.sort(np.concatenate([splits["train"], splits["validation"]]))
    passes = math.ceil(len(splits["test"]) / TEST_ROWS)
    with progress("near-duplicates", total=passes * len(others), unit="images") as advance:

        def blocks() -> FeatureBlocks:
            for indices, values in spool.feature_blocks(others):
                yield indices, values
                advance(len(indices))

        test = spool.feature_blocks(splits["test"])
        near = near_duplicates(test, blocks, correlation=params.near_duplicate_correlation)
    return Duplicates(exact_duplicates(spool.digests, splits, examples=EXAMPLES), near)


def mean_and_deviation(blocks: Iterable[Images]) -> tuple[list[float], list[float]]:
    """Per channel, of pixels / 255, over all images; from exact sums, so that blocks and machine do not matter."""
    counts: npt.NDArray[np.int64] | int = 0
    for block in blocks:
        channels = [np.bincount(block[..., channel].ravel(), minlength=256) for channel in range(block.shape[-1])]
        counts = counts + np.stack(channels).astype(np.int64)
    moments = [_moments(histogram) for histogram in np.atleast_2d(counts).tolist()]
    return [mean for mean, _ in moments], [max(deviation, MIN_DEVIATION) for _, deviation in moments]


def _moments(histogram: list[int]) -> tuple[float, float]:
    """Mean and standard deviation of value / 255 from how often each value occurs; Python's integers are exact."""
    total = sum(histogram)
    first = sum(value * count for value, count in enumerate(histogram))
    second = sum(value * value * count for value, count in enumerate(histogram))
    return first / (255 * total), math.sqrt((total * second - first * first) / (255 * total) ** 2)


def _write(
    folder: Path, spool: Spool, splits: dict[str, Indices], *, source: Source, params: NormalizeParams
) -> dict[str, Any]:
    """The arrays, and what `dataset.json` says of them; pixels and features are read side by side."""
    labels, stopped = spool.labels, Event()
    with ThreadPoolExecutor(1) as pool:
        arrays = pool.submit(_write_arrays, folder, spool, splits, stopped)
        try:
            duplicates = find_duplicates(spool, splits, params=params)
        except BaseException:  # Ctrl-C, for one, need not wait for the arrays
            stopped.set()
            raise
    md5, (mean, deviation) = arrays.result()
    return {
        "dataset": source.dataset,
        "class_names": list(source.class_names),
        "image_size": params.image_size,
        "channels": source.channels,
        "resize": params.resize,
        "mean": mean,
        "std": deviation,
        "counts": {split: _counts(labels[indices], source.class_names) for split, indices in splits.items()},
        "md5": md5,
        "unreadable_files": [{"file": name, "reason": reason} for name, reason in spool.unreadable],
        **_describe(duplicates, spool, splits, params=params),
    }


def _write_arrays(
    folder: Path, spool: Spool, splits: Mapping[str, Indices], stopped: Event
) -> tuple[dict[str, str], tuple[list[float], list[float]]]:
    """MD5 of each file, and mean and deviation of the training split, unless it is stopped."""

    def pixels(split: str) -> Iterator[Images]:
        for block in spool.pixel_blocks(splits[split]):
            if stopped.is_set():
                raise InterruptedError
            yield block

    labels, md5 = spool.labels, {}
    for split, indices in splits.items():
        shape = (len(indices), *spool.shape)
        images, targets = f"{split}_images.npy", f"{split}_labels.npy"
        md5[images] = write_array(folder / images, pixels(split), shape=shape, dtype=np.uint8)
        md5[targets] = write_array(folder / targets, [labels[indices]], shape=shape[:1], dtype=np.int64)
    return md5, mean_and_deviation(pixels("train"))


def _counts(labels: Labels, class_names: tuple[str, ...]) -> dict[str, int]:
    return dict(zip(class_names, np.bincount(labels, minlength=len(class_names)).tolist(), strict=True))


def _describe(
    found: Duplicates, spool: Spool, splits: Mapping[str, Indices], *, params: NormalizeParams
) -> dict[str, Any]:
    exact, near = found.exact, found.near
    likest = sorted(near, key=lambda match: (-match.correlation, match.test))[:EXAMPLES]
    test = np.union1d(exact.test, np.array([match.test for match in near], np.int64))
    return {
        "exact_duplicates": {
            "within": exact.within,
            "across": exact.across,
            "examples": [[spool.name(first), spool.name(later)] for first, later in exact.pairs],
        },
        "near_duplicates": {
            "correlation": params.near_duplicate_correlation,
            "test_images_with_one_in_train": len(near),
            "examples": [[spool.name(m.test), spool.name(m.other), round(m.correlation, 4)] for m in likest],
        },
        "test_duplicates": np.searchsorted(splits["test"], test).tolist(),
    }


def report(description: Mapping[str, Any]) -> str:
    """The data in a few lines: a table of counts, then what was found wrong."""
    counts = description["counts"]
    rows = {name: [counts[split][name] for split in SPLITS] for name in description["class_names"]}
    total = ("all", [sum(counts[split].values()) for split in SPLITS])
    if len(rows) > 10:
        smallest, largest = (pick(rows, key=lambda name: sum(rows[name])) for pick in (min, max))
        rows = {f"{name} ({word})": rows[name] for name, word in ((smallest, "fewest"), (largest, "most"))}
        total = (f"all {len(description['class_names'])} classes", total[1])
    width = max(len(name) for name in ("class", total[0], *rows))
    table = [f"{'class':{width}}  {'  '.join(f'{split:>10}' for split in SPLITS)}"]
    table += [f"{name:{width}}  {'  '.join(f'{count:>10,}' for count in row)}" for name, row in [*rows.items(), total]]
    return "\n".join([*table, *_findings(description)])


def _findings(description: Mapping[str, Any]) -> list[str]:
    exact, near = description["exact_duplicates"], description["near_duplicates"]
    unreadable, ignored = description["unreadable_files"], description["ignored_files"]
    first = f" (first: {unreadable[0]['file']}: {unreadable[0]['reason']})" if unreadable else ""
    num_test = sum(description["counts"]["test"].values())
    found = near["test_images_with_one_in_train"]
    return [
        f"unreadable files: {len(unreadable)}{first}; files that are no images: {len(ignored)}",
        f"exact duplicates within splits: {_listed(exact['within'])}; across: {_listed(exact['across'])}",
        f"test images nearly like one in train or validation: {found} of {num_test:,} ({found / num_test:.2%}) "
        f"at correlation {near['correlation']:g}",
    ]


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def main() -> None:
    """The step `normalize`: artifacts/download to artifacts/normalize, by params.yaml."""
    with report_errors():
        verify(DOWNLOAD)
        print(report(normalize(DOWNLOAD, NORMALIZE, params=load_params().normalize)))


if __name__ == "__main__":
    main()
