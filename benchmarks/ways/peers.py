"""The CIFAR10 data set of torchvision and the tutorial's network, for the ways that use them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from benchmarks.ways import CIFAR10

BATCH_SIZE, TEST_BATCH_SIZE, NUM_WORKERS = 64, 500, 2


class PackedCIFAR10(datasets.CIFAR10):  # type: ignore[misc]  # torchvision ships no types
    """CIFAR10 from files that do not have the official MD5s; torchvision only checks that they exist."""

    train_list = tuple((name, None) for name, _ in datasets.CIFAR10.train_list)
    test_list = tuple((name, None) for name, _ in datasets.CIFAR10.test_list)
    meta = datasets.CIFAR10.meta | {"md5": None}


class Net(nn.Module):
    """The tutorial's network: (B, 3, 32, 32) float32 → (B, 10) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        logits: Tensor = self.fc3(x)
        return logits


def dataset(*, train: bool) -> Any:
    """Return a split of CIFAR-10, whose images become tensors with values from -1 to 1 when they are read."""
    to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))])
    return PackedCIFAR10(CIFAR10, train=train, transform=to_tensor)


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return loaders of the training and the test images, with workers that are reused in the next epoch."""
    return (
        DataLoader(dataset(train=True), BATCH_SIZE, shuffle=True, num_workers=NUM_WORKERS, persistent_workers=True),
        DataLoader(dataset(train=False), TEST_BATCH_SIZE, num_workers=NUM_WORKERS, persistent_workers=True),
    )


@torch.no_grad()
def accuracy(net: nn.Module, loader: DataLoader[Any]) -> float:
    """Return the fraction of correct predictions over all images of the loader."""
    correct = total = 0
    for images, labels in loader:
        correct += int((net(images).argmax(1) == labels).sum().item())
        total += len(labels)
    return correct / total
