"""Make predictions from the logits of a split."""

from collections.abc import Sequence

import numpy as np
import torch

from pipeline.artifacts import Labels
from pipeline.evaluation.predictions import Predictions, Probabilities
from pipeline.models.inference import probabilities_of

ROWS_PER_BLOCK = 4096  # images whose probabilities are in memory as float64


def predictions_of(
    logits: torch.Tensor,
    labels: Labels,
    *,
    class_names: Sequence[str],
    names: Sequence[str] | None = None,
    content_hashes: Sequence[str] | None = None,
    temperature: float | None = None,
) -> Predictions:
    """Return the predictions from logits (N, num_classes) float32 on the CPU and labels (N,) int64.

    The predicted class is that of the highest logit, whatever the temperature is. Names and content hashes that are not
    given are empty.
    """
    return Predictions(
        class_names=tuple(class_names),
        names=names or [""] * len(labels),
        content_hashes=content_hashes or [""] * len(labels),
        actual=labels,
        predicted=logits.argmax(1).numpy(),
        probabilities=_probabilities(logits, temperature=None),
        calibrated_probabilities=None if temperature is None else _probabilities(logits, temperature=temperature),
    )


def _probabilities(logits: torch.Tensor, *, temperature: float | None) -> Probabilities:
    """Return the probabilities (N, num_classes) rounded to float32."""
    blocks = (probabilities_of(block, temperature=temperature) for block in logits.split(ROWS_PER_BLOCK))
    return np.concatenate([block.astype(np.float32) for block in blocks])
