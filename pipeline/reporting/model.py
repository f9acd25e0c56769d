"""Describe the model of a report: its layers and parameters, its size, and how long it takes to classify images."""

import statistics
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pipeline.arrays import DatasetInfo
from pipeline.artifacts import BEST_WEIGHTS, TRAIN, Images, file_md5
from pipeline.core.errors import UserError
from pipeline.core.processes import cpu_name, num_cores
from pipeline.evaluation.predictions import Predictions
from pipeline.models.build import Classifier
from pipeline.models.config import ModelConfig, configure
from pipeline.models.cpu_kernels import use_cpu_kernels
from pipeline.models.files import load_config, load_model
from pipeline.models.freezing import apply_freezing
from pipeline.models.inference import class_probabilities
from pipeline.params import Params
from pipeline.reporting.data import PREDICTIONS

BATCH_SIZE = 64  # images of a batch whose latency is measured; fewer for a slow network
SECONDS = 0.35  # of measuring the latency of one image, and again of a batch
MAX_TIMES = 30


@dataclass(frozen=True)
class Latency:
    """The time in seconds from pixels to probabilities of a batch of images, median and shortest of several times."""

    images: int
    seconds: float
    shortest: float
    times: int


@dataclass(frozen=True)
class ModelFacts:
    """What is known about the model; `num_trained`, the parameters that were trained, is None if unknown."""

    config: ModelConfig
    md5: str
    checkpoint: str
    # number of layers and of their parameters by kind of layer, as in {"Conv2d": (2, 1234)}
    layers: Mapping[str, tuple[int, int]]
    num_parameters: int
    num_trained: int | None
    file_bytes: int
    latencies: tuple[Latency, ...]
    cpu: str
    threads: int

    @property
    def num_layers(self) -> int:
        """Return the number of layers that have parameters."""
        return sum(number for number, _ in self.layers.values())


def describe_model(params: Params, info: DatasetInfo, *, images: Images, predictions: Predictions) -> ModelFacts:
    """Load the evaluated model, check that the predictions are its own, and measure its latency on the CPU.

    Raises UserError where the model is missing or damaged, or where the predictions are those of another model.
    """
    config = load_config(TRAIN)
    use_cpu_kernels(config.cpu_kernels, field="model.json: cpu_kernels")
    torch.set_num_threads(num_cores())
    checkpoint = params.evaluate.checkpoint
    classifier, _ = load_model(TRAIN, checkpoint=checkpoint)
    weights = TRAIN / f"{checkpoint}.safetensors"
    md5 = file_md5(weights)
    _check_predictions(predictions, weights=weights, md5=md5)
    layers = _layers(classifier)
    return ModelFacts(
        config=config,
        md5=md5,
        checkpoint=checkpoint,
        layers=layers,
        num_parameters=sum(parameter.numel() for parameter in classifier.parameters()),
        num_trained=_num_trained(classifier, config, params=params, info=info),
        file_bytes=weights.stat().st_size,
        latencies=_latencies(classifier, config, images=images),
        cpu=cpu_name(),
        threads=torch.get_num_threads(),
    )


def _check_predictions(predictions: Predictions, *, weights: Path, md5: str) -> None:
    """Raise UserError where the predictions are those of other weights than these, or of unknown ones."""
    if predictions.weights_md5 != md5:
        raise UserError(
            f"{PREDICTIONS}: found predictions of weights of MD5 {predictions.weights_md5 or 'unknown'}; allowed: "
            f"those of {weights}, {md5}; run `dvc repro evaluate`, then make the report again"
        )


def _layers(classifier: Classifier) -> dict[str, tuple[int, int]]:
    """Return the number of layers with parameters, and of their parameters, by kind; the largest kind first."""
    numbers, sizes = Counter[str](), Counter[str]()
    for module in classifier.modules():
        if size := sum(parameter.numel() for parameter in module.parameters(recurse=False)):
            kind = type(module).__name__
            numbers[kind] += 1
            sizes[kind] += size
    return {kind: (numbers[kind], size) for kind, size in sizes.most_common()}


def _num_trained(classifier: Classifier, config: ModelConfig, *, params: Params, info: DatasetInfo) -> int | None:
    """Return the number of parameters that the training changes; None if `params.yaml` is for another network."""
    try:
        fitted = {"temperature": config.temperature, "thresholds": config.thresholds}
        if configure(params.train, info).model_copy(update=fitted) != config:
            return None
        apply_freezing(classifier, config=config, params=params.train)
    except UserError:
        return None
    return sum(parameter.numel() for parameter in classifier.parameters() if parameter.requires_grad)


def _latencies(classifier: nn.Module, config: ModelConfig, *, images: Images) -> tuple[Latency, ...]:
    """Return the latency of one image and of a batch; a batch of a slow network is smaller."""
    one = _latency(classifier, config, np.asarray(images[:1]))
    fitting = int(SECONDS / max(one.shortest, 1e-6))
    size = min(BATCH_SIZE, len(images), 2 ** max(1, fitting.bit_length() - 1))
    return one, _latency(classifier, config, np.asarray(images[:size]))


def _latency(classifier: nn.Module, config: ModelConfig, images: Images) -> Latency:
    """Measure the latency of a batch for about SECONDS, after two runs that are not counted."""
    for _ in range(2):
        class_probabilities(classifier, images, config=config)
    seconds, end = list[float](), time.perf_counter() + SECONDS
    while len(seconds) < 3 or (time.perf_counter() < end and len(seconds) < MAX_TIMES):
        start = time.perf_counter()
        class_probabilities(classifier, images, config=config)
        seconds.append(time.perf_counter() - start)
    return Latency(len(images), statistics.median(seconds), min(seconds), len(seconds))


def best_weights_md5() -> str:
    """Return the MD5 of the selected weights, by which MLflow's run of the model is found."""
    return file_md5(TRAIN / BEST_WEIGHTS)
