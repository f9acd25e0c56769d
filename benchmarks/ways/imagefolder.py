"""Read JPEG files once into arrays in memory, by torchvision: `python -m benchmarks.ways.imagefolder TREE`."""

import sys
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from pipeline.core.processes import num_cores


def main() -> None:
    """Read one split after the other."""
    for split in sorted(Path(sys.argv[1]).iterdir()):
        images = datasets.ImageFolder(split, transform=transforms.PILToTensor())
        loader = DataLoader(images, batch_size=256, num_workers=num_cores())
        pixels, labels = np.empty((len(images), *images[0][0].shape), np.uint8), np.empty(len(images), np.int64)
        start = 0
        for batch, targets in loader:
            end = start + len(targets)
            pixels[start:end], labels[start:end] = batch, targets
            start = end


if __name__ == "__main__":
    main()
