"""Networks by name, their weights, and the files that keep both: `<name>.safetensors` with `model.json` beside it."""

import copy
import difflib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor, nn

from pipeline.airbench import Airbench
from pipeline.artifacts import Images, check_weights, missing, read_json, write_bytes, write_json
from pipeline.data import DatasetInfo, Split, evaluation_batches
from pipeline.errors import TemporaryError, UserError, first_line
from pipeline.params import Channels, Resize, TrainParams, Views
from pipeline.state_dict import COUNTER, flatten, select_weights

SMALL_IMAGE_SIZE = 64
"""Pixels. Up to this size a residual network keeps the resolution in its first layers (He et al. 2016, section 4.2)."""


class ModelConfig(BaseModel):
    """All that is needed to build the network again and to feed it."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str
    weights: str | None
    loss: str
    class_names: Annotated[tuple[str, ...], Field(min_length=1)]
    image_size: Annotated[int, Field(ge=1, le=1024)]
    input_size: Annotated[int, Field(ge=1, le=1024)] | None
    channels: Channels
    resize: Resize
    mean: tuple[FiniteFloat, ...]
    std: tuple[FiniteFloat, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.class_names)) < len(self.class_names):
            raise ValueError("a class name comes twice")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError("mean and std are not one number a channel each")
        return self

    @property
    def network_size(self) -> int:
        """Pixels a side of what the network sees."""
        return self.input_size or self.image_size


def configure(params: TrainParams, info: DatasetInfo) -> ModelConfig:
    return ModelConfig(
        model=params.model,
        weights=params.weights,
        loss=params.loss,
        class_names=info.class_names,
        image_size=info.image_size,
        input_size=params.input_size,
        channels=info.channels,
        resize=info.resize,
        mean=info.mean,
        std=info.std,
    )


class LeNet(nn.Sequential):
    """The network of the PyTorch tutorials, after LeCun et al. 1998: two 5x5 convolutions and three linear layers.

    (B, channels, image_size, image_size) float32 → (B, num_classes) logits. For 32x32 images the first linear layer has
    the 400 inputs of the material; for others their number follows from the size.
    """

    def __init__(self, *, num_classes: int, channels: int, image_size: int) -> None:
        side = ((image_size - 4) // 2 - 4) // 2
        if side < 1:
            raise UserError(
                f"train.model lenet needs images of at least 16 pixels, found {image_size}; raise normalize.image_size"
            )
        super().__init__(
            nn.Conv2d(channels, 6, 5),
            nn.MaxPool2d(2),  # before the ReLU, which then has a quarter to do: the result is the same
            nn.ReLU(),
            nn.Conv2d(6, 16, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * side * side, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, num_classes),
        )


OWN_NETWORKS: Mapping[str, type[LeNet | Airbench]] = {"lenet": LeNet, "airbench": Airbench}
"""By the name in `train.model`; all others are torchvision's."""


class Classifier(nn.Module):
    """A network with what it needs done to its input: (B, C, H, W) normalised float32 → (B, num_classes) logits."""

    def __init__(self, network: nn.Module, *, network_channels: int, input_size: int | None) -> None:
        super().__init__()
        self.network = network
        self.network_channels = network_channels
        self.input_size = input_size

    def forward(self, images: Tensor) -> Tensor:
        if self.input_size is not None and self.input_size != images.shape[-1]:
            size = (self.input_size, self.input_size)
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
        if images.shape[1] < self.network_channels:
            images = images.expand(-1, self.network_channels, -1, -1)
        output = self.network(images)
        # googlenet and inception_v3 return their auxiliary logits beside it while training
        return output if isinstance(output, Tensor) else output.logits


def build(config: ModelConfig) -> Classifier:
    """The network with freshly drawn weights; raises UserError for an unknown name or a size it cannot take."""
    network = _network(config, num_classes=len(config.class_names))
    channels = config.channels if config.model in OWN_NETWORKS else 3
    classifier = Classifier(network, network_channels=channels, input_size=config.input_size)
    _try(classifier.eval(), config=config, batch_size=1)
    classifier.train()
    return classifier


def _network(config: ModelConfig, *, num_classes: int) -> nn.Module:
    if own := OWN_NETWORKS.get(config.model):
        return own(num_classes=num_classes, channels=config.channels, image_size=config.network_size)
    return _torchvision_network(config, num_classes=num_classes)


