"""Average the weights of a training over its steps, by an exponential moving average (EMA)."""

import copy

from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """A copy of a classifier whose weights are the exponential moving average of those of the one that is trained.

    Step n (from 1) keeps the fraction `decay` of the average, or less in the first steps: (1 + n) / (10 + n), as
    TensorFlow's ExponentialMovingAverage does with `num_updates`. The average then spans about the last tenth of the
    steps, so that a training of a hundred steps forgets its first weights too.
    """

    def __init__(self, trained: nn.Module, *, decay: float) -> None:
        self.classifier = copy.deepcopy(trained)
        self._averaged, self._trained = _float_tensors(self.classifier), _float_tensors(trained)
        self._decay = decay

    def step(self, number: int) -> None:
        """Add the weights that the trained classifier has after step `number` (from 1) to the average."""
        decay = min(self._decay, (1 + number) / (10 + number))
        # not PyTorch's AveragedModel: its counter of steps is a tensor, for which each step would wait for the GPU
        get_ema_multi_avg_fn(decay)(self._averaged, self._trained, number)  # type: ignore[no-untyped-call]


def _float_tensors(network: nn.Module) -> list[Tensor]:
    """Return the parameters and the buffers that are not counters; they share the memory of the network."""
    return [tensor for tensor in network.state_dict().values() if tensor.is_floating_point()]
