"""Define the loss functions by their names in `train.loss`, and the weights of `train.class_weights`."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


def loss_function(
    name: str, *, label_smoothing: float = 0.0, class_weights: Tensor | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss function, from logits (B, num_classes) and targets to the mean loss of the batch.

    Targets are labels (B,) int64, or floats (B, num_classes), the shares of the classes in a mixed image. `mse`
    compares the outputs with one-hot targets of the same shape. `class_weights` are those of `balanced_class_weights`;
    a mixed image has the mixed weight. The sum of weight times loss is divided by the number of images, and not by the
    sum of the weights as `nn.CrossEntropyLoss` does: so the mean over equal slices of a batch is the loss of the batch.
    """
    if class_weights is not None:
        losses = _cross_entropies if name == "cross_entropy" else _squared_errors
        return lambda logits, targets: _weighted_mean(
            losses(logits, targets, label_smoothing), targets, class_weights=class_weights
        )
    if name == "cross_entropy":
        return nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    return lambda logits, targets: F.mse_loss(logits, _class_shares(targets, logits))


def balanced_class_weights(labels: Tensor) -> Tensor:
    """Return the weight of each class up to the highest label, float32 on the device of the labels (N,) int64.

    It is N / (K * images of the class) for the K classes that have images, as scikit-learn's "balanced": each class has
    the same sum of weights, and their mean over all images is 1. A class without images has the weight 0.
    """
    counts = labels.cpu().bincount().double()
    weights = len(labels) / ((counts > 0).sum() * counts)
    return weights.where(counts > 0, 0.0).float().to(labels.device)


def _cross_entropies(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Return the cross-entropy of each image: (B,) float32."""
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)


def _squared_errors(logits: Tensor, targets: Tensor, _label_smoothing: float) -> Tensor:
    """Return the mean squared error of each image: (B,) float32."""
    return F.mse_loss(logits, _class_shares(targets, logits), reduction="none").mean(1)


def _class_shares(targets: Tensor, logits: Tensor) -> Tensor:
    """Return the targets, one-hot if they are labels: (B, num_classes) of the dtype of the logits."""
    shares = targets if targets.is_floating_point() else F.one_hot(targets, logits.shape[1])
    return shares.to(logits.dtype)


def _weighted_mean(losses: Tensor, targets: Tensor, *, class_weights: Tensor) -> Tensor:
    """Return the sum of weight times loss of the images, divided by their number."""
    # the last classes may have no images in the train split, and then no weight and no share either
    mixed = targets.is_floating_point()
    weights = targets[:, : len(class_weights)] @ class_weights if mixed else class_weights[targets]
    return (weights * losses).mean()
