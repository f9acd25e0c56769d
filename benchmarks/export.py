"""Train our networks for a short time, export each to both formats, and print how the exports compare.

`python -m benchmarks.export [NETWORK…] [--images FOLDER]` runs the steps of the pipeline and `pipeline.export` in a
clone of the commit that is checked out. Without a folder, the images are the digits of scikit-learn; a folder has one
sub-folder of photographs, 200 or more together, for each class, and they are also compared from the file to the class.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.results import ON_CPU, run, set_params
from benchmarks.setting import clone, scratch
from benchmarks.table import header, table
from pipeline.artifacts import HISTORY, SELECTED_COLUMN, TRAIN, read_csv, read_json
from pipeline.core.errors import report_errors

STEPS = ("download", "normalize", "train")
FORMATS = ("onnx", "torch")
# by name: the recipe and its overrides
NETWORKS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "lenet": ("digits", ("train.epochs=5",)),
    "airbench": ("digits", ("train.model=airbench", "train.epochs=2")),
    "resnet18": ("digits", ("train.model=resnet18", "train.epochs=2")),
    "my_images": ("my_images", ()),
}
HEADING = (
    "network",
    "validation accuracy",
    "format",
    "MB: original, export",
    "ms for 1 image",
    "ms for 64",
    "largest difference",
    "another class",
    "photographs with the same class",
)


def measure(folder: Path, name: str, *, images: Path | None) -> list[list[str]]:
    """Train a network in the clone and export it; return the rows of the table, one for each format."""
    recipe, changes = NETWORKS[name]
    source = [f"download.folder={images}", "download.dataset=imagefolder"] if images else ["download.dataset=digits"]
    set_params(folder, recipe, [*ON_CPU, *source, *changes])
    for step in STEPS:
        run(f"pipeline.{step}", folder=folder)
    [selected] = [row for row in read_csv(folder / TRAIN / HISTORY) if row[SELECTED_COLUMN]]
    accuracy = float(selected["validation_accuracy"])
    photographs = ["--photographs", str(images)] if images else []
    rows = []
    for to in FORMATS:
        output = Path("exports") / name / to
        run("pipeline.export", "--to", to, "--output", str(output), *photographs, folder=folder)
        rows.append(_row(read_json(folder / output / "export.json"), accuracy=accuracy))
    return rows


def _row(found: Mapping[str, Any], *, accuracy: float) -> list[str]:
    """Return the row of the table for a description of an export, `export.json`."""
    verification, photographs = found["verification"], found["photographs"]
    return [
        found["network"],
        f"{accuracy:.1%}",
        found["format"],
        ", ".join(f"{size / 1e6:.2f}" for size in found["bytes"].values()),
        *(_milliseconds(seconds) for seconds in found["median_seconds"].values()),
        f"{verification['largest_difference']:.1e}",
        f"{verification['num_other_class']} of {verification['num_clear']} clear of {verification['num_images']}",
        f"{photographs['num_same_class']} of {photographs['num_compared']}" if photographs else "not compared",
    ]


def _milliseconds(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{value * 1000:.2f}" for value in seconds.values())


def main() -> None:
    """Measure the networks, one after another, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", choices=[*NETWORKS, []], metavar="NETWORK", help="default: all")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="a folder of photographs for each class")
    options = parser.parse_args()
    rows = [list(HEADING)]
    with scratch() as folder:
        clone(Path(folder) / "clone")
        for name in options.networks or NETWORKS:
            rows += measure(Path(folder) / "clone", name, images=options.images.resolve() if options.images else None)
    print(f"{header(seeds='0')}\n{table(rows)}")


if __name__ == "__main__":
    with report_errors():
        main()
