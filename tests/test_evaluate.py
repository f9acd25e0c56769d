import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from pipeline.artifacts import file_md5, read_csv, read_json, replace_folder
from pipeline.core.errors import UserError
from pipeline.evaluate import FILES
from pipeline.evaluation.calibration import calibration
from pipeline.evaluation.intervals import f1_interval, wilson_interval
from pipeline.evaluation.logits import predictions_of
from pipeline.evaluation.metrics import Evaluation, evaluate
from pipeline.evaluation.predict_split import load_to_evaluate, predict_split
from pipeline.evaluation.predictions import Predictions, read_predictions
from pipeline.models.build import build
from pipeline.models.files import save_config, save_weights
from tests.conftest import params, run_step, write_normalized
from tests.test_model import config


def example(
    *, classes: int = 6, number: int = 200, top_k: int = 3, duplicates: tuple[int, ...] = ()
) -> tuple[Evaluation, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, classes, number)
    logits = generator.normal(size=(number, classes)).astype(np.float32)
    logits[np.arange(number), labels] += 1
    names = [f"c{index}" for index in range(classes)]
    predictions = predictions_of(torch.from_numpy(logits), labels, class_names=names, temperature=0.5)
    return evaluate(predictions, top_k=top_k, duplicates=duplicates), logits, labels


def test_metrics_per_class_equal_those_of_scikit_learn() -> None:
    result, logits, labels = example()
    expected = precision_recall_fscore_support(labels, logits.argmax(1))
    for name, values in zip(("precision", "recall", "f1", "images"), expected, strict=True):
        assert [row[name] for row in result.per_class] == pytest.approx(values.tolist(), abs=1e-6)
    np.testing.assert_array_equal(result.confusion, confusion_matrix(labels, logits.argmax(1)))


def test_top_k_accuracy_equals_that_of_pytorch() -> None:
    result, logits, labels = example()
    top_3 = torch.from_numpy(logits).topk(3).indices.numpy()
    assert result.metrics["top_3_accuracy"] == pytest.approx((top_3 == labels[:, None]).any(1).mean())


def test_top_k_accuracy_is_left_out_for_too_few_classes() -> None:
    assert not [name for name in example(classes=3, top_k=3)[0].metrics if name.startswith("top_")]


def test_accuracy_is_reported_with_and_without_duplicates() -> None:
    result, logits, labels = example(duplicates=(0, 1, 2, 3, 4))
    is_correct = logits.argmax(1) == labels
    assert result.metrics["accuracy"] == pytest.approx(is_correct.mean())
    assert result.metrics["accuracy_without_duplicates"] == pytest.approx(is_correct[5:].mean())


def test_what_is_undefined_for_a_class_is_empty() -> None:
    logits = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    predictions = predictions_of(logits, np.array([0, 1]), class_names=["a", "never predicted", "absent"])
    _, never_predicted, absent = evaluate(predictions, top_k=5, duplicates=()).per_class
    assert [never_predicted[name] for name in ("precision", "precision_high", "recall", "f1")] == ["", "", 0, 0]
    assert [absent[name] for name in ("images", "predicted_images", "recall", "f1", "f1_low")] == [0, 0, "", "", ""]


def test_the_intervals_of_a_class_are_those_of_its_counts() -> None:
    row = example()[0].per_class[2]
    assert (row["recall_low"], row["recall_high"]) == pytest.approx(
        wilson_interval(row["num_correct"], row["images"]), abs=1e-6
    )
    involved = row["images"] + row["predicted_images"] - row["num_correct"]
    assert (row["f1_low"], row["f1_high"]) == pytest.approx(f1_interval(row["num_correct"], involved), abs=1e-6)
    assert row["f1_low"] < row["f1"] < row["f1_high"]


