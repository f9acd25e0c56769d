"""Programs that do the same work in different ways: `python -m benchmarks.ways.tutorial [SEED [TARGET]]`.

Those that train print `accuracy 0.5512`, on all test images, after each evaluation, and end at the target.
This module imports nothing heavy: that would count as part of each way.
"""

import sys
from pathlib import Path

CIFAR10 = Path(".cache/benchmarks/cifar10")
CIFAR10_IMAGES = CIFAR10 / "images"
RECIPE = "cifar10_lenet"
TARGET = 0.547
"""Test accuracy of the PyTorch tutorial "Training a Classifier" as it stands, on these images."""


def arrays(recipe: str = RECIPE) -> Path:
    """Return the folder of the arrays that normalize made for this recipe."""
    return CIFAR10 / "normalize" / recipe


def seed() -> int:
    """Return the seed from the command line, or 0."""
    return int(sys.argv[1]) if len(sys.argv) > 1 else 0


def target() -> float:
    """Return the target accuracy from the command line, or that of the tutorial."""
    return float(sys.argv[2]) if len(sys.argv) > 2 else TARGET


def is_reached(accuracy: float) -> bool:
    """Print the accuracy; return whether it reaches the target."""
    rounded = f"{accuracy:.4f}"
    print(f"accuracy {rounded}", flush=True)
    return float(rounded) >= target()
