import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.errors import UserError
from pipeline.models.airbench import EPSILON, Airbench
from pipeline.models.build import Classifier, build
from pipeline.models.inference import logits_of
from pipeline.params import check_params
from pipeline.recipes import compose
from pipeline.training.initialize import initialize_from_images
from pipeline.training.loop import TrainingResult, train
from tests.conftest import train_params
from tests.test_model import config
from tests.test_train import split_of

RECIPE = {"model": "airbench", "batch_size": 16, "bias_learning_rate_factor": 64.0, "schedule": "linear"}
RECIPE |= {"average_every_steps": 2, "learning_rate": 0.3, "momentum": 0.85, "epochs": 4, "flip": False}


def patches(images: Tensor) -> Tensor:
    return F.unfold(images, 2).transpose(1, 2).reshape(-1, images.shape[1] * 4)


def smooth_images(number: int) -> Tensor:
    """Return images (N, 3, 32, 32) float32 in which neighboring pixels are alike, as in photographs."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.randn(number, 3, 8, 8, generator=draw)
    return F.interpolate(coarse, size=32, mode="bilinear") + 0.1 * torch.randn(number, 3, 32, 32, generator=draw)


def test_the_first_layer_whitens_the_patches_of_the_images() -> None:
    images, network = smooth_images(64), Airbench(num_classes=10, channels=3, image_size=32)
    network.whiten(torch.split(images, 16))
    filters = network.whitening.weight.view(24, 12)
    responses = patches(images) @ filters[:12].T
    covariance = responses.T @ responses / len(responses)
    variances = torch.linalg.eigvalsh((patches(images).T @ patches(images) / len(responses)).double())
    expected = torch.diag(variances / (variances + EPSILON)).float()
    torch.testing.assert_close(covariance, expected, atol=1e-3, rtol=0)
    assert torch.equal(filters[:12], -filters[12:])


def test_the_first_layer_does_not_depend_on_the_size_of_batches() -> None:
    images = smooth_images(64)
    weights = []
    for size in (16, 64):
        network = Airbench(num_classes=10, channels=3, image_size=32)
        network.whiten(torch.split(images, size))
        weights.append(network.whitening.weight.detach().abs())  # the sign of an eigenvector is arbitrary
    torch.testing.assert_close(weights[0], weights[1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("size", "channels", "classes"), [(25, 1, 2), (32, 3, 10), (64, 3, 5)])
def test_airbench_takes_images_of_other_sizes(size: int, channels: int, classes: int) -> None:
    network = Airbench(num_classes=classes, channels=channels, image_size=size)
    assert network(torch.randn(2, channels, size, size)).shape == (2, classes)


def test_images_that_are_too_small_are_refused() -> None:
    with pytest.raises(UserError, match="needs images of at least 25 pixels, found 24"):
        Airbench(num_classes=10, channels=3, image_size=24)


def test_a_new_convolution_returns_its_input() -> None:
    network = Airbench(num_classes=10, channels=3, image_size=32)
    images, convolution = torch.randn(2, 64, 8, 8), network[6]
    torch.testing.assert_close(convolution(images), images)


def run(**changes: object) -> tuple[Classifier, TrainingResult]:
    params = train_params(**RECIPE | changes)
    torch.manual_seed(0)
    classifier = build(config("airbench", classes=3))
    split = split_of(96, seed=1)
    initialize_from_images(classifier, split, seed=0)
    return classifier, train(classifier, params=params, train_split=split, validation_split=split_of(24, seed=2))


@pytest.mark.slow
def test_airbench_learns_and_two_runs_are_bit_identical() -> None:
    (_, first), (_, second) = run(), run()
    assert first.history[-1].validation_accuracy > 0.9
    assert first.history == second.history
    assert all(torch.equal(first.last[name], second.last[name]) for name in first.last)


def test_weights_that_are_not_trained_stay_unchanged() -> None:
    _, trained = run(epochs=1)
    torch.manual_seed(0)
    before = build(config("airbench", classes=3))
    assert isinstance(before.network, Airbench)
    initialize_from_images(before, split_of(96, seed=1), seed=0)
    assert torch.equal(trained.last["network.0.weight"], before.network.whitening.weight)
    assert torch.equal(trained.last["network.4.weight"], torch.ones(64))


def test_several_views_give_the_weighted_mean_of_their_logits() -> None:
    classifier, _ = run(epochs=1)
    split = split_of(10, seed=3)
    plain, mirror = (logits_of(classifier, split, batch_size=10, views=views) for views in ("none", "mirror"))
    flipped = split_of(10, seed=3)
    flipped.images.copy_(flipped.images.flip(2))
    other = logits_of(classifier, flipped, batch_size=10)
    torch.testing.assert_close(mirror, (plain + other) / 2)
    shifted = logits_of(classifier, split, batch_size=4, views="mirror_and_shift")
    assert shifted.shape == plain.shape
    assert not torch.allclose(shifted, mirror)


def test_the_recipe_is_complete() -> None:
    params = check_params(compose("cifar10_fast94", {}), origin="recipe")
    assert (params.train.model, params.evaluate.test_time_augmentation) == ("airbench", "mirror_and_shift")
