"""Load pretrained weights into a network: its default ones, or those in a file."""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.artifacts import check_weights
from pipeline.core.errors import TemporaryError, UserError, first_line
from pipeline.models.build import OWN_NETWORKS, Classifier, build_network
from pipeline.models.config import ModelConfig
from pipeline.models.names import TIMM_PREFIX
from pipeline.models.state_dict import COUNTER, flatten, select_weights
from pipeline.models.timm import read_timm_weights


def load_pretrained(classifier: Classifier, *, config: ModelConfig, md5: str | None) -> list[str]:
    """Load the weights that `train.weights` names into the network, and return the names of tensors left unchanged.

    These are the tensors of the head, if the weights are for another number of classes: they keep their random initial
    values. Only tensors are unpickled. Raises UserError where the file is missing, damaged, of another network or has
    another MD5, TemporaryError where a download failed.
    """
    if config.weights is None:
        return []
    target = classifier.network.state_dict()
    weights = select_weights(
        _read_weights(config, md5=md5),
        target=target,
        head=head_tensors(config),
        file=config.weights,
        network=f"train.model {config.model}",
        image_size=config.network_size,
    )
    fitting = {
        name: tensor for name, tensor in weights.items() if name in target and tensor.shape == target[name].shape
    }
    classifier.network.load_state_dict(fitting, strict=False)
    newly_drawn = [name for name in target if name not in fitting and not name.endswith(COUNTER)]
    if config.model.startswith(TIMM_PREFIX):
        _draw_linear_layers(classifier, newly_drawn)
    return newly_drawn


def _draw_linear_layers(classifier: Classifier, names: Iterable[str]) -> None:
    """Draw the weights of the linear layers that own these tensors by PyTorch's rule for linear layers.

    timm's EfficientNets draw weights of up to 1 / sqrt(num_classes): features of a pretrained network then give such
    large logits that the first epochs only shrink them.
    """
    for name in dict.fromkeys(name.rpartition(".")[0] for name in names):
        if isinstance(layer := classifier.network.get_submodule(name), nn.Linear):
            layer.reset_parameters()


def head_tensors(config: ModelConfig) -> set[str]:
    """Return the names of the head's tensors: those whose shape depends on the number of classes."""
    numbers = (len(config.class_names), len(config.class_names) + 1)
    try:
        with torch.device("meta"):
            first, second = (build_network(config, num_classes=number).state_dict() for number in numbers)
    except NotImplementedError:  # the RegNets compute their widths with tensors, which must have values
        first, second = (build_network(config, num_classes=number).state_dict() for number in numbers)
    return {name for name in first if first[name].shape != second[name].shape}


def _read_weights(config: ModelConfig, *, md5: str | None) -> Mapping[str, Tensor]:
    """Return the tensors by name: the network's default ones, or those in the file, whose MD5 must be `md5`."""
    assert config.weights is not None
    if config.weights != "DEFAULT":
        return _read_file(Path(config.weights), md5=md5)
    if config.model.startswith(TIMM_PREFIX):
        return read_timm_weights(config.model, md5=md5)
    return _download_weights(config.model)


def _read_file(path: Path, *, md5: str | None) -> Mapping[str, Tensor]:
    """Return the tensors of a file by name; raises UserError where that is impossible or its MD5 is not `md5`."""
    try:
        check_weights(path, md5)
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():  # for a damaged file, torch raises an error and warns too
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # each of torch's file formats raises errors of its own
        raise UserError(
            f"train.weights {path}: not readable as weights ({first_line(error)}); "
            "allowed: .safetensors, or .pth of a state dict; save the weights so, or name another file"
        ) from None
    weights = flatten(content)
    if not weights:
        raise UserError(
            f"train.weights {path}: holds no named tensors; allowed: a state dict; save network.state_dict() to a file"
        )
    return weights


def _download_weights(name: str) -> dict[str, Tensor]:
    """Return torchvision's pretrained weights of a network; the download is cached and its checksum compared."""
    if name in OWN_NETWORKS:
        raise UserError(
            f"train.weights is 'DEFAULT', but train.model {name} has no pretrained weights; allowed: null (random "
            "weights) or the path of a weights file; set train.weights=null, or choose another train.model"
        )
    from torchvision import models  # noqa: PLC0415  # see pipeline/models/torchvision.py

    weights: Any = models.get_model_weights(name).DEFAULT
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise TemporaryError(
            f"train.weights DEFAULT: {weights.url} cannot be fetched ({first_line(getattr(error, 'reason', error))}); "
            "without internet, copy that file here and name it in train.weights"
        ) from None
    return state
