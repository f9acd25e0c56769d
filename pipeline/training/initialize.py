"""Compute the first weights of an Airbench from images of the train split."""

import itertools

from pipeline.arrays import Split
from pipeline.models.airbench import Airbench
from pipeline.models.build import Classifier
from pipeline.training.augmentation import Augmentation
from pipeline.training.batches import TrainingBatches

NUM_WHITENING_IMAGES = 5_000


def initialize_from_images(classifier: Classifier, split: Split, *, seed: int) -> None:
    """Set the whitening filters of an Airbench from up to 5,000 images of the train split.

    The images may be on another device than the network.
    """
    assert isinstance(classifier.network, Airbench)
    batch_size = min(len(split), 500)
    batches = TrainingBatches(split, batch_size=batch_size, seed=seed, epoch=0, augmentation=Augmentation())
    images = (images for images, _ in itertools.islice(batches, NUM_WHITENING_IMAGES // batch_size))
    # MPS has no float64
    classifier.network.whiten(batch.cpu() if batch.device.type == "mps" else batch for batch in images)