@pytest.mark.parametrize(
    ("num_correct", "trials", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
    ],  # the last: Newcombe 1998, table I
)
def test_the_interval_is_the_wilson_interval(num_correct: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(num_correct, trials) == pytest.approx((low, high), abs=1e-4)


def test_the_interval_of_f1_is_the_indirect_wilson_interval() -> None:
    """TP 81, FP 90, FN 92: Newcombe's interval of 81/263, 0.2553 to 0.3662, carried over to F1 by hand."""
    low, high = f1_interval(81, 263)
    assert (low, high) == pytest.approx((2 * 0.2553 / 1.2553, 2 * 0.3662 / 1.3662), abs=1e-4)
    precision, recall = 81 / 171, 81 / 173
    assert low < 2 * precision * recall / (precision + recall) < high


@pytest.mark.parametrize(("num_correct", "involved"), [(0, 7), (7, 7)])
def test_the_interval_of_f1_stays_within_0_and_1(num_correct: int, involved: int) -> None:
    low, high = f1_interval(num_correct, involved)
    assert 0 <= low < high <= 1
    assert (low == 0) == (num_correct == 0)
    assert (high == 1) == (num_correct == involved)


def test_the_interval_contains_the_accuracy_at_both_ends() -> None:
    for trials in range(1, 2001):
        assert wilson_interval(0, trials)[0] == 0
        assert wilson_interval(trials, trials)[1] == 1


def test_the_calibration_error_is_that_of_guo_et_al() -> None:
    """In (0.6, 2/3] two images, one correct: |0.5 - 0.64|; in (14/15, 1] three correct ones: |1 - 0.98|."""
    confidences = np.array([0.62, 0.66, 0.97, 0.98, 0.99])
    probabilities = np.stack([confidences, 1 - confidences], 1).astype(np.float32)
    predictions = Predictions(
        ("a", "b"), ["x"] * 5, ["0" * 16] * 5, np.array([0, 1, 0, 0, 0]), np.zeros(5, np.int64), probabilities, None
    )
    found = calibration(predictions, probabilities)
    assert found["expected_calibration_error"] == pytest.approx((2 * 0.14 + 3 * 0.02) / 5, abs=1e-6)
    assert [each["images"] for each in found["bins"]] == [0] * 9 + [2] + [0] * 4 + [3]
    assert found["bins"][9]["accuracy"] == 0.5
    assert found["bins"][9]["mean_confidence"] == pytest.approx(0.64)
    assert found["bins"][0]["accuracy"] is None


def test_the_calibration_error_after_the_temperature_is_of_the_calibrated_probabilities() -> None:
    result, logits, labels = example()
    halved = predictions_of(torch.from_numpy(logits * 2), labels, class_names=[f"c{index}" for index in range(6)])
    expected = evaluate(halved, top_k=3, duplicates=()).metrics
    assert "expected_calibration_error_calibrated" not in expected  # the temperature is unknown
    found = result.metrics["expected_calibration_error_calibrated"]
    assert found == pytest.approx(expected["expected_calibration_error"], abs=1e-6)


@pytest.mark.slow
def test_the_step_writes_the_cross_entropy_and_the_same_bytes_each_time(workspace: Path) -> None:
    write_normalized(workspace)
    names = tuple(f"class {index}" for index in range(3))
    torch.manual_seed(0)
    chosen = config(classes=3, class_names=names, temperature=1.5)
    with replace_folder(workspace / "artifacts" / "train") as folder:
        save_weights(build(chosen), folder / "best.safetensors")
        save_config(chosen, folder)
    target, written = workspace / "artifacts" / "evaluate", []
    for _ in range(2):
        done = run_step("evaluate")
        assert (done.returncode, done.stderr) == (0, "")
        assert "MLflow" in done.stdout
        written.append({path.name: file_md5(path) for path in target.iterdir()})
    assert written[0] == written[1]
    assert tuple(sorted(written[0])) == FILES
    metrics = json.loads((target / "metrics.json").read_text())
    assert (metrics["test_images"], metrics["test_duplicates"]) == (30, 2)
    predictions = read_predictions(target / "predictions.parquet")
    assert predictions.weights_md5 == file_md5(workspace / "artifacts/train/best.safetensors")
    of_labels = predictions.probabilities[np.arange(30), predictions.actual]
    assert metrics["loss"] == pytest.approx(-np.log(of_labels).mean(), rel=1e-5)
    assert predictions.names[:2] == ["test/0.png", "test/1.png"]
    assert evaluate(predictions, top_k=5, duplicates=[0, 3]).metrics.items() <= metrics.items()
    validation = read_predictions(target / "validation_predictions.parquet")
    assert (len(validation), validation.names[0]) == (24, "validation/0.png")
    model = load_to_evaluate(workspace / "artifacts/train", params=params().evaluate)
    again, _ = predict_split(model, "validation", data=workspace / "artifacts/normalize")
    np.testing.assert_array_equal(again.calibrated_probabilities, validation.calibrated_probabilities)
    assert read_json(target / "calibration.json")["temperature"] == 1.5
    assert read_csv(target / "predictions.csv")[1]["name"] == "test/1.png"


@pytest.mark.parametrize(
    ("size", "classes", "message"),
    [
        (16, 3, "image_size is 16; allowed: 32"),
        (32, 2, r"class_names is \['class 0', 'class 1'\]; allowed: \['class 0'"),
    ],
)
def test_a_model_predicts_only_images_and_classes_that_it_was_trained_with(
    tmp_path: Path, size: int, classes: int, message: str
) -> None:
    data = write_normalized(tmp_path, size=size, classes=classes)
    chosen = config(classes=3, class_names=tuple(f"class {index}" for index in range(3)))
    save_weights(build(chosen), tmp_path / "best.safetensors")
    save_config(chosen, tmp_path)
    model = load_to_evaluate(tmp_path, params=params().evaluate)
    with pytest.raises(UserError, match=f"{data}: {message}"):
        predict_split(model, "test", data=data)
