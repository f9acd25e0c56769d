"""Draw the order of the images of an epoch, as `train.sampler` states."""

import torch
from torch import Tensor

from pipeline.params import Sampler


def draw_order(labels: Tensor, *, sampler: Sampler, class_counts: Tensor, random: torch.Generator) -> Tensor:
    """Return indices of M images in the order of the epoch, (M,) int64 on the CPU, from their labels (M,) int64.

    `shuffle` returns each image once. `balanced` draws M images with replacement, each with a probability proportional
    to 1 / `class_counts[label]`, the images of its class in the whole split (num_classes,): so each class is expected
    equally often. Where the M images are a part of the split, that holds over all parts, and only if each class is
    spread evenly over them; a part without images of a class cannot have any drawn.
    """
    if sampler == "shuffle":
        return torch.randperm(len(labels), generator=random)
    # not torch.multinomial, which is limited to 2**24 images
    bounds = (1 / class_counts.double())[labels].cumsum(0)
    drawn = torch.rand(len(labels), generator=random, dtype=torch.float64) * bounds[-1]
    return torch.searchsorted(bounds, drawn, right=True)
