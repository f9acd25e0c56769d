"""Measure the test accuracy of recipes over seeds, on the CPU; compare the models with docs/results.json.

`python -m benchmarks.results [RECIPE …] [--seeds N] [--images FOLDER] [--set SECTION.FIELD=VALUE] [--write]` runs the
pipeline's own steps in a clone of the commit that is checked out: download and normalize once for a recipe, train and
evaluate once for a seed. `make results` does the same. It prints a table, writes it to .cache/benchmarks/results.md and
.json, and ends with status 1 where a model is not the one of docs/results.json. With `--write` it does not compare, but
writes the figures into docs/, README.md and the recipes' heads. After a kill the same command resumes at the first seed
that is not done. CIFAR-10 is packed from its JPEG images (see benchmarks/cifar10.py); without them its recipes are
skipped.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks.cifar10 import ARCHIVE, add_images, archive_overrides, prepare_apart
from benchmarks.published import (
    RESULTS,
    RecipeResult,
    Results,
    SeedResult,
    publish,
    read_results,
    report,
    write_results,
)
from benchmarks.setting import PROJECT, check_is_committed, clone, positive, scratch, timed
from benchmarks.table import mean_and_deviation, setting
from benchmarks.ways import CIFAR10
from pipeline.arrays import DatasetInfo
from pipeline.artifacts import (
    BEST_WEIGHTS,
    EVALUATE,
    NORMALIZE,
    TRAIN,
    bytes_md5,
    file_md5,
    read_json,
    write_json,
    write_text,
)
from pipeline.core.errors import report_errors
from pipeline.core.git import git
from pipeline.params import PARAMS_FILE, check_params, load_params
from pipeline.recipes import compose, parse_overrides

RECIPES = ("digits", "cifar10_tutorial", "cifar10_lenet")
SEEDS = 5
ON_CPU = ("train.device=cpu", "evaluate.device=cpu")
# holds a folder for each recipe with a file for each finished seed; deleted when all are finished
FINISHED_SEEDS = CIFAR10.parent / "seeds"
# removed from the environment: the runs belong into the store of the clone, and the code is that of the clone
REMOVED_VARIABLES = ("MLFLOW_TRACKING_URI", "PYTHONPATH")


def run(*arguments: str, folder: Path) -> float:
    """Run a module in the clone; return its seconds."""
    return timed(sys.executable, "-m", *arguments, cwd=folder, without=REMOVED_VARIABLES)[0]


def set_params(folder: Path, recipe: str, overrides: Sequence[str]) -> None:
    """Write a recipe and overrides (`section.field=value`) into the clone's parameters."""
    options = [argument for value in overrides for argument in ("--set", value)]
    run("pipeline.recipes", "--recipe", recipe, *options, folder=folder)


def measure_recipe(folder: Path, recipe: str, overrides: Sequence[str], *, seeds: int) -> RecipeResult:
    """Run the steps in the clone for each seed, print a line for each, and return the result."""
    set_params(folder, recipe, overrides)
    for step in ("download", "normalize"):
        run(f"pipeline.{step}", folder=folder)
    found = []
    for seed in range(seeds):
        set_params(folder, recipe, [*overrides, f"train.seed={seed}"])
        found.append(measured_once(folder, recipe, seed))
        print(f"{recipe}, seed {seed}: {found[-1].accuracy:.2%} in {found[-1].train_seconds:.1f} s", flush=True)
    info = DatasetInfo.read(folder / NORMALIZE)
    return RecipeResult(
        seeds=tuple(found),
        test_images=sum(info.counts["test"].values()),
        test_duplicates=len(info.test_duplicates),
        setting=setting() | {"commit": git(folder, "rev-parse", "--short", "HEAD"), "kernels": kernels(folder)},
    )


def kernels(folder: Path) -> str:
    """Return the value of train.cpu_kernels, and which instruction set native kernels use on this CPU."""
    chosen = load_params(folder / PARAMS_FILE).train.cpu_kernels
    return f"{chosen} (native here: {torch.backends.cpu.get_cpu_capability()})"


def measured_once(folder: Path, recipe: str, seed: int) -> SeedResult:
    """Return the result of a seed; train only if no killed run has saved it for the same commit, versions and CPU."""
    params = (folder / PARAMS_FILE).read_text(encoding="utf-8")
    determinants = [git(folder, "rev-parse", "HEAD"), params, setting()["CPU"], setting()["versions"]]
    done = FINISHED_SEEDS / recipe / f"{bytes_md5(json.dumps(determinants).encode())}.json"
    if not done.exists():
        write_json(done, asdict(measure(folder, seed)))
    return SeedResult(**read_json(done))


