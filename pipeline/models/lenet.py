"""LeNet."""

from torch import nn

from pipeline.core.errors import UserError


class LeNet(nn.Sequential):
    """The network of the PyTorch tutorials, after LeCun et al. 1998: two 5x5 convolutions and three linear layers.

    (B, channels, image_size, image_size) float32 → (B, num_classes) logits. For 32x32 images the first linear layer has
    400 inputs; for others their number follows from the size.
    """

    def __init__(self, *, num_classes: int, channels: int, image_size: int) -> None:
        side = ((image_size - 4) // 2 - 4) // 2
        if side < 1:
            raise UserError(
                f"train.model lenet needs images of at least 16 pixels, found {image_size}; raise normalize.image_size"
            )
        super().__init__(
            nn.Conv2d(channels, 6, 5),
            nn.MaxPool2d(2),  # before the ReLU, which then has a quarter of the work: the result is the same
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
