import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from pipeline.artifacts import replace_folder
from pipeline.evaluation.intervals import wilson_interval
from pipeline.evaluation.metrics import Evaluation, evaluate
from pipeline.models.build import build
from pipeline.models.files import save_config, save_weights
from tests.conftest import run_step, write_normalized
from tests.test_model import config


def example(
    *, classes: int = 6, number: int = 200, top_k: int = 3, duplicates: tuple[int, ...] = ()
) -> tuple[Evaluation, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, classes, number)
    logits = generator.normal(size=(number, classes)).astype(np.float32)
    logits[np.arange(number), labels] += 1
    names = [f"c{index}" for index in range(classes)]
    result = evaluate(
        torch.from_numpy(logits), labels, loss="cross_entropy", class_names=names, top_k=top_k, duplicates=duplicates
    )
    return result, logits, labels


def test_metrics_per_class_equal_those_of_scikit_learn() -> None:
    result, logits, labels = example()
    expected = precision_recall_fscore_support(labels, logits.argmax(1))
    for name, values in zip(("precision", "recall", "f1", "images"), expected, strict=True):
        assert [row[name] for row in result.per_class] == pytest.approx(values.tolist(), abs=1e-6)
    np.testing.assert_array_equal(result.confusion, confusion_matrix(labels, logits.argmax(1)))


def test_loss_and_top_k_accuracy_equal_those_of_pytorch() -> None:
    result, logits, labels = example()
    tensors = torch.from_numpy(logits), torch.from_numpy(labels)
    top_3_accuracy = (tensors[0].topk(3).indices == tensors[1][:, None]).any(1).double().mean().item()
    assert result.metrics["top_3_accuracy"] == pytest.approx(top_3_accuracy)
    assert result.metrics["loss"] == pytest.approx(torch.nn.functional.cross_entropy(*tensors).item())


def test_top_k_accuracy_is_left_out_for_too_few_classes() -> None:
    assert not [name for name in example(classes=3, top_k=3)[0].metrics if name.startswith("top_")]


def test_accuracy_is_reported_with_and_without_duplicates() -> None:
    result, logits, labels = example(duplicates=(0, 1, 2, 3, 4))
    is_correct = logits.argmax(1) == labels
    assert result.metrics["accuracy"] == pytest.approx(is_correct.mean())
    assert result.metrics["accuracy_without_duplicates"] == pytest.approx(is_correct[5:].mean())


def test_a_class_that_is_never_predicted_counts_as_zero() -> None:
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    result = evaluate(logits, np.array([0, 1]), loss="mse", class_names=["a", "b"], top_k=5, duplicates=())
    assert result.per_class[1] == {"class": "b", "images": 1, "precision": 0.0, "recall": 0.0, "f1": 0.0}


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


def test_the_interval_contains_the_accuracy_at_both_ends() -> None:
    for trials in range(1, 2001):
        assert wilson_interval(0, trials)[0] == 0
        assert wilson_interval(trials, trials)[1] == 1


@pytest.mark.slow
def test_the_step_writes_metrics_tables_and_matrix(workspace: Path) -> None:
    write_normalized(workspace)
    names = tuple(f"class {index}" for index in range(3))
    torch.manual_seed(0)
    chosen = config(classes=3, class_names=names)
    with replace_folder(workspace / "artifacts" / "train") as folder:
        save_weights(build(chosen), folder / "best.safetensors")
        save_config(chosen, folder)
    done = run_step("evaluate")
    assert (done.returncode, done.stderr) == (0, "")
    assert "the MLflow store has no run that made this model" in done.stdout
    metrics = json.loads((workspace / "artifacts" / "evaluate" / "metrics.json").read_text())
    assert (metrics["test_images"], metrics["test_duplicates"]) == (30, 2)
    written = sorted(path.name for path in (workspace / "artifacts" / "evaluate").iterdir())
    assert written == ["confusion_matrix.png", "metrics.json", "per_class.csv", "predictions.csv"]
