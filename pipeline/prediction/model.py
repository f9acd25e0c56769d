"""Load a trained model, and turn images into answers: a class, its probability and the most probable classes."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pipeline.arrays import CPU, Split
from pipeline.artifacts import Images
from pipeline.core.errors import UserError
from pipeline.models.build import Classifier
from pipeline.models.config import UNKNOWN, ModelConfig
from pipeline.models.cpu_kernels import use_cpu_kernels
from pipeline.models.files import load_config, load_model
from pipeline.models.inference import class_probabilities, probabilities_of, trained_logits
from pipeline.params import Views
from pipeline.tracking.model_files import ModelFiles

BATCH_SIZE = 256  # images on a GPU at a time


@dataclass(frozen=True)
class LoadedModel:
    """A network in evaluation mode on its device, with its configuration and its files."""

    classifier: Classifier
    config: ModelConfig
    files: ModelFiles
    device: torch.device

    def probabilities(self, images: Images, *, threads: int, views: Views = "none") -> npt.NDArray[np.float64]:
        """Return the probabilities (N, num_classes) float64 of images (N, H, W, C) uint8, N ≥ 1.

        They are calibrated where the model has a temperature. On the CPU, the bits are those of `evaluate` with the
        same `views`, whatever the other images and the number of `threads` are.
        """
        labels = np.zeros(len(images), dtype=np.int64)
        split = Split.of(images, labels, mean=self.config.mean, std=self.config.std, device=self.device)
        logits = trained_logits(self.classifier, split, threads=threads, batch_size=BATCH_SIZE, views=views)
        return probabilities_of(logits, temperature=self.config.temperature)

    def quick_probabilities(self, images: Images) -> npt.NDArray[np.float64]:
        """Return the probabilities as `probabilities`, sooner for a few images; the last bits depend on their number.

        They are computed on the CPU by the calling thread and the threads of PyTorch.
        """
        return class_probabilities(self.classifier, images, config=self.config)


@dataclass(frozen=True)
class Answer:
    """The answer for one image.

    `class_name` is the most probable class, or UNKNOWN where a threshold was asked for and `probability`, that of the
    most probable class, is below it. `top` has the most probable classes with their probabilities, the first being the
    most probable.
    """

    class_name: str
    probability: float
    top: tuple[tuple[str, float], ...]
    is_unknown: bool


def load(files: ModelFiles, *, device: torch.device = CPU) -> LoadedModel:
    """Return the model on a device, after choosing the kernels of the CPU for it.

    Raises UserError where a file is missing or damaged, or this process has used PyTorch with other kernels before.
    """
    use_cpu_kernels(load_config(files.folder).cpu_kernels, field=f"{files.folder / 'model.json'}: cpu_kernels")
    classifier, config = load_model(files.folder, checkpoint=files.checkpoint)
    return LoadedModel(classifier.to(device), config, files, device)


def find_threshold(model: LoadedModel, coverage: float | None) -> float | None:
    """Return the threshold of the model for a coverage, or None without a coverage; raises UserError."""
    try:
        return None if coverage is None else model.config.threshold(coverage)
    except ValueError as error:
        raise UserError(f"--{error}") from None


def answer_of(
    probabilities: npt.NDArray[np.float64], *, config: ModelConfig, top: int, threshold: float | None = None
) -> Answer:
    """Return the answer for an image from its probabilities (num_classes,), with the `top` most probable classes."""
    order = np.argsort(-probabilities, kind="stable")
    ranked = tuple((config.class_names[index], float(probabilities[index])) for index in order[:top])
    name, probability = config.class_names[order[0]], float(probabilities[order[0]])
    is_unknown = threshold is not None and probability < threshold
    return Answer(UNKNOWN if is_unknown else name, probability, ranked, is_unknown)
