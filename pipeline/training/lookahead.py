"""Average the weights of a training over its steps, by Lookahead."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Lookahead:
    """Slow weights, which follow the fast weights that the optimizer updates (Zhang et al. 2019, arXiv:1907.08610).

    Every `every` steps the slow weights move toward the fast ones, by 1 - 0.95 ** every * (step / total) ** 3 of the
    distance (Jordan 2024, arXiv:2404.00498), and the fast weights are set to the slow ones. After the last step the
    network has the slow weights, whether they moved in that step or not.
    """

    def __init__(self, network: nn.Module, *, every: int) -> None:
        self._fast = {name: tensor for name, tensor in network.state_dict().items() if tensor.is_floating_point()}
        self._every = every
        self.slow = {name: tensor.clone() for name, tensor in self._fast.items()}

    @torch.no_grad()
    def step(self, number: int, *, total: int) -> None:
        """Update the weights after step `number` (from 1) of `total`."""
        if number % self._every and number < total:
            return
        slow_fraction = 1.0 if number % self._every else 0.95**self._every * (number / total) ** 3
        for name, fast in self._fast.items():
            fast.copy_(self.slow[name].lerp_(fast, 1 - slow_fraction))

    def restore(self, slow: Mapping[str, Tensor]) -> None:
        """Set the slow weights to those of a checkpoint."""
        for name, tensor in slow.items():
            self.slow[name].copy_(tensor)