def _torchvision_network(config: ModelConfig, *, num_classes: int) -> nn.Module:
    from torchvision import models  # noqa: PLC0415  # it takes as long to import as torch does, and lenet needs none of it

    names = models.list_models(module=models)
    if config.model not in names:
        raise UserError(_unknown(config.model, names))
    network: nn.Module = models.get_model(config.model, weights=None, num_classes=num_classes, **_options(config))
    if isinstance(network, models.ResNet) and config.network_size <= SMALL_IMAGE_SIZE:
        _keep_resolution(network, kernel_size=3 if config.weights is None else 7)
    return network


def _unknown(name: str, torchvision_names: list[str]) -> str:
    names = [*OWN_NETWORKS, *torchvision_names]
    close = difflib.get_close_matches(name, names, n=3) or ["lenet", "resnet18"]
    return (
        f"train.model is {name!r}; allowed: lenet, airbench or a torchvision classification model "
        f"({len(torchvision_names)} of them, such as {', '.join(close)})"
    )


def _options(config: ModelConfig) -> dict[str, Any]:
    if config.model.startswith("vit_"):
        return {"image_size": config.network_size}
    # these two draw their weights by a slow truncated normal unless told which way
    return {"init_weights": True} if config.model in {"googlenet", "inception_v3"} else {}


def _keep_resolution(network: Any, *, kernel_size: int) -> None:
    """Make the first layer of stride 1 and drop the pooling, which would leave 32x32 images with 8x8 features.

    From scratch its kernel is 3x3, as He et al. 2016 have it for CIFAR-10; pretrained weights keep their 7x7.
    """
    network.conv1 = nn.Conv2d(3, 64, kernel_size, stride=1, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()


def memory_format(params: TrainParams) -> torch.memory_format:
    """In which the network's weights lie."""
    return torch.channels_last if params.channels_last else torch.contiguous_format


def try_training(classifier: Classifier, *, config: ModelConfig, batch_size: int) -> None:
    """Raises UserError where the network cannot take such a batch in training, as its batch normalisation may not."""
    if config.model != "lenet":
        _try(copy.deepcopy(classifier).train(), config=config, batch_size=min(batch_size, 2))


def _try(classifier: nn.Module, *, config: ModelConfig, batch_size: int) -> None:
    """One forward pass over nothing, since only that tells whether a network can take images of this size."""
    images = torch.zeros(batch_size, config.channels, config.image_size, config.image_size)
    try:
        with torch.no_grad():
            classifier(images)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"train.model {config.model} cannot take images of {config.network_size} pixels in batches of {batch_size} "
            f"({first_line(error)}); set train.input_size to what it was made for, such as 224, or raise batch_size"
        ) from None


def load_pretrained(classifier: Classifier, *, config: ModelConfig, md5: str | None) -> list[str]:
    """Load the weights of `train.weights` into the network; the head stays as drawn where the classes differ in number.

    Returns the names of the tensors left as drawn. Nothing is unpickled beyond tensors. Raises UserError where the file
    is missing, damaged, of another network or not of this MD5, TemporaryError where a download failed.
    """
    if config.weights is None:
        return []
    target = classifier.network.state_dict()
    weights = select_weights(
        _read_weights(config, md5=md5),
        target=target,
        head=_head(config),
        file=config.weights,
        network=f"train.model {config.model}",
        image_size=config.network_size,
    )
    fits = {name: tensor for name, tensor in weights.items() if name in target and tensor.shape == target[name].shape}
    classifier.network.load_state_dict(fits, strict=False)
    return [name for name in target if name not in fits and not name.endswith(COUNTER)]


def _head(config: ModelConfig) -> set[str]:
    """The names of the tensors whose shape follows from the number of classes."""
    numbers = (len(config.class_names), len(config.class_names) + 1)
    try:
        with torch.device("meta"):
            one, more = (_network(config, num_classes=number).state_dict() for number in numbers)
    except NotImplementedError:  # the RegNets compute their widths with tensors, which must have values
        one, more = (_network(config, num_classes=number).state_dict() for number in numbers)
    return {name for name in one if one[name].shape != more[name].shape}


