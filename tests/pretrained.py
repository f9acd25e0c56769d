"""Make the description of a data set, and the configuration of a network that fits it."""

from pipeline.arrays import DatasetInfo
from pipeline.models.config import ModelConfig, configure
from pipeline.params import Channels
from tests.conftest import train_params

SMALL = "timm/test_resnet"  # 0.4 million parameters


def dataset(*, classes: int = 3, size: int = 32, channels: Channels = 3) -> DatasetInfo:
    return DatasetInfo.model_validate(
        {
            "dataset": "imagefolder",
            "class_names": tuple(map(str, range(classes))),
            "image_size": size,
            "channels": channels,
            "resize": "crop",
            "mean": (0.4,) * channels,
            "std": (0.2,) * channels,
            "counts": {"train": {}, "validation": {}, "test": {}},
            "test_duplicates": (),
            "md5": "",
        }
    )


def configured(model: str, *, weights: str | None, info: DatasetInfo, input_size: int | None = None) -> ModelConfig:
    return configure(train_params(model=model, weights=weights, input_size=input_size), info)
