"""The network and the images of a recipe, as the benchmarks in this process train them."""

from dataclasses import replace
from pathlib import Path

import torch

from pipeline.arrays import DatasetInfo, Split
from pipeline.models.build import Classifier, build, memory_format
from pipeline.models.config import configure
from pipeline.params import TrainParams
from pipeline.training.device import prepare_torch

SPLITS = ("train", "validation", "test")


def load(params: TrainParams, folder: Path) -> tuple[Classifier, dict[str, Split]]:
    """Fresh weights and all splits, on the device; PyTorch is prepared as for the train step."""
    device, info = prepare_torch(params), DatasetInfo.read(folder)
    splits = {name: Split.read(name, info=info, device=device, folder=folder) for name in SPLITS}
    return network(params, info), splits


def network(params: TrainParams, info: DatasetInfo) -> Classifier:
    """Fresh weights on the CPU, in the memory format of the recipe."""
    return build(configure(params, info)).to(memory_format=memory_format(params))


def first(split: Split, number: int) -> Split:
    """Its first images."""
    return replace(split, images=split.images[:number], labels=split.labels[:number])


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Of logits (N, num_classes) and labels (N,) int64."""
    return (logits.argmax(1) == labels).double().mean().item()