def _read_weights(config: ModelConfig, *, md5: str | None) -> dict[str, Tensor]:
    assert config.weights is not None
    if config.weights == "DEFAULT":
        return _download_weights(config.model)
    path = Path(config.weights)
    try:
        check_weights(path, md5)
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():  # torch tells oddities of a damaged file beside the error
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch raises what its many formats raise; all of it means the same to the user
        raise UserError(
            f"train.weights {path}: not readable as weights alone ({first_line(error)}); "
            "allowed: .safetensors, or .pth of a state dict"
        ) from None
    weights = flatten(content)
    if not weights:
        raise UserError(f"train.weights {path}: holds no tensors by name; allowed: a state dict")
    return weights


def _download_weights(name: str) -> dict[str, Tensor]:
    if name in OWN_NETWORKS:
        raise UserError(f"train.weights is DEFAULT, but {name} has no pretrained weights; allowed: null or a file")
    from torchvision import models  # noqa: PLC0415  # see _torchvision_network

    weights: Any = models.get_model_weights(name).DEFAULT
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise TemporaryError(
            f"train.weights DEFAULT: {weights.url} cannot be fetched ({first_line(getattr(error, 'reason', error))}); "
            "without internet, copy that file here and name it in train.weights"
        ) from None
    return state


def save_weights(classifier: nn.Module, path: Path) -> None:
    """Same weights, same bytes."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in classifier.state_dict().items()}
    write_bytes(path, save(weights))


def save_config(config: ModelConfig, folder: Path) -> None:
    write_json(folder / "model.json", config.model_dump(mode="json"))


def load_model(folder: Path, *, checkpoint: str = "best") -> tuple[Classifier, ModelConfig]:
    """The network of `<checkpoint>.safetensors` and `model.json`, in evaluation mode, on the CPU.

    Raises UserError where a file is missing or damaged.
    """
    path = folder / "model.json"
    try:
        config = ModelConfig.model_validate(read_json(path))
    except ValidationError as error:
        raise UserError(
            f"{path}: damaged ({error.errors()[0]['msg']}); `dvc repro train --force` makes it again"
        ) from None
    classifier = build(config)
    weights = folder / f"{checkpoint}.safetensors"
    try:
        classifier.load_state_dict(load(weights.read_bytes()))
    except FileNotFoundError:
        raise UserError(missing(weights)) from None
    except (SafetensorError, RuntimeError) as error:
        raise UserError(
            f"{weights}: damaged or not of {config.model} ({first_line(error)}); "
            "`dvc repro train --force` makes it again"
        ) from None
    return classifier.eval(), config


@torch.no_grad()
def logits_of(
    classifier: nn.Module,
    split: Split,
    *,
    batch_size: int,
    between: tuple[int, int] | None = None,
    views: Views = "none",
) -> Tensor:
    """Logits (N, num_classes) float32 of a split, all or a range of it, on its device, in evaluation mode.

    With several views of each image, their weighted mean.
    """
    was_training = classifier.training
    classifier.eval()
    logits = []
    for images, _ in evaluation_batches(split, batch_size=batch_size, between=between):
        weighted = [weight * classifier(view).float() for weight, view in _views(images, views)]
        logits.append(torch.stack(weighted).sum(0) if len(weighted) > 1 else weighted[0])
    classifier.train(was_training)
    return torch.cat(logits)


def _views(images: Tensor, views: Views) -> list[tuple[float, Tensor]]:
    """Each with its weight: the images, mirrored, and both shifted by a pixel up left and down right (reflected)."""
    if views == "none":
        return [(1.0, images)]
    seen = [(0.5, images), (0.5, images.flip(3))]
    if views == "mirror":
        return seen
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    shifted = [padded[:, :, start : start + height, start : start + width] for start in (0, 2)]
    return [(0.25, view) for _, view in seen] + [(0.125, view) for image in shifted for view in (image, image.flip(3))]


def class_probabilities(classifier: nn.Module, images: Images, *, config: ModelConfig) -> npt.NDArray[np.float32]:
    """Probabilities (N, num_classes) float32 of images (N, H, W, C) uint8, on the CPU."""
    labels = np.zeros(len(images), dtype=np.int64)
    split = Split.of(images, labels, mean=config.mean, std=config.std, device=torch.device("cpu"))
    return logits_of(classifier, split, batch_size=256).softmax(1).numpy()
