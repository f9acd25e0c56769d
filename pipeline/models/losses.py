"""Define the loss functions by their names in `train.loss`."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


def loss_function(name: str, *, label_smoothing: float = 0.0) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss function, from logits (B, num_classes) and labels to the mean loss of the batch.

    The labels are (B,) int64, or for mixed images the shares of the classes, (B, num_classes) float. `mse` compares the
    outputs with these shares, which are one-hot for images that are not mixed.
    """
    if name == "cross_entropy":
        return nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    return lambda logits, labels: F.mse_loss(logits, class_shares(labels, like=logits))


def class_shares(labels: Tensor, *, like: Tensor) -> Tensor:
    """Return labels as the shares of the classes, in the shape (B, num_classes) and dtype of the logits `like`."""
    return (F.one_hot(labels, like.shape[1]) if labels.ndim == 1 else labels).to(like.dtype)


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how many images (as int64, on their device) have their highest logit at their label.

    The label of a mixed image is the class with the largest share.
    """
    return (logits.argmax(1) == (labels if labels.ndim == 1 else labels.argmax(1))).sum()