def measure(folder: Path, seed: int) -> SeedResult:
    """Train and evaluate with the parameters in the clone."""
    seconds = run("pipeline.train", folder=folder)
    run("pipeline.evaluate", folder=folder)
    metrics = read_json(folder / EVALUATE / "metrics.json")
    return SeedResult(
        seed=seed,
        accuracy=metrics["accuracy"],
        accuracy_without_duplicates=metrics["accuracy_without_duplicates"],
        train_seconds=round(seconds, 2),
        model_md5=file_md5(folder / TRAIN / BEST_WEIGHTS),
    )


def compare(found: Results, published: Results) -> bool:
    """Print for each recipe whether its models are the published ones; return whether all are."""
    same = True
    for recipe, result in found.items():
        expected = published.get(recipe)
        if expected and all(expected.models.get(seed, md5) == md5 for seed, md5 in result.models.items()):
            print(f"{recipe}: the same models, seed by seed, as in {RESULTS}")
            continue
        same = False
        published_models = summarize(expected) if expected else "none"
        print(f"{recipe}: other models here, {summarize(result)}; in {RESULTS} {published_models}")
    if not same:
        print("to publish other models, run `python -m benchmarks.results --write`, which measures again")
    return same


def summarize(result: RecipeResult) -> str:
    """Return accuracy, CPU and kernels as text."""
    return ", ".join([mean_and_deviation(result.accuracies, ".2%"), result.setting["CPU"], result.setting["kernels"]])


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.results",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipes", nargs="*", default=RECIPES, metavar="RECIPE", help=f"default: {', '.join(RECIPES)}")
    parser.add_argument("--seeds", type=positive, default=SEEDS, metavar="N", help=f"from 0; default: {SEEDS}")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", dest="overrides")
    parser.add_argument("--write", action="store_true", help="write docs/, README.md and the recipes' heads")
    add_images(parser)
    arguments = parser.parse_args()
    if arguments.write and (arguments.overrides or arguments.seeds < SEEDS):
        parser.error(f"--write: allowed without --set and with {SEEDS} seeds or more; leave it out for a trial")
    return arguments


def dataset_of(recipe: str, overrides: Sequence[str]) -> str:
    """Return the data set of a recipe; raises UserError where there is no such recipe or a value is not allowed."""
    values = compose(recipe, parse_overrides(overrides))
    return check_params(values, origin=recipe).download.dataset


def measure_all(arguments: argparse.Namespace) -> dict[str, RecipeResult]:
    """Measure all recipes, except those whose images are missing."""
    datasets = {recipe: dataset_of(recipe, arguments.overrides) for recipe in arguments.recipes}
    if arguments.images is None and not ARCHIVE.is_file():
        for recipe in [recipe for recipe, dataset in datasets.items() if dataset == "cifar10"]:
            print(f"{recipe}: skipped, as there are no images of CIFAR-10; name them: --images FOLDER", flush=True)
            del datasets[recipe]
    if datasets:
        check_is_committed()
    if "cifar10" in datasets.values():
        print(f"images of CIFAR-10: {arguments.images or ARCHIVE}", flush=True)
        prepare_apart(arguments.images)
    found = {}
    for recipe, dataset in datasets.items():
        overrides = [*ON_CPU, *(archive_overrides() if dataset == "cifar10" else []), *arguments.overrides]
        with scratch() as folder:
            clone(Path(folder) / "clone")
            result = measure_recipe(Path(folder) / "clone", recipe, overrides, seeds=arguments.seeds)
        found[recipe] = replace(result, setting={**result.setting, "command": command(recipe, arguments)})
    return found


def command(recipe: str, arguments: argparse.Namespace) -> str:
    """Return the command for one recipe, without the folder of the images."""
    options = [f"--seeds {arguments.seeds}", *(f'--set "{value}"' for value in arguments.overrides)]
    return f"`python -m benchmarks.results {' '.join([recipe, *options])}`"


def main() -> int:
    """Measure, print, and compare or write; return the exit status."""
    arguments = parse_arguments()
    found = measure_all(arguments)
    if not found:
        return 0
    text = report(found)
    print(f"\n{text}\n")
    write_text(CIFAR10.parent / "results.md", f"{text}\n")
    write_results(found, CIFAR10.parent / "results.json")
    published = read_results() if (PROJECT / RESULTS).exists() else {}
    if arguments.write:
        publish(published | found)
    status = 0 if arguments.write or arguments.overrides or compare(found, published) else 1
    for recipe in found:
        shutil.rmtree(FINISHED_SEEDS / recipe, ignore_errors=True)
    with suppress(OSError):  # another recipe has finished seeds in it
        FINISHED_SEEDS.rmdir()
    return status


if __name__ == "__main__":
    with report_errors():
        sys.exit(main())
