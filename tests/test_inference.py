"""The bits of a trained network's logits on the CPU depend neither on other images and their number nor on threads.

In plain batches they usually do, but that depends on CPU, network and batch, and is therefore no test.
"""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from pipeline.arrays import Split
from pipeline.models.build import Classifier, build
from pipeline.models.inference import IMAGES_PER_CHUNK, logits_of, trained_logits
from pipeline.params import Views
from tests.conftest import colored_images
from tests.test_model import config

NETWORKS = ("lenet", "airbench", "resnet18", "timm/tf_efficientnet_lite0")
IMAGES = np.random.default_rng(0).permutation(colored_images(40)[0])


def network(name: str) -> Classifier:
    torch.manual_seed(0)
    return build(config(name)).eval()


def logits(classifier: Classifier, indices: Sequence[int], *, threads: int = 1, views: Views = "none") -> torch.Tensor:
    """Return the logits of these images by their index, in this order."""
    images = IMAGES[list(indices)]
    split = Split.of(images, np.zeros(len(images), np.int64), mean=(0.5,) * 3, std=(0.2,) * 3)
    return trained_logits(classifier, split, threads=threads, batch_size=len(images), views=views)


@pytest.mark.parametrize("views", ["none", "mirror_and_shift"])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_image_has_the_same_bits_at_any_position_among_any_images(name: str, views: Views) -> None:
    classifier = network(name)
    expected = logits(classifier, range(18), threads=2, views=views)
    others = [30, 17, 39, 3, 25]
    found = logits(classifier, others, threads=1, views=views)
    assert torch.equal(found[[1, 3]], expected[[17, 3]])
    assert torch.equal(logits(classifier, [17], threads=1, views=views)[0], expected[17])


@pytest.mark.parametrize("number", [1, IMAGES_PER_CHUNK - 1, IMAGES_PER_CHUNK, IMAGES_PER_CHUNK + 1, len(IMAGES)])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_an_image_has_the_same_bits_with_any_number_of_images_and_threads(number: int, threads: int) -> None:
    classifier = network("lenet")
    expected = logits(classifier, range(len(IMAGES)))
    assert torch.equal(logits(classifier, range(number), threads=threads), expected[:number])


@pytest.mark.parametrize("views", ["none", "mirror", "mirror_and_shift"])
def test_the_logits_are_those_of_plain_batches_but_for_rounding(views: Views) -> None:
    classifier = network("lenet")
    split = Split.of(IMAGES, np.zeros(len(IMAGES), np.int64), mean=(0.5,) * 3, std=(0.2,) * 3)
    plain = logits_of(classifier, split, batch_size=len(IMAGES), views=views)
    torch.testing.assert_close(logits(classifier, range(len(IMAGES)), views=views), plain, rtol=0, atol=1e-6)


def test_the_number_of_threads_of_pytorch_is_as_before() -> None:
    before = torch.get_num_threads()
    logits(network("lenet"), range(20), threads=before + 1)
    assert torch.get_num_threads() == before
