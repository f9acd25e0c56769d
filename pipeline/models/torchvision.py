"""Build torchvision's classification models, adapted to small images."""

from typing import Any

from torch import nn

from pipeline.models.config import ModelConfig
from pipeline.models.names import unknown_network_error

# pixels; for images up to this size, the first layers of a ResNet keep the resolution (He et al. 2016, section 4.2)
SMALL_IMAGE_SIZE = 64


def build_torchvision_network(config: ModelConfig, *, num_classes: int) -> nn.Module:
    """Build the network `config.model` with random initial weights; raises UserError for an unknown name."""
    from torchvision import models  # noqa: PLC0415  # its import takes as long as that of torch, and lenet does not need it

    if config.model not in models.list_models(module=models):
        raise unknown_network_error(config.model)
    network: nn.Module = models.get_model(config.model, weights=None, num_classes=num_classes, **_options(config))
    if isinstance(network, models.ResNet) and config.network_size <= SMALL_IMAGE_SIZE:
        _keep_resolution(network, kernel_size=3 if config.weights is None else 7)
    return network


def _options(config: ModelConfig) -> dict[str, Any]:
    """Return the arguments that only some networks have."""
    if config.model.startswith("vit_"):
        return {"image_size": config.network_size}
    # the default of these two is a slow draw of weights (truncated normal distribution), with a warning
    return {"init_weights": True} if config.model in {"googlenet", "inception_v3"} else {}


def _keep_resolution(network: Any, *, kernel_size: int) -> None:
    """Set the first layer's stride to 1 and remove the pooling, which would reduce 32x32 images to 8x8 features.

    Without pretrained weights, the kernel is 3x3 as in He et al. 2016 for CIFAR-10; with them it stays 7x7.
    """
    network.conv1 = nn.Conv2d(3, 64, kernel_size, stride=1, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
