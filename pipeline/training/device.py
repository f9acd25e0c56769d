"""The device of a training or an evaluation."""

import torch

from pipeline.core.errors import UserError


def choose_device(name: str, *, field: str) -> torch.device:
    """The device of a parameter's value; raises UserError naming `field` where this machine has none such."""
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if name == "auto":
        return torch.device(available[0])
    if name not in available:
        raise UserError(
            f"{field} is {name}, but PyTorch finds none here; allowed on this machine: auto, {', '.join(available)}"
        )
    return torch.device(name)
