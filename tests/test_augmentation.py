import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.arrays import DatasetInfo, Split
from pipeline.core.errors import UserError
from pipeline.models.losses import count_correct, loss_function
from pipeline.params import TrainParams
from pipeline.train import check_params_fit_data
from pipeline.training.augmentation import (
    Augmentation,
    apply_to_each,
    erasing_transform,
    mixing_transform,
    pixel_transform,
)
from pipeline.training.batches import TrainingBatches, epoch_batches
from pipeline.training.loop import TrainingResult
from tests.conftest import DEFAULTS, colored_images, train_params, write_normalized
from tests.test_resume import assert_same, one_thread, run, stopped  # noqa: F401  # a fixture
from tests.test_train import QUICK

PIXELS: dict[str, dict[str, Any]] = {
    "random_resized_crop": {"random_resized_crop": 0.3},
    "color_jitter": {"color_jitter": 0.4},
    "rand_augment": {"auto_augment": "rand_augment"},
    "trivial_augment": {"auto_augment": "trivial_augment"},
}
SINGLE = PIXELS | {"random_erasing": {"random_erasing": 0.7}}
MIXING: dict[str, dict[str, Any]] = {
    "mixup": {"mixup_alpha": 0.4},
    "cutmix": {"cutmix_alpha": 1.0},
    "mixup_and_cutmix": {"mixup_alpha": 0.4, "cutmix_alpha": 1.0},
}
ALL_AT_ONCE = {name: value for changes in (*SINGLE.values(), *MIXING.values()) for name, value in changes.items()}
EACH = SINGLE | MIXING | {"all": ALL_AT_ONCE | {"flip": True, "crop_padding": 3, "cutout_size": 8}}


def split_of(images: Any, labels: Any = None) -> Split:
    channels = images.shape[3]
    labels = np.arange(len(images)) % 3 if labels is None else labels
    return Split.of(images, labels, mean=[0.5] * channels, std=[0.25] * channels)


def batches(split: Split, **changes: Any) -> TrainingBatches:
    placing: dict[str, Any] = {"batch_size": 8, "seed": 0, "epoch": 1, "num_classes": 3}
    placing |= {name: changes.pop(name) for name in [*placing, "rank", "processes", "position"] if name in changes}
    return TrainingBatches(split, augmentation=Augmentation(**changes), **placing)


