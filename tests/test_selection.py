"""The rules select an epoch and the end of a training, and the reason is recorded."""

from dataclasses import fields
from typing import Any

import pytest
import torch

from pipeline.evaluation.intervals import wilson_interval
from pipeline.models.build import build
from pipeline.params import check_params
from pipeline.recipes import compose
from pipeline.training.checkpoints import Checkpoint
from pipeline.training.curves import curves
from pipeline.training.loop import train
from pipeline.training.selection import best_epochs, epochs_since_best, select_epoch
from pipeline.training.state import Epoch
from tests.conftest import train_params
from tests.test_model import config
from tests.test_resume import run, stopped
from tests.test_train import QUICK, split_of


def history(*results: tuple[float, float]) -> list[Epoch]:
    """Return epochs with these validation accuracies and losses."""
    others: dict[str, Any] = {field.name: 0.5 for field in fields(Epoch)}
    return [
        Epoch(**others | {"epoch": number, "validation_loss": loss, "validation_accuracy": accuracy})
        for number, (accuracy, loss) in enumerate(results, 1)
    ]


def selected(*results: tuple[float, float], num_images: int = 100, **changes: str) -> tuple[int, str]:
    found = select_epoch(history(*results), params=train_params(**changes), num_images=num_images)
    return found.epoch, found.reason


def since_best(*results: tuple[float, float], **changes: str) -> int:
    return epochs_since_best(history(*results), params=train_params(**changes), num_images=100)


def test_the_highest_accuracy_is_selected_whatever_its_loss() -> None:
    assert selected((0.8, 0.1), (0.9, 0.9), (0.8, 0.1)) == (2, "highest validation accuracy")


def test_an_epoch_is_selected_even_if_no_image_is_classified_correctly() -> None:
    assert selected((0.0, 1.2), selection="latest_equivalent", num_images=48)[0] == 1


def test_among_equal_accuracies_the_lowest_loss_is_selected() -> None:
    reason = "lowest validation loss of 3 with the highest validation accuracy"
    assert selected((0.9, 0.5), (0.9, 0.2), (0.9, 0.3), (0.8, 0.1)) == (2, reason)


def test_among_equal_accuracies_and_losses_the_later_epoch_is_selected() -> None:
    reason = "latest of 2 with the highest validation accuracy and the lowest loss"
    assert selected((0.9, 0.2), (0.9, 0.2), (0.9, 0.3)) == (2, reason)


def test_the_latest_equivalent_epoch_is_selected_for_few_images() -> None:
    lower, _ = wilson_interval(90, 100)
    assert 0.82 < lower < 0.83
    results = ((0.9, 0.1), (0.83, 0.8), (0.82, 0.1))
    reason = "latest of 2 in the 95% interval of the highest validation accuracy, 90.0%"
    assert selected(*results, selection="latest_equivalent") == (2, reason)


def test_fewer_epochs_are_equivalent_for_many_images() -> None:
    results = ((0.9, 0.1), (0.89, 0.8), (0.88, 0.1))
    assert selected(*results, selection="latest_equivalent", num_images=10_000)[0] == 1


def test_a_lower_loss_at_the_same_accuracy_is_an_improvement_for_early_stopping() -> None:
    assert since_best((0.9, 0.3), (0.9, 0.2), (0.9, 0.4), (0.8, 0.1)) == 2


def test_the_same_result_again_is_no_improvement() -> None:
    assert since_best((0.9, 0.3), (0.9, 0.3), (0.9, 0.3)) == 2


def test_early_stopping_does_not_count_equivalent_epochs_with_latest_equivalent() -> None:
    assert since_best((0.9, 0.3), (0.85, 0.5), (0.5, 0.5), selection="latest_equivalent") == 1


def test_selection_and_early_stopping_use_the_same_order() -> None:
    params = train_params(**QUICK | {"epochs": 40}, early_stopping_epochs=3, learning_rate=0.02)
    trained = run(params)
    assert not isinstance(trained, Checkpoint)
    best = best_epochs(trained.history, params=params, num_images=24)
    assert trained.selected.epoch == best[-1].epoch
    assert len(trained.history) in (40, best[0].epoch + 3)


@pytest.mark.parametrize("selection", ["best", "latest_equivalent"])
def test_the_weights_are_those_of_the_selected_epoch(selection: str) -> None:
    params = train_params(**QUICK | {"epochs": 6}, learning_rate=0.1, selection=selection)
    torch.manual_seed(params.seed)
    classifier, weights = build(config("lenet", classes=3)), []
    trained = train(
        classifier,
        params=params,
        train_split=split_of(48, seed=1),
        validation_split=split_of(24, seed=2),
        on_epoch=lambda epoch, speed: weights.append(classifier.network.state_dict()["0.weight"].clone()),
    )
    assert torch.equal(trained.best["network.0.weight"], weights[trained.selected.epoch - 1])


@pytest.mark.parametrize("selection", ["best", "latest_equivalent"])
def test_a_resumed_training_selects_the_same_epoch(selection: str) -> None:
    changes = {"log_every_steps": 1, "early_stopping_epochs": 2, "learning_rate": 0.05}
    params = train_params(**{**QUICK, **changes, "epochs": 5}, selection=selection)
    whole, resumed = run(params), stopped(params, 3, 6, 9)
    assert not isinstance(whole, Checkpoint)
    assert not isinstance(resumed, Checkpoint)
    assert (resumed.selected, resumed.history) == (whole.selected, whole.history)
    assert torch.equal(resumed.best["network.0.weight"], whole.best["network.0.weight"])


def test_the_recipe_my_images_uses_the_rule_for_few_validation_images() -> None:
    assert check_params(compose("my_images", {}), origin="my_images").train.selection == "latest_equivalent"


def test_the_plots_name_the_selected_epoch_and_the_reason() -> None:
    rows = [vars(epoch) for epoch in history((0.5, 0.5), (0.9, 0.2))]
    pictures = {
        curves(rows, selected=epoch, reason=reason, with_macro_f1=with_macro_f1)
        for epoch in (1, 2)
        for reason in ("one", "other")
        for with_macro_f1 in (False, True)
    }
    assert len(pictures) == 8
    assert curves(rows, selected=1, reason="one", with_macro_f1=False) in pictures
