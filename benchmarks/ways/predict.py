"""Classify a folder of images by a DataLoader of torchvision: `python -m benchmarks.ways.predict FOLDER MODEL CSV`."""

import csv
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from pipeline.core.processes import num_cores
from pipeline.models.files import load_model


class Images(Dataset[tuple[Tensor, str]]):
    """The images in a folder, each with its path."""

    def __init__(self, paths: list[Path], transform: transforms.Compose) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        path = self.paths[index]
        return self.transform(Image.open(path).convert("RGB")), str(path)


@torch.no_grad()
def main() -> None:
    """Write path, class and probability of each image."""
    folder, model, output = map(Path, sys.argv[1:])
    network, config = load_model(model)
    network.eval()
    transform = transforms.Compose(
        [
            transforms.Resize(config.image_size),
            transforms.CenterCrop(config.image_size),
            transforms.ToTensor(),
            transforms.Normalize(config.mean, config.std),
        ]
    )
    images = Images(sorted(folder.rglob("*.jpg")), transform)
    rows = []
    for batch, paths in DataLoader(images, batch_size=256, num_workers=num_cores()):
        probabilities, indices = network(batch).softmax(1).max(1)
        for path, index, probability in zip(paths, indices.tolist(), probabilities.tolist(), strict=True):
            rows.append((path, config.class_names[index], probability))
    with output.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


if __name__ == "__main__":
    main()
