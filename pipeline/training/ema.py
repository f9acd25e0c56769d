"""Average the weights of a training over its steps, by an exponential moving average (EMA)."""

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.models.build import Classifier


class WeightAverage:
    """A classifier whose weights are the exponential moving average of those of a classifier that is trained.

    Update n (from 0) keeps the fraction `decay` of the average, or less in the first updates: (1 + n) / (10 + n), as
    TensorFlow's ExponentialMovingAverage does with `num_updates`. The average then spans about the last tenth of the
    steps, so that a training of a hundred steps forgets its first weights too.
    """

    def __init__(self, classifier: Classifier, *, decay: float) -> None:
        self._decay = decay
        self._averaged = AveragedModel(classifier, use_buffers=True)

    @property
    def classifier(self) -> Classifier:
        """Return the classifier that has the averaged parameters and buffers."""
        return cast(Classifier, self._averaged.module)

    def update(self, classifier: Classifier) -> None:
        """Add the weights of the trained classifier, after a step, to the average; the first update copies them."""
        number = int(self._averaged.n_averaged)  # on the CPU, so that no step waits for a GPU
        self._averaged.multi_avg_fn = get_ema_multi_avg_fn(min(self._decay, (1 + number) / (10 + number)))
        self._averaged.update_parameters(classifier)

    def state_dict(self) -> dict[str, Any]:
        """Return the average and the number of updates as tensors by name."""
        return self._averaged.state_dict()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the average and the number of updates to those of a checkpoint."""
        self._averaged.load_state_dict(tensors)
