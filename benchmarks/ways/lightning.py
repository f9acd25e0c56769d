"""Train as `dataloader` does, by PyTorch Lightning."""

from typing import Any

import pytorch_lightning as pl
import torch.nn.functional as F
from torch import Tensor, optim

from benchmarks.ways import is_reached, seed
from benchmarks.ways.dataloader import EPOCHS, LEARNING_RATE
from benchmarks.ways.peers import Net, loaders


class LitNet(pl.LightningModule):
    """The network with its training steps; Lightning's validation uses the test set."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.correct = self.total = 0

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        images, labels = batch
        self.correct += int((self.net(images).argmax(1) == labels).sum().item())
        self.total += len(labels)

    def on_validation_epoch_end(self) -> None:
        self.trainer.should_stop = is_reached(self.correct / self.total)
        self.correct = self.total = 0

    def configure_optimizers(self) -> Any:
        optimizer = optim.SGD(self.parameters(), lr=LEARNING_RATE, momentum=0.9, nesterov=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    """Train, and evaluate on the test set after each epoch."""
    pl.seed_everything(seed(), verbose=False)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(LitNet(), *loaders())


if __name__ == "__main__":
    main()
