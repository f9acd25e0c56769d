"""Normalize, the second step: convert raw images to uint8 arrays of one size, draw the splits, and report on the data.

The decoded images are kept in temporary files beside the result, which need as much space again as the arrays. About
60 bytes for each image are held in memory, and up to 200 while the splits are drawn.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artifacts import DOWNLOAD, NORMALIZE, Labels, replace_folder, write_array, write_json
from pipeline.core.errors import UserError, report_errors
from pipeline.core.progress import progress
from pipeline.datasets.source import Source
from pipeline.datasets.sources import open_source
from pipeline.images.data_report import report
from pipeline.images.duplicate_search import describe_duplicates, find_duplicates
from pipeline.images.duplicates import Indices
from pipeline.images.splits import draw_splits
from pipeline.images.spool import Spool
from pipeline.images.statistics import mean_and_deviation
from pipeline.params import NormalizeParams, load_params
from pipeline.parquet import files_path, write_files

ROWS_PER_GROUP = 2**16  # of the Parquet files with the names of images


def normalize(raw: Path, result: Path, *, params: NormalizeParams) -> dict[str, Any]:
    """Write the arrays and `dataset.json` of the raw data in `raw` to the folder `result`; return the description.

    `<split>_files.parquet` has the name and the content hash of each image, in the order of the arrays.
    The new files replace an old `result` when they are complete; on failure the old one stays as it was. Raises
    UserError as `open_source`, `check_unreadable` and `draw_splits` do.
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
        duplicates = find_duplicates(spool, params=params)
        splits = draw_splits(spool, duplicates.groups, class_names=source.class_names, params=params)
        description = {
            **_describe(spool, splits, source=source, params=params),
            **_write_arrays(folder, spool, splits),
            **describe_duplicates(duplicates, spool, splits, params=params),
        }
        for split, indices in splits.items():
            write_files(files_path(split, folder=folder), _names_and_hashes(spool, indices))
        md5 |= description["md5"]
        write_json(folder / "dataset.json", description)
    return description


def check_unreadable(spool: Spool, *, params: NormalizeParams) -> None:
    """Raise UserError if more than params.max_unreadable_fraction of the files could not be read."""
    unreadable = len(spool.unreadable)
    files = unreadable + len(spool.labels)
    if unreadable > params.max_unreadable_fraction * files:
        first = ", ".join(f"{name} ({reason})" for name, reason in spool.unreadable[:3])
        more = f" and {unreadable - 3} more" if unreadable > 3 else ""
        raise UserError(
            f"normalize.max_unreadable_fraction: {unreadable} of {files} files ({unreadable / files:.2%}) cannot be "
            f"read: {first}{more}; allowed: {params.max_unreadable_fraction:.2%}; repair or remove them, or raise the "
            "allowed fraction"
        )


def _describe(
    spool: Spool, splits: Mapping[str, Indices], *, source: Source, params: NormalizeParams
) -> dict[str, Any]:
    """Return the fields of `dataset.json` that depend on neither the pixels nor the duplicates."""
    return {
        "dataset": source.dataset,
        "class_names": list(source.class_names),
        "image_size": params.image_size,
        "channels": source.channels,
        "resize": params.resize,
        "counts": {
            split: _class_counts(spool.labels[indices], source.class_names) for split, indices in splits.items()
        },
        "unreadable_files": [{"file": name, "reason": reason} for name, reason in spool.unreadable],
        "ignored_files": list(source.ignored_files),
    }


def _write_arrays(folder: Path, spool: Spool, splits: Mapping[str, Indices]) -> dict[str, Any]:
    """Write the arrays; return the MD5 of each file, and mean and standard deviation of the train split by channel."""
    labels, md5 = spool.labels, {}
    for split, indices in splits.items():
        shape = (len(indices), *spool.shape)
        images, targets = f"{split}_images.npy", f"{split}_labels.npy"
        md5[images] = write_array(folder / images, spool.pixel_blocks(indices), shape=shape, dtype=np.uint8)
        md5[targets] = write_array(folder / targets, [labels[indices]], shape=shape[:1], dtype=np.int64)
    mean, deviation = mean_and_deviation(spool.pixel_blocks(splits["train"]))
    return {"md5": md5, "mean": mean, "std": deviation}


def _names_and_hashes(spool: Spool, indices: Indices) -> Iterator[tuple[list[str], list[int]]]:
    """Yield names and content hashes of the images with these indices, in blocks."""
    hashes = spool.content_hashes
    for start in range(0, len(indices), ROWS_PER_GROUP):
        block = indices[start : start + ROWS_PER_GROUP]
        yield [spool.name(index) for index in block], hashes[block].tolist()


def _class_counts(labels: Labels, class_names: tuple[str, ...]) -> dict[str, int]:
    return dict(zip(class_names, np.bincount(labels, minlength=len(class_names)).tolist(), strict=True))


def main() -> None:
    """Run the step on `params.yaml`: `artifacts/download/` → `artifacts/normalize/`."""
    with report_errors():
        print(report(normalize(DOWNLOAD, NORMALIZE, params=load_params().normalize)))


if __name__ == "__main__":
    main()
