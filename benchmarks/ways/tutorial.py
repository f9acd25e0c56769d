"""Train as the PyTorch tutorial "Training a Classifier" does: two epochs with batches of 4, then the test set.

Where two epochs do not reach the target, the training continues for up to two more.
"""

from typing import Any

import torch
from torch import nn, optim
from torch.utils.data import DataLoader

from benchmarks.ways import is_reached, seed
from benchmarks.ways.peers import Net, accuracy, dataset

EPOCHS, MAX_EPOCHS = 2, 4


def train_epoch(epoch: int, net: nn.Module, loader: DataLoader[Any], optimizer: optim.Optimizer) -> None:
    """Train one epoch, and print the mean loss of every 2,000 mini-batches."""
    criterion = nn.CrossEntropyLoss()
    running_loss = 0.0
    for step, (inputs, labels) in enumerate(loader, start=1):
        optimizer.zero_grad()
        loss = criterion(net(inputs), labels)
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
        if step % 2000 == 0:
            print(f"[{epoch}, {step:5d}] loss: {running_loss / 2000:.3f}", flush=True)
            running_loss = 0.0


def main() -> None:
    """Train, and evaluate after the second and each later epoch."""
    torch.manual_seed(seed())
    train_loader = DataLoader(dataset(train=True), batch_size=4, shuffle=True, num_workers=2)
    test_loader = DataLoader(dataset(train=False), batch_size=4, shuffle=False, num_workers=2)
    net = Net()
    optimizer = optim.SGD(net.parameters(), lr=0.001, momentum=0.9)
    for epoch in range(1, MAX_EPOCHS + 1):
        train_epoch(epoch, net, train_loader, optimizer)
        if epoch >= EPOCHS and is_reached(accuracy(net, test_loader)):
            break


if __name__ == "__main__":
    main()
