"""Report in one line that the memory is too small for a training."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.core.errors import UserError, first_line
from pipeline.params import TrainParams


@contextmanager
def explain_memory_errors(params: TrainParams) -> Iterator[None]:
    """Replace PyTorch's out-of-memory errors, on the CPU or a GPU, by a UserError with the remedy."""
    try:
        yield
    except RuntimeError as error:
        # the allocator for the CPU has no exception of its own
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        reason, _, _ = first_line(error).partition(" Including non-PyTorch memory")  # a page of advice follows it
        raise UserError(
            f"train.batch_size is {params.batch_size}: this needs more memory than there is ({reason}); "
            "lower it or train.input_size, or end other programs that use the memory"
        ) from None
