"""Programs that do the same work in different ways: `python -m benchmarks.ways.tutorial [SEED [TARGET]]`.

Those that train print the accuracy on all test images after each evaluation, as in `accuracy 0.5512`, and end when it
reaches the target. This module must import nothing that takes long, since its imports are part of each way.
"""

import sys
from pathlib import Path

CIFAR10 = Path(".cache/benchmarks/cifar10")
CIFAR10_IMAGES = CIFAR10 / "images"
RECIPE = "cifar10_lenet"
TARGET = 0.547  # test accuracy of the unchanged PyTorch tutorial "Training a Classifier" on these images


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
