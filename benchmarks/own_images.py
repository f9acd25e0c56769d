"""Compare ways to train on a folder of photographs: the recipes for own images, and training from nothing.

`python -m benchmarks.own_images FOLDER [SEEDS] [--way NAME]` runs the steps of the pipeline on a folder with one folder
for each class and without splits: the seeds 0, 1, … draw them too. It prints the test accuracy and the seconds of all
steps. Every run starts without kept features.
"""

import argparse
import shutil
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.results import ON_CPU, run, set_params
from benchmarks.setting import clone, positive, scratch
from benchmarks.table import header, mean_and_deviation, table
from pipeline.artifacts import EVALUATE, read_json
from pipeline.core.errors import report_errors

SEEDS = 5
FROM_NOTHING = (
    "train.weights=null",
    "train.layer_decay=1.0",
    "train.head_learning_rate_factor=1.0",
    "train.epochs=12",
    "normalize.image_size=64",
    "train.input_size=64",
)
# by name: the recipe and its overrides
WAYS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "frozen (my_images)": ("my_images", ()),
    "fine-tuned (my_images_finetune)": ("my_images_finetune", ()),
    "from nothing, same network, 12 epochs at 64 pixels": ("my_images_finetune", FROM_NOTHING),
    "from nothing, ResNet-18, 12 epochs at 64 pixels": (
        "my_images_finetune",
        (*FROM_NOTHING, "train.model=resnet18", "train.learning_rate=0.0003", "train.weight_decay=0.01"),
    ),
}
STEPS = ("download", "normalize", "train", "evaluate")


def measure(folder: Path, way: str, *, images: Path, seed: int) -> tuple[float, float]:
    """Run all steps in the clone; return the test accuracy, and the seconds of the steps together."""
    recipe, changes = WAYS[way]
    seeds = (f"normalize.seed={seed}", f"train.seed={seed}")
    set_params(folder, recipe, [*ON_CPU, f"download.folder={images}", *changes, *seeds])
    shutil.rmtree(folder / ".cache" / "features", ignore_errors=True)
    seconds = sum(run(f"pipeline.{step}", folder=folder) for step in STEPS)
    return read_json(folder / EVALUATE / "metrics.json")["accuracy"], seconds


def main() -> None:
    """Measure all ways with all seeds, in turn, and print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.own_images",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", type=Path, metavar="FOLDER")
    parser.add_argument("seeds", nargs="?", type=positive, default=SEEDS, help=f"how many; default: {SEEDS}")
    parser.add_argument("--way", choices=WAYS, action="append", help="measure only this one; may be repeated")
    arguments = parser.parse_args()
    ways = arguments.way or list(WAYS)
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    with scratch() as folder:
        clone(Path(folder) / "clone")
        for seed in range(arguments.seeds):
            for way in ways:
                result = measure(Path(folder) / "clone", way, images=arguments.images.resolve(), seed=seed)
                found[way].append(result)
                print(f"{way}, seed {seed}: {result[0]:.2%} in {result[1]:.1f} s", file=sys.stderr, flush=True)
    rows = [["way", "test accuracy", "seconds of all steps (median)"]]
    for way, results in found.items():
        accuracies, seconds = zip(*results, strict=True)
        rows.append([way, mean_and_deviation(accuracies, ".2%"), f"{statistics.median(seconds):.1f}"])
    print(f"{header(seeds=f'0 to {arguments.seeds - 1}, of the splits and of the training')}\n{table(rows)}")


if __name__ == "__main__":
    with report_errors():
        main()
