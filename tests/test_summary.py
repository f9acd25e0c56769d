"""The result at the end of a flow run: the table in the terminal, what to try next, and the page in Prefect."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.live_progress import artifact_key
from flows.summary import ClassResult, Step, Summary, describe_baseline, read_summary
from flows.summary_page import MAX_PICTURE_BYTES, as_markdown
from flows.summary_text import WIDTH, as_text
from pipeline.artifacts import write_csv, write_json
from pipeline.params import check_params
from pipeline.recipes import compose
from pipeline.reporting.baseline import Baseline, compare
from pipeline.tracking.run_title import RunSetup
from tests.conftest import PROJECT

METRICS = {"accuracy": 0.9, "accuracy_low": 0.8, "accuracy_high": 0.95, "loss": 0.25}
EXPERIMENT = "digits-lr-0-03-epochs-6-3fa9c1"
BETTER, WORSE = (Baseline(compare(METRICS, accuracy=accuracy, number=200, commit="abc")) for accuracy in (0.85, 0.99))
DIFFERENCES = {"train.learning_rate": (0.05, 0.03), "train.epochs": (20, 6)}


@pytest.fixture(autouse=True)
def in_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)


def summary(*train_images: int, recipe: str = "my_images", **changes: str) -> Summary:
    classes = [
        ClassResult(f"{index}", number, 5, num_correct=2, precision=0.5, recall=index / len(train_images))
        for index, number in enumerate(train_images)
    ]
    overrides = {f"train.{name}": value for name, value in changes.items()}
    return Summary(
        EXPERIMENT,
        "dc058ab2-cafa-4520-85e8-f41505072fb9",
        RunSetup(recipe, "", DIFFERENCES),
        [Step("train", "ran", 1.0)],
        2.0,
        METRICS,
        classes,
        "abc",
        check_params(compose(recipe, overrides), origin=recipe),
        validation_accuracy=0.8,
        selected_epoch=7,
        baseline=BETTER,
        report=Path(f"/my photos/artifacts/reports/{EXPERIMENT}.html"),
    )


def as_page(summary: Summary, *, folder: Path = Path()) -> str:
    links = {
        "mlflow_link": "http://host/#/runs/abc",
        "report_link": "http://host/#/report",
        "flow_run_link": "http://f",
    }
    return as_markdown(summary, folder=folder, **links)


def test_the_table_answers_what_a_reader_asks_in_this_order() -> None:
    text = as_text(summary(12, 20, recipe="digits"), recipe="digits")
    assert re.findall(r"^(\w[\w ]+?)  ", text, re.MULTILINE) == [
        "test accuracy",
        "worst class",
        "validation",
        "differs",
        "baseline",
        "report",
        "MLflow run",
        "Prefect run",
        "experiment",
        "time",
    ]
    assert "90.00% (95% interval 80.00% to 95.00%)\nworst class    class '0': recall 0.00%, 2 of 5 images\n" in text
    assert "differs        train.learning_rate 0.05 → 0.03\n               train.epochs 20 → 6\n" in text
    assert f"report         file:///my%20photos/artifacts/reports/{EXPERIMENT}.html\n" in text
    assert not [line for line in text.splitlines() if len(line) > WIDTH and "file://" not in line]


def test_the_accuracy_of_the_weights_of_the_last_epoch_is_not_taken_for_that_of_the_selected_ones() -> None:
    found = summary(12, recipe="digits")
    evaluate = found.params.evaluate.model_copy(update={"checkpoint": "last"})
    last = replace(found, params=found.params.model_copy(update={"evaluate": evaluate}))
    words = "95.00%), of the weights of the\n               last epoch\n"
    assert words in as_text(last, recipe="digits")
    assert words not in as_text(found, recipe="digits")


def test_a_run_that_changes_nothing_differs_in_nothing() -> None:
    same = replace(summary(5, recipe="digits"), setup=RunSetup("digits", "", {}))
    assert "nothing: all parameters are those of recipe digits\n" in as_text(same, recipe="digits")
    assert "nothing from recipe digits" in as_page(same)


@pytest.mark.parametrize(
    ("baseline", "text"),
    [
        (
            BETTER,
            "5.00 points above the results committed with the project (85.00%; 95% interval of the difference "
            "5.9 points below to 12.5 points above: it may be chance)",
        ),
        (
            WORSE,
            "9.00 points below the results committed with the project (99.00%; 95% interval of the difference "
            "3.4 to 19.0 points below)",
        ),
        (Baseline(reason="these are of abc", is_this_model=True), "none: these are of abc"),
        (Baseline(reason="abc has none"), "none: abc has none; apply this experiment and commit to have one"),
    ],
)
def test_the_difference_to_the_committed_accuracy_is_stated_with_its_uncertainty(baseline: Baseline, text: str) -> None:
    assert describe_baseline(replace(summary(5), baseline=baseline)) == text


def test_a_model_that_is_worse_than_the_baseline_is_applied_last() -> None:
    for baseline, last in ((BETTER, "list the experiments since the last commit"), (WORSE, "the files in artifacts/)")):
        lines = as_text(replace(summary(5, recipe="digits"), baseline=baseline), recipe="cifar10_lenet").splitlines()
        assert lines[lines.index("Next:") + 1] == "  open the report in a browser: its address is above"
        assert lines[-1].endswith(last)


@pytest.mark.parametrize(
    ("row", "recall", "correct"),
    [
        ({"images": 8, "num_correct": 3, "precision": "", "recall": 0.375}, 0.375, 3),
        ({"images": 0, "num_correct": 0, "precision": "", "recall": ""}, None, 0),
    ],
)
def test_a_class_is_read_from_its_row_of_the_table(
    tmp_path: Path, row: dict[str, Any], recall: float | None, correct: int
) -> None:
    for folder in ("train", "normalize", "evaluate"):
        (tmp_path / "artifacts" / folder).mkdir(parents=True)
    write_csv(tmp_path / "artifacts/evaluate/per_class.csv", [{"class": "cat", **row}])
    write_csv(tmp_path / "artifacts/train/history.csv", [{"epoch": 1, "validation_accuracy": 0.5, "selected": "best"}])
    write_json(tmp_path / "artifacts/normalize/dataset.json", {"counts": {"train": {"cat": 4}}})
    write_json(tmp_path / "artifacts/evaluate/metrics.json", METRICS)
    for name in ("params.yaml", "dvc.lock"):
        (tmp_path / name).write_bytes((PROJECT / name).read_bytes())
    [found] = read_summary(
        tmp_path,
        experiment="",
        flow_run_id="",
        setup=RunSetup("digits", "", {}),
        steps=[],
        seconds=1.0,
        mlflow_run_id=None,
        report=None,
    ).classes
    assert (found.recall, found.num_correct) == (recall, correct)


def test_the_classes_are_listed_with_their_test_images() -> None:
    text = as_text(summary(12, 20), recipe="my_images")
    assert "class  test images   recall  precision\n0                5     0.0%      50.0%\n" in text
    assert "test images  " not in as_text(summary(12, 20, recipe="digits"), recipe="digits")


def test_a_value_that_is_undefined_is_a_dash() -> None:
    found = summary(12, 20)
    classes = [replace(found.classes[0], precision=None, recall=None), found.classes[1]]
    text = as_text(replace(found, classes=classes), recipe="my_images")
    assert "0                5        -          -\n" in text
    assert "worst class    class '1': recall 50.00%" in text


def test_the_precision_of_a_class_that_is_never_predicted_is_undefined() -> None:
    found = summary(12, 20)
    changed = replace(found, classes=[replace(found.classes[0], precision=None), found.classes[1]])
    assert "0                5     0.0%          -\n" in as_text(changed, recipe="my_images")


def test_of_many_classes_those_of_the_lowest_recall_are_listed() -> None:
    text = as_text(summary(*[5] * 30), recipe="my_images")
    assert "\n19 " in text
    assert "\n20 " not in text
    assert "10 more classes, of higher recall" in text


def test_the_next_commands_have_the_folder_of_the_images() -> None:
    text = as_text(summary(5, 5), recipe="my_images", images="/my photos", overrides=["train.batch_size=4"])
    assert """make run RECIPE=my_images_finetune IMAGES='/my photos' SET="train.batch_size=4"\n""" in text
    assert "class_weights" not in text
    finetuned = summary(5, 5, recipe="my_images_finetune")
    assert "RECIPE=my_images_finetune" not in as_text(finetuned, recipe="my_images_finetune")


def test_weights_are_suggested_for_unequal_classes_once() -> None:
    expected = """make run RECIPE=my_images SET="train.class_weights=balanced"\n    give rare classes more weight"""
    assert expected in as_text(summary(15, 5), recipe="my_images")
    assert "give rare classes" not in as_text(summary(15, 5, class_weights="balanced"), recipe="my_images")
    assert "give rare classes" not in as_text(summary(15, 5, sampler="balanced"), recipe="my_images")


@pytest.mark.parametrize(
    ("recipe", "key"),
    [("digits", "digits-summary"), ("cifar10_LeNet", "cifar10-lenet-summary"), ("日本", "summary")],
)
def test_each_recipe_has_an_artifact_key_of_its_own(recipe: str, key: str) -> None:
    assert artifact_key(recipe, "summary") == key


def test_the_page_has_the_pictures_with_alternative_texts(tmp_path: Path) -> None:
    for name in ("train/curves.png", "evaluate/confusion_matrix.png"):
        (tmp_path / "artifacts" / name).parent.mkdir(parents=True)
        (tmp_path / "artifacts" / name).write_bytes(b"\x89PNG")
    text = as_page(summary(5), folder=tmp_path)
    assert re.findall(r"!\[(\w+ \w+).*\]\(data:image/png;base64,iVBORw==\)", text) == [
        "Learning curves",
        "Confusion matrix",
    ]
    assert "[my_images lr=0.03 epochs=6](http://host/#/runs/abc)" in text
    assert f"[report.html](http://host/#/report) in MLflow, and `artifacts/reports/{EXPERIMENT}.html`" in text
    assert "| train\\.learning\\_rate | 0\\.05 | 0\\.03 |" in text
    (tmp_path / "artifacts/train/curves.png").write_bytes(b"x" * (MAX_PICTURE_BYTES + 1))
    assert "`artifacts/train/curves.png` is too large" in as_page(summary(5), folder=tmp_path)


def test_names_from_outside_have_no_effect_on_the_page() -> None:
    name = "<img src=x>|![a](http://evil)\n# `b`"
    found = replace(summary(5), classes=[ClassResult(name, 5, 5, num_correct=0, precision=0.0, recall=0.0)])
    found = replace(found, setup=RunSetup("digits", "", {"download.folder": ("data", name)}))
    text = as_page(found)
    escaped = r"\<img src\=x\>\|\!\[a\]\(http\:\/\/evil\)\\n\# \`b\`"
    assert text.count(escaped) == text.count("evil") == 2
