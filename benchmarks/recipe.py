"""Load the network and the images of a recipe, for the benchmarks that train in their own process."""

from dataclasses import replace
from pathlib import Path

from pipeline.arrays import DatasetInfo, Split
from pipeline.models.build import Classifier, build, memory_format
from pipeline.models.config import ModelConfig, configure
from pipeline.models.inference import logits_of
from pipeline.params import TrainParams, Views
from pipeline.training.device import prepare_torch

SPLITS = ("train", "validation", "test")
BATCH_SIZE = 500


def load(params: TrainParams, folder: Path) -> tuple[Classifier, dict[str, Split]]:
    """Prepare PyTorch as the step train does; return the network with new weights, and all splits on the device."""
    device, info = prepare_torch(params), DatasetInfo.read(folder)
    splits = {name: Split.read(name, info=info, device=device, folder=folder) for name in SPLITS}
    return network(params, info), splits


def image_config(
    params: TrainParams,
    *,
    class_names: tuple[str, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    image_size: int = 32,
) -> ModelConfig:
    """Return the configuration of a network with new weights; `mean` and `std` have a number for each channel."""
    return ModelConfig(
        model=params.model,
        weights=None,
        loss=params.loss,
        class_names=class_names,
        image_size=image_size,
        input_size=None,
        channels=1 if len(mean) == 1 else 3,
        resize="crop",
        mean=mean,
        std=std,
    )


def network(params: TrainParams, info: DatasetInfo) -> Classifier:
    """Return the network with new weights, on the CPU and in the memory format of the recipe."""
    return build(configure(params, info)).to(memory_format=memory_format(params))


def first_images(split: Split, num_images: int) -> Split:
    """Return a split of the first images."""
    return replace(split, images=split.images[:num_images], labels=split.labels[:num_images])


def accuracy_on(split: Split, classifier: Classifier, *, views: Views = "none") -> float:
    """Return the accuracy on a split; `views` is as in `evaluate.test_time_augmentation`."""
    logits = logits_of(classifier, split, batch_size=BATCH_SIZE, views=views)
    return (logits.argmax(1) == split.labels).double().mean().item()
