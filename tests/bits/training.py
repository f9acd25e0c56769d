"""Train networks for a few steps, evaluate them, and print the hashes of the results as JSON.

`python -m tests.bits.training portable|native NETWORK…` prints a line for each network with 1 and with 2 threads.
It imports little, since the import of PyTorch alone takes a minute on an emulated CPU.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from benchmarks.recipe import image_config
from pipeline.arrays import Split
from pipeline.artifacts import bytes_md5
from pipeline.core.yaml import read_yaml
from pipeline.evaluation.logits import predictions_of
from pipeline.evaluation.metrics import evaluate, prediction_rows
from pipeline.models.airbench import Airbench
from pipeline.models.build import Classifier, build, memory_format
from pipeline.models.freezing import apply_freezing
from pipeline.models.inference import trained_logits
from pipeline.params import TrainParams, check_params
from pipeline.training.device import prepare_torch
from pipeline.training.features import compute_features, select_trained, with_features
from pipeline.training.initialize import initialize_from_images
from pipeline.training.loop import train
from pipeline.training.temperature import fit_temperature

DEFAULTS = read_yaml(Path(__file__).parents[2] / "params.yaml")
CLASS_NAMES = tuple("abcdefghij")
NUM_EVALUATED = 20
MEAN = STD = (0.5, 0.25, 0.3)
# with another schedule, the learning rate of the only step would be near 0
CONSTANT = {"schedule": "constant", "warmup_fraction": 0.0}
# training goes over features; `weights` is only there to be allowed, as the random ones are kept
FROZEN = {"freeze": "backbone", "weights": "DEFAULT"}
# by name: the number of steps, and the parameters that differ from `params.yaml`
NETWORKS: Mapping[str, tuple[int, Mapping[str, Any]]] = {
    "lenet": (10, {"batch_size": 32, "flip": True}),
    "airbench": (2, {"batch_size": 16, "learning_rate": 0.1, "average_every_steps": 2, **CONSTANT}),
    "resnet18": (1, {"batch_size": 8, **CONSTANT}),
    "frozen": (2, {"model": "resnet18", "batch_size": 8, "crop_padding": 0, **FROZEN, **CONSTANT}),
}


@dataclass(frozen=True)
class Bits:
    """The hashes of a training's results, and the CPU as PyTorch sees it."""

    network: str
    threads: int
    cpu: str
    capability: str
    weights: str  # MD5 of parameters and buffers as safetensors
    evaluation: str  # MD5 of logits, metrics, predictions and temperature


def bits(network: str, *, kernels: str, threads: int) -> Bits:
    """Train the network on random images with the parameters in NETWORKS, and evaluate it on other images."""
    num_steps, changes = NETWORKS[network]
    params = _params({"model": network, **changes, "cpu_kernels": kernels, "cpu_threads": threads, "epochs": 1})
    prepare_torch(params)
    train_split = _random_split(num_steps * params.batch_size, seed=0)
    other_split = _random_split(NUM_EVALUATED, seed=1)
    config = image_config(params, class_names=CLASS_NAMES, mean=MEAN, std=STD)
    classifier = build(config)
    apply_freezing(classifier, config=config, params=params)
    if isinstance(classifier.network, Airbench):
        initialize_from_images(classifier, train_split, seed=params.seed)
    classifier.to(memory_format=memory_format(params))
    trained, splits = select_trained(classifier, train_split, params=params), [train_split, other_split]
    if trained is not classifier:
        splits = [_features(classifier, trained, split) for split in splits]
    train(trained, params=params, train_split=splits[0], validation_split=splits[1])
    logits = _logits(classifier.eval(), other_split)
    labels = other_split.labels.numpy()
    temperature = fit_temperature(logits.numpy(), labels)
    predictions = predictions_of(logits, labels, class_names=CLASS_NAMES, temperature=temperature)
    evaluation = evaluate(predictions, top_k=5, duplicates=())
    rows = list(prediction_rows(predictions))
    text = json.dumps([evaluation.metrics, evaluation.per_class, rows, temperature])
    return Bits(
        network,
        threads,
        cpu=_cpu(),
        capability=torch.backends.cpu.get_cpu_capability(),
        weights=bytes_md5(save({name: tensor.contiguous() for name, tensor in classifier.state_dict().items()})),
        evaluation=bytes_md5(logits.numpy().tobytes() + text.encode()),
    )


def _logits(classifier: Classifier, split: Split) -> torch.Tensor:
    """Return the logits (N, num_classes) float32 as `evaluate` computes them, which do not depend on the threads."""
    one, two = (trained_logits(classifier, split, threads=number, batch_size=len(split)) for number in (1, 2))
    assert torch.equal(one, two), "the logits depend on the number of threads"
    return one


def _features(classifier: Classifier, head: nn.Module, split: Split) -> Split:
    """Return the split with features in place of its images."""
    blocks = compute_features(classifier, head, split, name="a split")
    return with_features(split, np.concatenate(list(blocks)))


def _params(changes: Mapping[str, Any]) -> TrainParams:
    """Return the parameters in `params.yaml` with these changes."""
    values = {**DEFAULTS, "train": {**DEFAULTS["train"], **changes}}
    return check_params(values, origin="tests/bits/training.py").train


def _random_split(num_images: int, *, seed: int) -> Split:
    """Return a split of random images (num_images, 32, 32, 3), whose classes take turns."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (num_images, 32, 32, 3), dtype=np.uint8)
    return Split.of(images, np.arange(num_images, dtype=np.int64) % len(CLASS_NAMES), mean=MEAN, std=STD)


def _cpu() -> str:
    """Return the name of the CPU, or "unknown" where this version of PyTorch cannot report it."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return "unknown"
    return str(torch.cpu.get_capabilities()["cpu_name"])


def main() -> None:
    """Compute and print the bits of each network with 1 and with 2 threads."""
    kernels, *networks = sys.argv[1:]
    for network in networks:
        for threads in (1, 2):
            print(json.dumps(asdict(bits(network, kernels=kernels, threads=threads))), flush=True)


if __name__ == "__main__":
    main()
