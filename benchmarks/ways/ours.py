"""The pipeline's own training, on the arrays that its normalize made: a split is held out for validation.

Four fifths of an epoch are enough, where each test image is judged with its mirror image.
"""

import torch

from benchmarks.recipe import accuracy, first, load
from benchmarks.ways import RECIPE, arrays, is_reached, seed
from pipeline.models.inference import logits_of
from pipeline.params import check_params, compose
from pipeline.training.loop import VALIDATION_BATCH_SIZE, train

OVERRIDES = {
    "train.optimizer": "muon",
    "train.epochs": 1,
    "train.batch_size": 128,
    "train.learning_rate": 0.07,
    "train.schedule": "linear",
    "train.weight_decay": 0.0005,
    "train.warmup_fraction": 0.1,
    "train.flip": False,
    "train.crop_padding": 0,
    "train.device": "cpu",
}

SHARE = 0.8
"""Of the train split's images, among which all classes are mixed."""


def main() -> None:
    """Train, then judge on the test split."""
    more = {"train.seed": seed(), "train.cpu_threads": torch.get_num_threads()}  # as many threads as the other ways
    params = check_params(compose(RECIPE, OVERRIDES | more), origin=RECIPE).train
    classifier, splits = load(params, arrays())
    used = first(splits["train"], int(SHARE * len(splits["train"])))
    train(classifier, params=params, train_split=used, validation_split=splits["validation"])
    logits = logits_of(classifier, splits["test"], batch_size=VALIDATION_BATCH_SIZE, views="mirror")
    is_reached(accuracy(logits, splits["test"].labels))


if __name__ == "__main__":
    main()
