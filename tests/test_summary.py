"""The text at the end of `make run` on a user's own images: a table of the classes, and what to try next."""

from dataclasses import replace

import pytest

from flows.summary import ClassResult, Step, Summary, as_text
from pipeline.params import check_params
from pipeline.recipes import compose
from tests.conftest import PROJECT

METRICS = {"accuracy": 0.9, "accuracy_low": 0.8, "accuracy_high": 0.95, "loss": 0.25}


@pytest.fixture(autouse=True)
def in_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)


def summary(*train_images: int, recipe: str = "my_images", **changes: str) -> Summary:
    classes = [
        ClassResult(f"class {index}", number, test_images=5, precision=0.5, recall=index / len(train_images))
        for index, number in enumerate(train_images)
    ]
    overrides = {f"train.{name}": value for name, value in changes.items()}
    params = check_params(compose(recipe, overrides), origin=recipe)
    return Summary(
        "own-xyz",
        [Step("train", "ran", 1.0)],
        2.0,
        METRICS,
        classes,
        "abc",
        params,
        validation_accuracy=0.8,
        selected_epoch=7,
    )


def test_the_classes_are_listed_with_their_test_images() -> None:
    text = as_text(summary(12, 20), recipe="my_images")
    assert "class    test images   recall  precision\nclass 0            5     0.0%      50.0%\n" in text
    assert "test images" not in as_text(summary(12, 20, recipe="digits"), recipe="digits")


def test_the_precision_of_a_class_that_is_never_predicted_is_undefined() -> None:
    found = summary(12, 20)
    changed = replace(found, classes=[replace(found.classes[0], precision=None), found.classes[1]])
    assert "class 0            5     0.0%  undefined\n" in as_text(changed, recipe="my_images")


def test_of_many_classes_those_of_the_lowest_recall_are_listed() -> None:
    text = as_text(summary(*[5] * 30), recipe="my_images")
    assert "class 19 " in text
    assert "class 20 " not in text
    assert "10 more classes, of higher recall" in text


def test_the_next_commands_have_the_folder_of_the_images() -> None:
    text = as_text(summary(5, 5), recipe="my_images", images="/my photos", overrides=["train.batch_size=4"])
    assert """make run RECIPE=my_images_finetune IMAGES='/my photos' SET="train.batch_size=4" """ in text
    assert "class_weights" not in text
    finetuned = summary(5, 5, recipe="my_images_finetune")
    assert "RECIPE=my_images_finetune" not in as_text(finetuned, recipe="my_images_finetune")


def test_weights_are_suggested_for_unequal_classes_once() -> None:
    expected = """make run RECIPE=my_images SET="train.class_weights=balanced"  give rare classes more weight"""
    assert expected in as_text(summary(15, 5), recipe="my_images")
    assert "give rare classes" not in as_text(summary(15, 5, class_weights="balanced"), recipe="my_images")
    assert "give rare classes" not in as_text(summary(15, 5, sampler="balanced"), recipe="my_images")
