"""Define LeNet, the network of the PyTorch tutorials."""

from torch import nn

from pipeline.core.errors import UserError


class LeNet(nn.Sequential):
    """The network of the PyTorch tutorials, after LeCun et al. 1998: two 5x5 convolutions and three linear layers.

    It maps (B, channels, image_size, image_size) float32 to logits (B, num_classes). The number of inputs of the first
    linear layer follows from the image size: 400 for 32x32 images.
    """

    def __init__(self, *, num_classes: int, channels: int, image_size: int) -> None:
        side = ((image_size - 4) // 2 - 4) // 2
        if side < 1:
            raise UserError(
                f"train.model lenet needs images of at least 16 pixels, found {image_size}; raise normalize.image_size"
            )
        super().__init__(
            nn.Conv2d(channels, 6, 5),
            nn.MaxPool2d(2),  # before the ReLU: the result is the same, and the ReLU has a quarter of the work
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
