"""Define the loss functions by their names in `train.loss`."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


def loss_function(name: str, *, label_smoothing: float = 0.0) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss function, from logits (B, num_classes) and labels (B,) int64 to the mean loss of the batch.

    `mse` compares the outputs with one-hot targets of the same shape.
    """
    if name == "cross_entropy":
        return nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    return lambda logits, labels: F.mse_loss(logits, F.one_hot(labels, logits.shape[1]).to(logits.dtype))
