"""Unequal classes: weights in the loss, a balanced sampler, and epochs selected by macro F1 or loss."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import balanced_accuracy_score, f1_score
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor

from pipeline.arrays import Split
from pipeline.artifacts import write_checksums
from pipeline.core.errors import UserError
from pipeline.core.yaml import dump_yaml
from pipeline.evaluation.logits import predictions_of
from pipeline.evaluation.metrics import evaluate
from pipeline.models.build import build
from pipeline.models.losses import balanced_class_weights, loss_function
from pipeline.training import distributed, loop
from pipeline.training.augmentation import Augmentation
from pipeline.training.batches import TrainingBatches, epoch_batches
from pipeline.training.checkpoints import Checkpoint
from pipeline.training.loop import train, training_loss, validate
from pipeline.training.selection import epochs_since_best, select_epoch
from pipeline.training.state import Epoch, Validation
from tests.conftest import DEFAULTS, run_step, train_params, write_normalized
from tests.test_model import config
from tests.test_resume import assert_same, run, stopped
from tests.test_train import QUICK, split_of

COUNTS = (500, 90, 10)  # images of each class
LABELS = torch.arange(3).repeat_interleave(torch.tensor(COUNTS))
WEIGHTS = balanced_class_weights(LABELS)
LOSSES: list[tuple[str, dict[str, Any]]] = [("cross_entropy", {"label_smoothing": 0.1}), ("mse", {})]
BALANCED = [{"class_weights": "balanced"}, {"sampler": "balanced"}]


def unequal_split() -> Split:
    """Return a split of 600 tiny images that are numbered by their pixels, in a random order."""
    labels = LABELS[torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(0))].numpy()
    images = np.arange(len(labels), dtype=np.uint32).view(np.uint8).reshape(len(labels), 2, 2, 1)
    return Split.of(images, labels, mean=[0.0], std=[1 / 255])


def drawn(split: Split, **changes: Any) -> tuple[Tensor, Tensor]:
    """Return the numbers and the labels of the images of an epoch, in the order in which they are drawn."""
    values: dict[str, Any] = {"batch_size": 20, "seed": 0, "epoch": 1, "sampler": "balanced"}
    batches = list(TrainingBatches(split, augmentation=Augmentation(), **values | changes))
    pixels = torch.cat([images for images, _ in batches]).flatten(1).long()
    return pixels @ torch.tensor([1, 256, 256**2, 256**3]), torch.cat([labels for _, labels in batches])


def unequal_targets(*, mixed: bool) -> tuple[Tensor, Tensor]:
    """Return logits (8, 3) that need a gradient, and labels (8,), or the shares of mixed images (8, 3)."""
    random = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 0, 2])
    shares = torch.rand(8, 3, generator=random).softmax(1)
    return torch.randn(8, 3, generator=random).requires_grad_(), shares if mixed else labels


def test_class_weights_equal_those_of_scikit_learn() -> None:
    expected = compute_class_weight("balanced", classes=np.arange(3), y=LABELS.numpy())
    assert WEIGHTS.tolist() == pytest.approx(expected.tolist())
    assert WEIGHTS[LABELS].mean().item() == pytest.approx(1)


def test_a_class_without_images_leaves_the_mean_weight_at_1() -> None:
    labels = torch.tensor([0, 0, 0, 2])
    weights = balanced_class_weights(labels)
    assert weights[1] == 0
    assert weights[labels].mean().item() == pytest.approx(1)


@pytest.mark.parametrize(("name", "options"), LOSSES)
def test_a_weighted_loss_is_the_weighted_sum_of_the_losses_by_image_over_their_number(
    name: str, options: dict[str, Any]
) -> None:
    logits, labels = unequal_targets(mixed=False)
    unweighted = loss_function(name, **options)
    by_image = torch.stack([unweighted(logits[i : i + 1], labels[i : i + 1]) for i in range(len(labels))])
    found = loss_function(name, **options, class_weights=WEIGHTS)(logits, labels)
    torch.testing.assert_close(found, (WEIGHTS[labels] * by_image).sum() / len(labels))


@pytest.mark.parametrize(("name", "options"), LOSSES)
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_labels_and_their_one_hot_shares_have_the_same_loss(
    name: str, options: dict[str, Any], weights: Tensor | None
) -> None:
    logits, labels = unequal_targets(mixed=False)
    criterion = loss_function(name, **options, class_weights=weights)
    shares = torch.nn.functional.one_hot(labels, 3).float()
    torch.testing.assert_close(criterion(logits, labels), criterion(logits, shares))


@pytest.mark.parametrize(("name", "options"), LOSSES)
def test_a_mixed_image_has_the_mixed_weight(name: str, options: dict[str, Any]) -> None:
    logits, _ = unequal_targets(mixed=False)
    shares = torch.tensor([[0.25, 0.0, 0.75]])
    unweighted = loss_function(name, **options)(logits[:1], shares)
    found = loss_function(name, **options, class_weights=WEIGHTS)(logits[:1], shares)
    torch.testing.assert_close(found, unweighted * (0.25 * WEIGHTS[0] + 0.75 * WEIGHTS[2]))


def test_a_mixed_image_of_a_network_with_more_classes_than_the_split_has_a_finite_loss() -> None:
    weights = balanced_class_weights(torch.tensor([0, 1, 1]))  # the third class has no images
    shares = torch.tensor([[0.5, 0.5, 0.0]])
    assert loss_function("cross_entropy", class_weights=weights)(torch.zeros(1, 3), shares).isfinite()


@pytest.mark.parametrize(("name", "options"), LOSSES)
@pytest.mark.parametrize("mixed", [False, True])
def test_the_mean_gradient_of_two_slices_is_the_gradient_of_the_batch(
    name: str, options: dict[str, Any], *, mixed: bool
) -> None:
    logits, targets = unequal_targets(mixed=mixed)
    criterion = loss_function(name, **options, class_weights=WEIGHTS)
    [whole] = torch.autograd.grad(criterion(logits, targets), logits)
    slices = [criterion(logits[part], targets[part]) for part in (slice(4), slice(4, 8))]
    [averaged] = torch.autograd.grad((slices[0] + slices[1]) / 2, logits)
    torch.testing.assert_close(averaged, whole)


def test_the_training_weights_the_classes_of_its_train_split() -> None:
    logits, labels = unequal_targets(mixed=False)
    params = train_params(class_weights="balanced", label_smoothing=0.1)
    expected = loss_function("cross_entropy", label_smoothing=0.1, class_weights=WEIGHTS)(logits, labels)
    assert training_loss(params, unequal_split())(logits, labels) == expected


def test_the_balanced_sampler_draws_each_class_equally_often() -> None:
    labels = torch.cat([drawn(unequal_split(), epoch=epoch)[1] for epoch in range(1, 51)])
    # 30,000 draws: the standard deviation of a fraction is 0.0027
    assert (labels.bincount() / len(labels)).tolist() == pytest.approx([1 / 3] * 3, abs=0.011)


def test_the_balanced_sampler_draws_each_image_of_a_class_equally_often() -> None:
    numbers = torch.cat([drawn(unequal_split(), epoch=epoch)[0] for epoch in range(1, 51)])
    counts = numbers.bincount(minlength=len(LABELS))[unequal_split().labels == 2]
    # 1,000 draws expected of each of 10 images: the standard deviation is about 31
    assert counts.tolist() == pytest.approx([1000] * 10, abs=130)


def test_the_sampler_pairs_each_image_with_its_label() -> None:
    numbers, labels = drawn(unequal_split())
    assert torch.equal(unequal_split().labels[numbers], labels)


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    first, again, *others = (drawn(unequal_split(), **changes)[0] for changes in ({}, {}, {"seed": 1}, {"epoch": 2}))
    assert torch.equal(first, again)
    assert not any(torch.equal(first, other) for other in others)


def test_the_slices_of_all_ranks_are_the_batches_of_one_process() -> None:
    whole = drawn(unequal_split())[0].view(-1, 20)
    slices = [drawn(unequal_split(), rank=rank, processes=2)[0].view(-1, 10) for rank in range(2)]
    assert torch.equal(torch.cat(slices, 1), whole)


def test_epochs_begin_at_any_position() -> None:
    whole, rest = drawn(unequal_split())[0], drawn(unequal_split(), position=7)[0]
    assert torch.equal(whole[7 * 20 :], rest)


def windows(split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Split:
    """Return the split with its images in a file, of which windows of 60 images are read in blocks of 20."""
    np.save(tmp_path / "images.npy", split.images.numpy())
    images = np.load(tmp_path / "images.npy", mmap_mode="c")
    monkeypatch.setattr("pipeline.training.batches.BLOCK_BYTES", 20 * split.image_bytes)
    return Split.of(images, split.labels.numpy(), mean=[0.0], std=[1 / 255], window_bytes=60 * split.image_bytes)


def test_the_sampler_raises_the_rare_classes_in_windows_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = windows(unequal_split(), tmp_path, monkeypatch)
    assert split.file is not None
    found = [drawn(split, epoch=epoch) for epoch in range(1, 51)]
    labels = torch.cat([labels for _, labels in found])
    assert torch.equal(split.labels[torch.cat([numbers for numbers, _ in found])], labels)
    # the rarest class is in some of the ten windows only: see `draw_order`
    fractions = (labels.bincount() / len(labels)).tolist()
    assert fractions[1] == pytest.approx(0.37, abs=0.06)
    assert 0.15 < fractions[2] < 0.33


def test_epoch_batches_use_the_sampler_of_the_parameters() -> None:
    found = epoch_batches(
        unequal_split(), params=train_params(sampler="balanced", batch_size=20, crop_padding=0), epoch=1
    )
    assert torch.equal(torch.cat([labels for _, labels in found]), drawn(unequal_split())[1])


def test_weights_and_sampler_together_are_refused() -> None:
    with pytest.raises(UserError, match="rare classes would be weighted twice; allowed: one of both"):
        train_params(class_weights="balanced", sampler="balanced")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [*BALANCED, {"class_weights": "balanced", "loss": "mse"}])
def test_a_resumed_training_ends_with_the_same_bits(changes: dict[str, str]) -> None:
    values = {"log_every_steps": 1, "learning_rate": 0.01, "select_by": "macro_f1"}
    params = train_params(**{**QUICK, **values, **changes})
    assert_same(stopped(params, 2, 5, 7), run(params))


@pytest.mark.slow
@pytest.mark.parametrize("changes", BALANCED)
def test_balancing_changes_what_a_training_learns(changes: dict[str, str]) -> None:
    split = split_of(60, seed=1)
    unequal = replace(split, labels=(split.labels + 1).clamp(max=2) % 3)  # 20 and 40 images of two classes

    def last(**changes: Any) -> Tensor:
        torch.manual_seed(0)
        params = train_params(**QUICK, **changes)
        classifier = build(config("lenet", classes=3))
        return train(classifier, params=params, train_split=unequal, validation_split=split).last["network.0.weight"]

    assert not torch.equal(last(**changes), last())


def predictions(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return logits (200, 5) and labels (200,); class 3 has images that are never recognized, class 4 has none."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(torch.tensor([0.6, 0.2, 0.15, 0.05, 0.0]), 200, replacement=True, generator=random)
    logits = torch.randn(200, 5, generator=random)
    logits[torch.arange(200), labels] += 1
    logits[:, 3:] = -9
    return logits, labels


def validated(monkeypatch: pytest.MonkeyPatch) -> Validation:
    """Validate a network of which `predictions` are the logits."""
    logits, labels = predictions()
    split = Split.of(np.zeros((200, 2, 2, 1), np.uint8), labels.numpy(), mean=[0.0], std=[1.0])

    def slice_of_logits(*_: Any, between: tuple[int, int], **__: Any) -> Tensor:
        return logits[slice(*between)]

    monkeypatch.setattr(loop, "logits_of", slice_of_logits)
    return validate(build(config("lenet", classes=5)), split, loss="cross_entropy")


def test_macro_f1_and_balanced_accuracy_equal_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = predictions()
    names = [str(number) for number in range(5)]
    metrics = evaluate(predictions_of(logits, labels.numpy(), class_names=names), top_k=9, duplicates=()).metrics
    predicted = logits.argmax(1)
    expected = f1_score(labels, predicted, labels=range(5), average="macro", zero_division=0)
    assert metrics["macro_f1"] == pytest.approx(expected, abs=1e-12)
    assert metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted), abs=1e-12)
    found = validated(monkeypatch)
    assert (found.macro_f1, found.accuracy) == (metrics["macro_f1"], metrics["accuracy"])


def test_all_ranks_together_validate_as_one_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = validated(monkeypatch)
    sums: list[Tensor] = []

    def collect(values: Tensor) -> Tensor:
        sums.append(values)
        return values

    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(distributed, "sum_over_ranks", collect)
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        validated(monkeypatch)
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda values: torch.stack(sums).sum(0))
    found = validated(monkeypatch)
    assert (found.accuracy, found.macro_f1) == (whole.accuracy, whole.macro_f1)
    assert found.loss == pytest.approx(whole.loss)


def epochs(*results: tuple[float, float, float]) -> list[Epoch]:
    """Return epochs with these validation accuracies, macro F1 and losses."""
    return [
        Epoch(number, 0.1, 0.5, 0.5, validation_loss=loss, validation_accuracy=accuracy, validation_macro_f1=macro_f1)
        for number, (accuracy, macro_f1, loss) in enumerate(results, 1)
    ]


HISTORY = epochs((0.9, 0.5, 0.3), (0.8, 0.7, 0.9), (0.7, 0.6, 0.2), (0.6, 0.4, 0.8))


@pytest.mark.parametrize(
    ("select_by", "epoch", "reason", "stalled"),
    [
        ("accuracy", 1, "highest validation accuracy", 3),
        ("macro_f1", 2, "highest validation macro F1", 2),
        ("loss", 3, "lowest validation loss", 1),
    ],
)
def test_the_epoch_is_selected_by_what_select_by_names(select_by: str, epoch: int, reason: str, stalled: int) -> None:
    params = train_params(select_by=select_by)
    found = select_epoch(HISTORY, params=params, num_images=100)
    assert (found.epoch, found.reason) == (epoch, reason)
    assert epochs_since_best(HISTORY, params=params, num_images=100) == stalled


TIES: list[tuple[str, list[Epoch], int, str]] = [
    (
        "macro_f1",
        epochs((0.5, 0.7, 0.4), (0.5, 0.7, 0.3), (0.9, 0.6, 0.1)),
        2,
        "lowest validation loss of 2 with the highest validation macro F1",
    ),
    (
        "macro_f1",
        epochs((0.5, 0.7, 0.3), (0.6, 0.7, 0.3)),
        2,
        "latest of 2 with the highest validation macro F1 and the lowest loss",
    ),
    ("loss", epochs((0.9, 0.7, 0.3), (0.5, 0.5, 0.3)), 2, "latest of 2 with the lowest validation loss"),
]


@pytest.mark.parametrize(("select_by", "history", "epoch", "reason"), TIES)
def test_of_equal_epochs_that_of_lower_loss_and_then_the_later_is_selected(
    select_by: str, history: list[Epoch], epoch: int, reason: str
) -> None:
    found = select_epoch(history, params=train_params(select_by=select_by), num_images=100)
    assert (found.epoch, found.reason) == (epoch, reason)


@pytest.mark.parametrize(
    ("select_by", "value"),
    [
        ("macro_f1", lambda epoch: epoch.validation_macro_f1),
        ("loss", lambda epoch: -epoch.validation_loss),
    ],
)
def test_a_training_selects_by_its_parameter(select_by: str, value: Callable[[Epoch], float]) -> None:
    trained = run(train_params(**QUICK | {"epochs": 6}, learning_rate=0.1, select_by=select_by))
    assert not isinstance(trained, Checkpoint)
    assert value(trained.history[trained.selected.epoch - 1]) == max(map(value, trained.history))


@pytest.mark.slow
@pytest.mark.parametrize("changes", BALANCED)
def test_two_processes_end_with_the_weights_of_one(workspace: Path, changes: dict[str, str]) -> None:
    folder = write_normalized(workspace)
    labels = np.load(folder / "train_labels.npy")
    np.save(folder / "train_labels.npy", np.where(np.arange(len(labels)) < 60, 0, labels))
    write_checksums(folder)
    values = {"epochs": 2, "batch_size": 16, "learning_rate": 0.005, "cpu_threads": 1, **changes}

    def last(processes: int) -> dict[str, Tensor]:
        parameters = DEFAULTS | {"train": DEFAULTS["train"] | values | {"processes": processes}}
        Path("params.yaml").write_text(dump_yaml(parameters))
        done = run_step("train")
        assert (done.returncode, done.stderr) == (0, "")
        return load_file("artifacts/train/last.safetensors")

    one, two = last(1), last(2)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-2, atol=1e-4)
