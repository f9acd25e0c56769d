"""Predict the images of a split with a model, both from any folder: the one way to predictions that are compared."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from pipeline.arrays import CPU, DatasetInfo, Split
from pipeline.artifacts import NORMALIZE, file_md5
from pipeline.core.errors import UserError, shorten
from pipeline.core.processes import num_cores
from pipeline.evaluation.logits import predictions_of
from pipeline.evaluation.predictions import Predictions
from pipeline.models.build import Classifier
from pipeline.models.config import ModelConfig
from pipeline.models.cpu_kernels import use_cpu_kernels
from pipeline.models.files import load_model
from pipeline.models.inference import trained_logits
from pipeline.models.losses import loss_function
from pipeline.params import EvaluateParams
from pipeline.parquet import read_files

MAX_VALUE_LENGTH = 80  # characters of a value in a message


@dataclass(frozen=True)
class EvaluatedModel:
    """A network on its device, with its configuration, its folder and the parameters of its evaluation.

    `weights_md5` is the MD5 of the weights file.
    """

    classifier: Classifier
    config: ModelConfig
    folder: Path
    weights_md5: str
    params: EvaluateParams
    device: torch.device


def load_to_evaluate(folder: Path, *, params: EvaluateParams, device: torch.device = CPU) -> EvaluatedModel:
    """Return the model of `params.checkpoint` in a folder, after setting kernels and threads of the CPU for it.

    Raises UserError where a file is missing or damaged, or this process has used PyTorch with other kernels before.
    """
    use_cpu_kernels(params.cpu_kernels, field="evaluate.cpu_kernels")
    torch.set_num_threads(params.cpu_threads or num_cores())
    classifier, config = load_model(folder, checkpoint=params.checkpoint)
    weights_md5 = file_md5(folder / f"{params.checkpoint}.safetensors")
    return EvaluatedModel(classifier.to(device), config, folder, weights_md5, params, device)


def predict_split(model: EvaluatedModel, split: str, *, data: Path = NORMALIZE) -> tuple[Predictions, float]:
    """Return the predictions for train, validation or test of a folder of `normalize`, and their mean loss.

    The bits are the same wherever the folders are; on the CPU, those of an image do not depend on the other images of
    the split. The temperature is that of the model's configuration. Raises UserError where the model was not made for
    such images, or a file is missing or damaged.
    """
    info, config = DatasetInfo.read(data), model.config
    _check_fit(model, info, data=data)
    images = Split.read(split, info=info, mean=config.mean, std=config.std, device=model.device, folder=data)
    params = model.params
    logits = trained_logits(
        model.classifier,
        images,
        threads=params.cpu_threads or num_cores(),
        batch_size=params.batch_size,
        views=params.test_time_augmentation,
    )
    labels = images.labels.cpu()
    names, content_hashes = read_files(split, folder=data)
    predictions = predictions_of(
        logits,
        labels.numpy(),
        class_names=info.class_names,
        names=names,
        content_hashes=content_hashes,
        temperature=config.temperature,
        weights_md5=model.weights_md5,
    )
    return predictions, loss_function(config.loss)(logits, labels).item()


class Mismatch(NamedTuple):
    """A field in which a model and a data set differ, with the value of each as a short text."""

    field: str
    of_model: str
    of_data: str


def find_mismatch(config: ModelConfig, info: DatasetInfo) -> Mismatch | None:
    """Return why a model cannot predict the images of a data set, or None where it was made for such images."""
    for field in ("class_names", "image_size", "channels", "resize"):
        of_model, of_data = getattr(config, field), getattr(info, field)
        if of_model != of_data:
            return Mismatch(field, _as_text(of_model), _as_text(of_data))
    return None


def _as_text(value: object) -> str:
    return shorten(str(list(value) if isinstance(value, tuple) else value), MAX_VALUE_LENGTH)


def _check_fit(model: EvaluatedModel, info: DatasetInfo, *, data: Path) -> None:
    """Raise UserError where the images or classes of a data set are not those that the model was made for."""
    if found := find_mismatch(model.config, info):
        raise UserError(
            f"{data}: {found.field} is {found.of_data}; allowed: {found.of_model}, which the model in {model.folder} "
            "was trained with; `dvc repro train` trains it again, or normalize the images as for that model"
        )
