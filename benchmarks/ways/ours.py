"""The pipeline's own training, on the arrays that its normalize made: a split is held out for validation."""

import torch

from benchmarks.ways import CIFAR10, is_reached, seed
from pipeline.data import DatasetInfo, Split
from pipeline.loop import judge, prepare_torch, train
from pipeline.model import build, configure
from pipeline.params import check_params, compose

RECIPE = "cifar10_lenet"
OVERRIDES = {
    "train.optimizer": "muon",
    "train.epochs": 1,
    "train.batch_size": 160,
    "train.learning_rate": 0.07,
    "train.schedule": "linear",
    "train.weight_decay": 0.0005,
    "train.warmup_fraction": 0.1,
    "train.flip": False,
    "train.crop_padding": 0,
    "train.device": "cpu",
}


def main() -> None:
    """Train, then judge on the test split."""
    more = {"train.seed": seed(), "train.cpu_threads": torch.get_num_threads()}  # as many threads as the other ways
    params = check_params(compose(RECIPE, OVERRIDES | more), origin=RECIPE).train
    device, folder = prepare_torch(params), CIFAR10 / "normalize"
    info = DatasetInfo.read(folder)
    splits = {
        name: Split.read(name, info=info, device=device, folder=folder) for name in ("train", "validation", "test")
    }
    classifier = build(configure(params, info)).to(memory_format=torch.channels_last)
    train(classifier, params=params, train_split=splits["train"], validation_split=splits["validation"])
    is_reached(judge(classifier, splits["test"], loss=params.loss)[1])


if __name__ == "__main__":
    main()
