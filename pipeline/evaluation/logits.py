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
    weights_md5: str | None = None,
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
        weights_md5=weights_md5,
    )


def _probabilities(logits: torch.Tensor, *, temperature: float | None) -> Probabilities:
    """Return the probabilities (N, num_classes) rounded to float32."""
    rows = np.empty(logits.shape, np.float32)
    for start in range(0, len(rows), ROWS_PER_BLOCK):
        block = slice(start, start + ROWS_PER_BLOCK)
        rows[block] = probabilities_of(logits[block], temperature=temperature)
    return rows