def same_images(number: int, *, channels: int = 3, size: int = 32) -> Split:
    """Return a split that has the same image of random pixels several times."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, size, size, channels), dtype=np.uint8)
    return split_of(pixels.repeat(number, 0))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", SINGLE)
def test_each_image_is_transformed_on_its_own_also_a_gray_one(name: str, channels: int) -> None:
    [(plain, labels), _] = batches(same_images(16, channels=channels))
    [(found, same_labels), _] = batches(same_images(16, channels=channels), **SINGLE[name])
    assert (found.shape, found.dtype) == (plain.shape, torch.float32)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(labels, same_labels)
    assert len({image.numpy().tobytes() for image in found}) > 3


@pytest.mark.parametrize("name", EACH)
def test_a_stopped_training_resumes_with_the_same_bits(name: str) -> None:
    params = train_params(**QUICK | {"batch_size": 8, "log_every_steps": 1}, **EACH[name])
    whole, plain = run(params), run(train_params(**QUICK | {"batch_size": 8}))
    assert_same(stopped(params, 2, 5), whole)
    assert isinstance(whole, TrainingResult)
    assert isinstance(plain, TrainingResult)
    assert whole.history != plain.history


@pytest.mark.parametrize("name", SINGLE)
def test_the_augmentation_of_an_image_does_not_depend_on_the_number_of_processes(name: str) -> None:
    split = split_of(*colored_images(24))
    whole = list(batches(split, **EACH[name]))
    slices = [list(batches(split, **EACH[name], rank=rank, processes=2)) for rank in range(2)]
    for (images, labels), *parts in zip(whole, *slices, strict=True):
        assert torch.equal(torch.cat([part for part, _ in parts]), images)
        assert torch.equal(torch.cat([part for _, part in parts]), labels)


@pytest.mark.parametrize("name", MIXING)
def test_each_process_mixes_its_slice_with_the_same_draw(name: str) -> None:
    split = split_of(*colored_images(24))
    largest_shares = [
        [set(labels.amax(1).tolist()) - {1.0} for _, labels in batches(split, **MIXING[name], rank=rank, processes=2)]
        for rank in range(2)
    ]
    assert largest_shares[0] == largest_shares[1]
    assert all(largest_shares[0])


@pytest.mark.parametrize("name", EACH)
def test_augmentation_depends_on_seed_and_epoch_and_leaves_all_random_states_as_they_are(name: str) -> None:
    split = split_of(*colored_images(16))
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    drawn = [list(batches(split, **EACH[name], seed=s, epoch=e)) for s, e in [(1, 2), (1, 2), (2, 2), (1, 3)]]
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert all(np.array_equal(one, other) for one, other in zip(before[2], after[2], strict=True))
    first, same, *others = (torch.cat([images for images, _ in found]) for found in drawn)
    assert torch.equal(first, same)
    assert not any(torch.equal(first, other) for other in others)


def draws(transform: Any, image: Tensor, *, seed: int) -> list[Any]:
    """Return the shape of the result, and the state of the generator on the CPU after the draws."""
    torch.manual_seed(seed)
    return [transform(image).shape, torch.get_rng_state().tolist()]


@pytest.mark.parametrize("name", SINGLE)
def test_the_draws_do_not_depend_on_the_device(name: str) -> None:
    """A tensor on the device `meta` has no values: all decisions come from the generator on the CPU."""
    augmentation = Augmentation(**SINGLE[name])
    transform = pixel_transform(augmentation, image_size=32) or erasing_transform(augmentation)
    for seed in range(30):
        image = torch.zeros((3, 32, 32), dtype=torch.float32 if name == "random_erasing" else torch.uint8)
        assert draws(transform, image, seed=seed) == draws(transform, image.to("meta"), seed=seed)


def test_without_augmentation_there_is_no_transform() -> None:
    augmentation = Augmentation.of(train_params(color_jitter=0, mixup_alpha=0))
    assert pixel_transform(augmentation, image_size=32) is None
    assert erasing_transform(augmentation) is None
    assert mixing_transform(augmentation, num_classes=3) is None


@pytest.mark.parametrize(("input_size", "size"), [(None, 32), (24, 24), (40, 40)])
def test_a_random_resized_crop_has_the_size_and_normalization_of_the_network_s_input(
    input_size: int | None, size: int
) -> None:
    images = np.full((8, 32, 32, 3), (51, 102, 204), dtype=np.uint8)
    split = Split.of(images, np.zeros(8, dtype=np.int64), mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 0.1])
    params = train_params(batch_size=8, random_resized_crop=0.2, input_size=input_size, crop_padding=0)
    [(found, _)] = epoch_batches(split, params=params, epoch=1)
    assert found.shape == (8, 3, size, size)
    torch.testing.assert_close(found, torch.tensor([0.2, 0.8, 5.0]).view(1, 3, 1, 1).expand_as(found))


def test_a_random_resized_crop_has_at_least_the_given_fraction_of_the_area() -> None:
    """The red value of each pixel is its column, the green one its row."""
    image = np.zeros((1, 200, 200, 3), dtype=np.uint8)
    image[..., 0], image[..., 1] = np.meshgrid(np.arange(200), np.arange(200))
    transform = pixel_transform(Augmentation(random_resized_crop=0.5), image_size=200)
    pixels = torch.from_numpy(image.repeat(50, 0)).permute(0, 3, 1, 2)
    found = torch.stack(apply_to_each(transform, pixels, seeds=range(50))).float()  # type: ignore[arg-type]
    sides = found.amax((2, 3)) - found.amin((2, 3)) + 1
    areas = sides[:, 0] * sides[:, 1] / 200**2
    assert areas.min() > 0.48
    assert areas.max() > 0.85
    assert areas.min() < 0.6


def test_cutout_stays_inside_a_crop_that_is_smaller_than_the_image() -> None:
    images = np.full((64, 32, 32, 3), 99, dtype=np.uint8)
    [(found, _)] = batches(split_of(images), batch_size=64, random_resized_crop=0.5, input_size=16, cutout_size=6)
    blank = (found == 0).all(1).sum((1, 2))
    assert blank.max() == 36
    assert blank.min() >= 9


def test_color_jitter_changes_the_brightness_of_a_gray_image_by_at_most_the_given_fraction() -> None:
    images = np.full((32, 16, 16, 1), 100, dtype=np.uint8)
    [(found, _)] = batches(split_of(images), batch_size=32, color_jitter=0.2)
    pixels = found * 0.25 * 255 + 0.5 * 255
    assert pixels.min() > 78
    assert pixels.max() < 122
    assert pixels.std() > 3


def test_random_erasing_sets_one_rectangle_to_the_mean_and_leaves_the_rest() -> None:
    split = split_of(np.full((64, 32, 32, 3), 99, dtype=np.uint8))
    [(plain, _)] = batches(split, batch_size=64)
    [(found, _)] = batches(split, batch_size=64, random_erasing=0.5)
    erased = (found == 0).all(1)
    assert torch.equal(found.where(~erased.unsqueeze(1), plain), plain)
    count = erased.sum((1, 2))
    assert 16 < (count > 0).sum() < 48
    assert torch.equal(count, erased.any(1).sum(1) * erased.any(2).sum(1))


def mixed(**alphas: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images and one-hot labels of a batch before mixing, and after it."""
    split = split_of(*colored_images(16))
    [(images, labels)] = batches(split, batch_size=16)
    [(mixed_images, shares)] = batches(split, batch_size=16, **alphas)
    return images, F.one_hot(labels, 3).float(), mixed_images, shares


