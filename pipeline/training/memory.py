"""A memory that is too small for a training, reported in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.core.errors import UserError, first_line
from pipeline.params import TrainParams


@contextmanager
def explain_memory_errors(params: TrainParams) -> Iterator[None]:
    """Turn PyTorch's errors of a full memory, on the CPU or a GPU, into a UserError that says what to do."""
    try:
        yield
    except RuntimeError as error:
        # the allocator for the CPU has no exception of its own
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        reason, _, _ = first_line(error).partition(" Including non-PyTorch memory")  # and a page of advice
        raise UserError(
            f"train.batch_size is {params.batch_size}: too much for the memory of this machine ({reason}); "
            "lower it, or train.input_size, or end what else uses the memory"
        ) from None
