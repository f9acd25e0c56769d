"""Ways to do the same work, each a program: `python -m benchmarks.ways.tutorial [SEED [TARGET]]`.

Those that train print `accuracy 0.5512`, on all test images, whenever they have judged, and end at the target.
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
    """What normalize makes of the images by this recipe."""
    return CIFAR10 / "normalize" / recipe


def seed() -> int:
    return int(sys.argv[1]) if len(sys.argv) > 1 else 0


def target() -> float:
    return float(sys.argv[2]) if len(sys.argv) > 2 else TARGET


def is_reached(accuracy: float) -> bool:
    """Whether the accuracy, which this prints, is the target or better."""
    shown = f"{accuracy:.4f}"
    print(f"accuracy {shown}", flush=True)
    return float(shown) >= target()
