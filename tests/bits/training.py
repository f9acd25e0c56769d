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

from benchmarks.recipe import image_config
from pipeline.arrays import Split
from pipeline.artifacts import bytes_md5
from pipeline.core.yaml import read_yaml
from pipeline.evaluation.metrics import evaluate
from pipeline.models.airbench import Airbench
from pipeline.models.build import build, memory_format
from pipeline.models.inference import logits_of
from pipeline.params import TrainParams, check_params
from pipeline.training.device import prepare_torch
from pipeline.training.initialize import initialize_from_images
from pipeline.training.loop import train

DEFAULTS = read_yaml(Path(__file__).parents[2] / "params.yaml")
CLASS_NAMES = tuple("abcdefghij")
NUM_EVALUATED = 20
MEAN = STD = (0.5, 0.25, 0.3)
# with another schedule, the learning rate of the only step would be near 0
CONSTANT = {"schedule": "constant", "warmup_fraction": 0.0}
# by network: the number of steps, and the parameters that differ from `params.yaml`
NETWORKS: Mapping[str, tuple[int, Mapping[str, Any]]] = {
    "lenet": (10, {"batch_size": 32, "flip": True}),
    "airbench": (2, {"batch_size": 16, "learning_rate": 0.1, "average_every_steps": 2, **CONSTANT}),
    "resnet18": (1, {"batch_size": 8, **CONSTANT}),
}


@dataclass(frozen=True)
class Bits:
    """The hashes of a training's results, and the CPU as PyTorch sees it."""

    network: str
    threads: int
    cpu: str
    capability: str
    weights: str  # MD5 of parameters and buffers as safetensors
    evaluation: str  # MD5 of logits, metrics and predictions


def bits(network: str, *, kernels: str, threads: int) -> Bits:
    """Train the network on random images with the parameters in NETWORKS, and evaluate it on other images."""
    num_steps, changes = NETWORKS[network]
    params = _params({**changes, "model": network, "cpu_kernels": kernels, "cpu_threads": threads, "epochs": 1})
    prepare_torch(params)
    train_split = _random_split(num_steps * params.batch_size, seed=0)
    other_split = _random_split(NUM_EVALUATED, seed=1)
    classifier = build(image_config(params, class_names=CLASS_NAMES, mean=MEAN, std=STD))
    if isinstance(classifier.network, Airbench):
        initialize_from_images(classifier, train_split, seed=params.seed)
    classifier.to(memory_format=memory_format(params))
    train(classifier, params=params, train_split=train_split, validation_split=other_split)
    logits = logits_of(classifier, other_split, batch_size=len(other_split))
    evaluation = evaluate(
        logits, other_split.labels.numpy(), loss=params.loss, class_names=CLASS_NAMES, top_k=5, duplicates=()
    )
    text = json.dumps([evaluation.metrics, evaluation.per_class, evaluation.predictions])
    return Bits(
        network,
        threads,
        cpu=_cpu(),
        capability=torch.backends.cpu.get_cpu_capability(),
        weights=bytes_md5(save({name: tensor.contiguous() for name, tensor in classifier.state_dict().items()})),
        evaluation=bytes_md5(logits.numpy().tobytes() + text.encode()),
    )


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
