"""The text at the end of `make run` on a user's own images: a table of the classes, and what to try next."""

from flows.summary import ClassResult, Step, Summary, as_text

METRICS = {"accuracy": 0.9, "accuracy_low": 0.8, "accuracy_high": 0.95, "loss": 0.25}


def summary(*images: int) -> Summary:
    classes = [
        ClassResult(f"class {index}", number, precision=0.5, recall=index / len(images))
        for index, number in enumerate(images)
    ]
    return Summary("own-xyz", [Step("train", "ran", 1.0)], 2.0, METRICS, classes, mlflow_run_id="abc")


def test_the_classes_are_listed_with_their_test_images() -> None:
    text = as_text(summary(12, 1234), recipe="my_images")
    assert "class    test images   recall  precision\nclass 0           12     0.0%      50.0%\n" in text
    assert "class 1        1,234    50.0%      50.0%" in text
    assert "test images" not in as_text(summary(12, 1234), recipe="digits")


def test_of_many_classes_those_of_the_lowest_recall_are_listed() -> None:
    text = as_text(summary(*[5] * 30), recipe="my_images")
    assert "class 19 " in text
    assert "class 20 " not in text
    assert "10 more classes, of higher recall" in text


def test_the_next_commands_have_the_folder_of_the_images() -> None:
    text = as_text(summary(5, 5), recipe="my_images", images="/my photos")
    assert "make run RECIPE=my_images_finetune IMAGES='/my photos' " in text
    assert "class_weights" not in text
    assert "RECIPE=my_images_finetune" not in as_text(summary(5, 5), recipe="my_images_finetune")


def test_weights_are_suggested_for_unequal_classes() -> None:
    expected = """make run RECIPE=my_images SET="train.class_weights=balanced"  give rare classes more weight"""
    assert expected in as_text(summary(15, 5), recipe="my_images")
