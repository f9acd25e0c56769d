"""Train a recipe with many seeds, and keep each model's probabilities for the validation and the test split.

`python -m benchmarks.population RECIPE [RECIPE …] --seeds N --out FOLDER [--arrays FOLDER | --packed FILE]` trains on
the arrays of a folder (default: artifacts/normalize), or of a file of `benchmarks.gpu.pack`, on a GPU where there is
one. For each model, the folder gets the file `<recipe>-<seed>.npz` with `validation_probabilities` and
`test_probabilities`, (N, num_classes) float16, calibrated by the temperature as in the step train, with `accuracy` on
the test split and `seconds`. `labels.npz` has `validation_labels` and `test_labels`, (N,) uint8 or uint16, and
`class_names`. Models that are there are not trained again, and none is begun after `--minutes`. `benchmarks.levels`
and `benchmarks.promotion` draw from such a folder. It needs the packages that `benchmarks.gpu` needs.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.images import unpack
from benchmarks.recipe import BATCH_SIZE, load
from pipeline.arrays import DatasetInfo
from pipeline.artifacts import NORMALIZE, read_split
from pipeline.core.errors import UserError, report_errors
from pipeline.models.inference import logits_of, probabilities_of
from pipeline.params import Params, check_params
from pipeline.recipes import compose, parse_overrides
from pipeline.training.loop import train
from pipeline.training.temperature import fit_temperature

KEPT_SPLITS = ("validation", "test")
LABELS = "labels.npz"


def train_seed(recipe: str, overrides: Mapping[str, Any], *, arrays: Path) -> dict[str, Any]:
    """Train one model; return seconds, test accuracy, and the calibrated probabilities of the kept splits."""
    params: Params = check_params(compose(recipe, overrides), origin=recipe)
    classifier, splits = load(params.train, arrays)
    classifier.to(splits["train"].labels.device)
    start = time.perf_counter()
    result = train(classifier, params=params.train, train_split=splits["train"], validation_split=splits["validation"])
    seconds = time.perf_counter() - start
    logits = {}
    for weights in ("last", "best"):
        classifier.load_state_dict(getattr(result, weights))
        logits[weights] = {
            name: logits_of(classifier, splits[name], batch_size=BATCH_SIZE).cpu() for name in KEPT_SPLITS
        }
    temperature = fit_temperature(logits["best"]["validation"].numpy(), splits["validation"].labels.cpu().numpy())
    kept = {
        f"{name}_probabilities": probabilities_of(values, temperature=temperature).astype(np.float16)
        for name, values in logits[params.evaluate.checkpoint].items()
    }
    accuracy = (logits[params.evaluate.checkpoint]["test"].argmax(1) == splits["test"].labels.cpu()).double().mean()
    return {"seconds": seconds, "accuracy": accuracy.item(), **kept}


def train_all(arguments: argparse.Namespace, arrays: Path) -> int:
    """Train what is missing, in several processes; return the number of models that are in the folder at the end."""
    out, deadline = arguments.out, time.monotonic() + 60 * arguments.minutes
    wanted = [
        (recipe, seed, out / f"{recipe}-{seed}.npz") for seed, recipe in product(arguments.seeds, arguments.recipes)
    ]
    missing = iter([each for each in wanted if not each[-1].exists()])
    overrides = {"train.cpu_threads": arguments.threads, **parse_overrides(arguments.overrides)}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=context) as pool:
        running = {}

        def begin() -> None:
            """Begin the next model if there is time."""
            following = next(missing, None) if time.monotonic() < deadline else None
            if following:
                recipe, seed, path = following
                changes = {**overrides, "train.seed": seed}
                running[pool.submit(train_seed, recipe, changes, arrays=arrays)] = path

        for _ in range(arguments.processes):
            begin()
        while running:
            done = next(as_completed(running))
            path, found = running.pop(done), done.result()
            save(path, found)
            print(f"{path.stem}: {found['accuracy']:.2%} in {found['seconds']:.1f} s", flush=True)
            begin()
    return sum(path.exists() for *_, path in wanted)


def save(path: Path, values: dict[str, Any]) -> None:
    """Write arrays to a compressed file, which appears only when it is complete."""
    temporary = path.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, **values)
    temporary.replace(path)


def save_labels(arrays: Path, out: Path) -> None:
    """Write the labels of the kept splits; raises UserError where the folder has the models of other images."""
    names = DatasetInfo.read(arrays).class_names
    kind = np.uint8 if len(names) <= 256 else np.uint16
    values = {f"{name}_labels": read_split(name, folder=arrays)[1].astype(kind) for name in KEPT_SPLITS}
    path = out / LABELS
    if path.exists():
        with np.load(path) as before:
            if any(not np.array_equal(before[name], labels) for name, labels in values.items()):
                raise UserError(
                    f"{path}: the labels are of other images; allowed: those of {arrays}; name another --out"
                )
    save(path, {**values, "class_names": np.array(names)})


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.population",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipes", nargs="+", metavar="RECIPE")
    parser.add_argument("--seeds", type=int, required=True, metavar="N", help="train the seeds 0 to N - 1")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--arrays", type=Path, default=NORMALIZE, metavar="FOLDER", help="default: %(default)s")
    source.add_argument("--packed", type=Path, metavar="FILE", help="of python -m benchmarks.gpu.pack")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="trainings at a time; default: 1")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of each training; default: 2")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", dest="overrides")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no training after this time")
    arguments = parser.parse_args()
    arguments.seeds = range(arguments.seeds)
    return arguments


def main() -> int:
    """Train the models; return the exit status, which is 1 if the time was too short for all."""
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with ExitStack() as stack:
        arrays = arguments.arrays
        if arguments.packed:
            arrays = Path(stack.enter_context(tempfile.TemporaryDirectory()), "arrays")
            unpack(arguments.packed, arrays)
        save_labels(arrays, arguments.out)
        number = train_all(arguments, arrays)
    wanted = len(arguments.seeds) * len(arguments.recipes)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
    print(f"{number} of {wanted} models in {arguments.out}, after {time.monotonic() - start:.0f} s on {device}")
    return 0 if number == wanted else 1


if __name__ == "__main__":
    with report_errors():
        sys.exit(main())
