"""Define the content of `model.json`, from which a trained network is built again and its input is prepared."""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from pipeline.arrays import DatasetInfo
from pipeline.models.preparation import Interpolation, Preparation, pretrained_preparation
from pipeline.params import Channels, CpuKernels, Resize, TrainParams

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
UNKNOWN = "unknown"  # what is reported as the class of an image whose probability is below the threshold
Fraction = Annotated[FiniteFloat, Field(ge=0, le=1)]


class ModelConfig(BaseModel):
    """The content of `model.json`: all that is needed to build the network and to prepare its input."""

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
    # the defaults are for models from before these fields existed
    interpolation: Interpolation = "bilinear"
    # images of another size than network_size are resized to network_size / crop_fraction, and the center is cut out;
    # images of network_size pixels are not cropped
    crop_fraction: Annotated[FiniteFloat, Field(gt=0, le=1)] = 1.0
    cpu_kernels: CpuKernels = "native"
    # the logits are divided by it before the softmax; None is unknown: the probabilities are not calibrated
    temperature: Annotated[FiniteFloat, Field(ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE)] | None = None
    # by coverage, the fraction of the validation images with at least this probability of their most probable class; an
    # image with a lower one is of unknown class. None: unknown
    thresholds: dict[Fraction, Fraction] | None = None

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if len(set(self.class_names)) < len(self.class_names):
            raise ValueError("a class name occurs twice")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean and std must have {self.channels} numbers each, one for each channel")
        return self

    def threshold(self, coverage: float) -> float:
        """Return the threshold for a coverage, the fraction of validation images whose class was reported.

        Raises ValueError with what is allowed where the model has none for it.
        """
        if not self.thresholds:
            raise ValueError(
                f"coverage is {coverage}, but the model has no thresholds, since an earlier version trained it; "
                "allowed: no coverage; train the model again to get them"
            )
        if coverage not in self.thresholds:
            allowed = ", ".join(map(str, self.thresholds))
            raise ValueError(f"coverage is {coverage}; allowed: {allowed}; choose one of these")
        return self.thresholds[coverage]

    @property
    def network_size(self) -> int:
        """Return the height and width of the network's input in pixels."""
        return self.input_size or self.image_size


def configure(params: TrainParams, info: DatasetInfo) -> ModelConfig:
    """Return the configuration of a network with these parameters for this data set.

    With pretrained weights, mean and deviation of the pixels are those that the weights expect, else those of the data
    set. The temperature is unknown until the network is trained. Raises UserError for an unknown network of timm.
    """
    pretrained = pretrained_preparation(params.model, weights=params.weights, channels=info.channels)
    preparation = pretrained or Preparation(info.mean, info.std)
    return ModelConfig(
        model=params.model,
        weights=params.weights,
        loss=params.loss,
        class_names=info.class_names,
        image_size=info.image_size,
        input_size=params.input_size,
        channels=info.channels,
        resize=info.resize,
        mean=preparation.mean,
        std=preparation.std,
        interpolation=preparation.interpolation,
        crop_fraction=preparation.crop_fraction,
        cpu_kernels=params.cpu_kernels,
    )
