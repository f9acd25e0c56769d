"""Measure trainings on a GPU: seconds, accuracy, utilization, and the least possible time (the floor)."""

import shutil
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.images import DRY_COUNTS
from benchmarks.gpu.part import Emit, Setting
from benchmarks.recipe import SPLITS, accuracy_on, first_images, network
from pipeline.arrays import DatasetInfo, Split
from pipeline.core.settings import get_settings
from pipeline.models.build import Classifier
from pipeline.params import Params, check_params
from pipeline.recipes import compose
from pipeline.training.device import choose_device, prepare_torch
from pipeline.training.initialize import initialize_from_images
from pipeline.training.loop import train

RECIPE = "cifar10_fast94"
COMPILED_SEEDS = 3
DRY_SEEDS = 2
DRY_CHANGES = {"train.batch_size": 4, "train.epochs": 1, "train.cpu_threads": 1}
MATRIX_SIDE, MATRIX_REPEATS = 8192, 50
Splits = dict[str, Split]


class Recipe:
    """A recipe with its parameters and its data on the device; `train_once` trains it."""

    def __init__(self, name: str, *, setting: Setting, **changes: Any) -> None:
        values = {f"train.{key}": value for key, value in changes.items()} | (DRY_CHANGES if setting.dry else {})
        self.params: Params = check_params(compose(name, values), origin=name)
        self.device = choose_device("cpu" if setting.dry else "cuda", field="--dry")
        prepare_torch(self.params.train)  # before the first operation of PyTorch
        self.info = DatasetInfo.read(setting.arrays)
        self.splits: Splits = {
            name: Split.read(name, info=self.info, device=self.device, folder=setting.arrays) for name in SPLITS
        }
        if setting.dry:
            self.splits = {name: first_images(split, DRY_COUNTS[name]) for name, split in self.splits.items()}

    def wait(self) -> float:
        """Wait until the GPU has done all its work; return the time in seconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def train_once(self, seed: int, *, compiled: bool = False) -> dict[str, Any]:
        """Train and evaluate; return the seconds of each phase, accuracy, images per second by epoch and memory.

        The phase `training` includes validation, and writes no checkpoint. The evaluation uses another network that is
        not compiled, as in the step evaluate.
        """
        params = self.params.train.model_copy(update={"seed": seed, "compile": compiled, "device": self.device.type})
        prepare_torch(params)
        classifier, speeds = network(params, self.info), list[float]()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = self.wait()
        if params.model == "airbench":
            initialize_from_images(classifier, self.splits["train"], seed=seed)
        classifier.to(self.device)
        whitened = self.wait()
        trained = train(
            classifier,
            params=params,
            train_split=self.splits["train"],
            validation_split=self.splits["validation"],
            on_epoch=lambda _, speed: speeds.append(round(speed)),
        )
        end = self.wait()
        evaluated = network(params, self.info).to(self.device)
        evaluated.load_state_dict(trained.last)
        test_start = self.wait()
        accuracy = accuracy_on(self.splits["test"], evaluated, views=self.params.evaluate.test_time_augmentation)
        return {
            "whitening": whitened - start,
            "training": end - whitened,
            "evaluation": self.wait() - test_start,
            "accuracy": accuracy,
            "images_per_second": speeds,
            "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else None,
        }


def measure_fast94(setting: Setting, emit: Emit) -> None:
    """Emit a warm-up training, then utilization and floor, then a training for each seed until the time is over."""
    recipe = Recipe(RECIPE, setting=setting)
    emit(run="first", **recipe.train_once(0))
    start = time.monotonic()
    emit(run="0", **recipe.train_once(0))
    longest = time.monotonic() - start
    emit(run="profile", **_profile(recipe))
    seed = 1
    while time.monotonic() + 1.5 * longest < setting.deadline and not (setting.dry and seed >= DRY_SEEDS):
        start = time.monotonic()
        emit(run=str(seed), **recipe.train_once(seed))
        longest = max(longest, time.monotonic() - start)
        seed += 1


def measure_compile(setting: Setting, emit: Emit) -> None:
    """Emit trainings without and with train.compile; the first of each kind warms up, or compiles."""
    if not shutil.which(get_settings().cxx):
        emit(run="skipped", reason=f"no C++ compiler {get_settings().cxx}")
        return
    if setting.dry:
        torch.compiler.set_stance("force_eager")  # since compiling takes half a minute
    recipe = Recipe(RECIPE, setting=setting)
    for compiled in (False, True):
        emit(run="first", compiled=compiled, **recipe.train_once(0, compiled=compiled))
        for seed in range(1 if setting.dry else COMPILED_SEEDS):
            emit(run=str(seed), compiled=compiled, **recipe.train_once(seed, compiled=compiled))


def measure_resnet18(setting: Setting, emit: Emit) -> None:
    """Emit the images per second of each epoch; the weights are random, which does not change the speed."""
    recipe = Recipe("cifar10_resnet18", setting=setting, weights=None, epochs=3)
    emit(run="0", batch_size=recipe.params.train.batch_size, **recipe.train_once(0))


def _profile(recipe: Recipe) -> dict[str, Any]:
    """Return the utilization of the device in a training of one epoch, and the floor of a whole training.

    The utilization is the time in which kernels run, measured in a profiled training, divided by the time of a training
    that is not profiled. The floor is the time that the operations of a training take at the rate of a large matrix
    product in bfloat16.
    """
    params = recipe.params.train.model_copy(update={"epochs": 1, "device": recipe.device.type})
    prepare_torch(params)

    def run() -> float:
        """Train one epoch; return the seconds."""
        classifier = network(params, recipe.info).to(recipe.device)
        start = recipe.wait()
        train(
            classifier,
            params=params,
            train_split=recipe.splits["train"],
            validation_split=recipe.splits["validation"],
        )
        return recipe.wait() - start

    seconds = run()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if recipe.device.type == "cuda" else [])]
    with profile(activities=activities) as profiled:
        run()
    kind = recipe.device.type.upper()
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiled.events() or ()
        if event.device_type.name == kind
    ]
    rate = matrix_rate(recipe)
    images = recipe.params.train.epochs * len(recipe.splits["train"])
    floor = operations_per_image(network(params, recipe.info).to(recipe.device), device=recipe.device) * images / rate
    utilization = covered(spans) / 1e6 / seconds  # spans are in microseconds
    return {"utilization": utilization, "kernels": len(spans), "matrix_tflops": rate / 1e12, "floor_seconds": floor}


def covered(spans: list[tuple[float, float]]) -> float:
    """Return the total length that spans (start, end) cover; overlaps count once."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def matrix_rate(recipe: Recipe) -> float:
    """Return the operations per second of a large matrix product in bfloat16."""
    side, repeats = (MATRIX_SIDE, MATRIX_REPEATS) if recipe.device.type == "cuda" else (64, 2)
    matrix = torch.rand(side, side, device=recipe.device, dtype=torch.bfloat16)
    _ = matrix @ matrix  # warms up
    start = recipe.wait()
    for _ in range(repeats):
        _ = matrix @ matrix
    return 2 * side**3 * repeats / (recipe.wait() - start)


def operations_per_image(classifier: Classifier, *, device: torch.device) -> float:
    """Return the operations of one image, forward and backward; a multiplication and an addition count as two."""
    counter, number = FlopCounterMode(display=False), 8
    with counter:
        classifier(torch.zeros(number, 3, 32, 32, device=device)).sum().backward()
    return counter.get_total_flops() / number