def test_mixup_mixes_images_and_labels_by_the_same_weight() -> None:
    images, one_hot, mixed_images, shares = mixed(mixup_alpha=1.0)
    weight = torch.linalg.lstsq(
        (one_hot - one_hot.roll(1, 0)).view(-1, 1), (shares - one_hot.roll(1, 0)).view(-1, 1)
    ).solution.item()
    assert 0.01 < weight < 0.99
    torch.testing.assert_close(mixed_images, weight * images + (1 - weight) * images.roll(1, 0))
    torch.testing.assert_close(shares, weight * one_hot + (1 - weight) * one_hot.roll(1, 0))


def test_cutmix_pastes_a_rectangle_whose_area_is_the_share_of_its_label() -> None:
    images, one_hot, mixed_images, shares = mixed(cutmix_alpha=1.0)
    pasted = (mixed_images != images).any(0).any(0)
    assert torch.equal(mixed_images, torch.where(pasted, images.roll(1, 0), images))
    share = pasted.float().mean()
    assert 0.01 < share < 0.99
    torch.testing.assert_close(shares, (1 - share) * one_hot + share * one_hot.roll(1, 0))


def test_with_mixup_and_cutmix_each_batch_gets_one_of_both() -> None:
    split = split_of(*colored_images(16))
    is_cutmix = []
    for epoch in range(1, 25):
        [(images, _)] = batches(split, batch_size=16, epoch=epoch)
        [(found, _)] = batches(split, batch_size=16, epoch=epoch, mixup_alpha=1.0, cutmix_alpha=1.0)
        is_cutmix.append(bool(((found == images) | (found == images.roll(1, 0))).all()))
    assert 5 < sum(is_cutmix) < 19


@pytest.mark.parametrize(("loss", "smoothing"), [("cross_entropy", 0.0), ("cross_entropy", 0.1), ("mse", 0.0)])
def test_the_loss_of_one_hot_labels_is_that_of_the_labels(loss: str, smoothing: float) -> None:
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    function = loss_function(loss, label_smoothing=smoothing)
    torch.testing.assert_close(function(logits, F.one_hot(labels, 3).float()), function(logits, labels))


def test_the_loss_of_mixed_labels_is_the_mean_of_the_losses_of_both() -> None:
    logits, first, second = torch.randn(4, 3), torch.tensor([0, 1, 2, 2]), torch.tensor([1, 1, 0, 2])
    shares = 0.3 * F.one_hot(first, 3) + 0.7 * F.one_hot(second, 3)
    function = loss_function("cross_entropy")
    torch.testing.assert_close(function(logits, shares), 0.3 * function(logits, first) + 0.7 * function(logits, second))


def test_a_mixed_image_is_correct_where_the_class_with_the_largest_share_is_found() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    assert count_correct(logits, torch.tensor([[0.6, 0.4, 0.0], [0.4, 0.6, 0.0]])) == 1
    assert count_correct(logits, torch.tensor([0, 1])) == 1


def fits(tmp_path: Any, **changes: Any) -> None:
    check_params_fit_data(train_params(**changes), DatasetInfo.read(write_normalized(tmp_path)))


def test_mixing_needs_two_images_in_each_process(tmp_path: Any) -> None:
    with pytest.raises(UserError, match=r"train\.cutmix_alpha is 1, but .* one image, .*at least 4"):
        fits(tmp_path, cutmix_alpha=1.0, batch_size=2, processes=2)
    fits(tmp_path, cutmix_alpha=1.0, batch_size=4, processes=2)


def test_the_limit_of_cutout_is_that_of_the_crop(tmp_path: Any) -> None:
    fits(tmp_path, cutout_size=40, random_resized_crop=0.5, input_size=48)
    with pytest.raises(UserError, match=r"train\.cutout_size is 20, but the images have 16 pixels a side"):
        fits(tmp_path, cutout_size=20, random_resized_crop=0.5, input_size=16)


def test_the_augmentation_has_the_values_of_the_parameters() -> None:
    changes = ALL_AT_ONCE | {"flip": True, "crop_padding": 3, "cutout_size": 8, "input_size": 24}
    assert Augmentation.of(train_params(**changes)) == Augmentation(**changes)
    assert set(Augmentation.__dataclass_fields__) <= set(TrainParams.model_fields) == set(DEFAULTS["train"])
