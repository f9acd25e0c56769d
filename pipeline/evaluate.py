"""Evaluate the model on the test split, which no other step reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline import plots, tracking
from pipeline.artifacts import EVALUATE, TRAIN, Labels, verify, verify_splits, write_bytes, write_csv, write_json
from pipeline.data import DatasetInfo, Split, choose_device
from pipeline.errors import TemporaryError, UserError, report_errors
from pipeline.metrics import wilson_interval
from pipeline.model import load_model, logits_of
from pipeline.optimizer import loss_function
from pipeline.params import load_params
from pipeline.processes import num_cores

FILES = ("confusion_matrix.png", "metrics.json", "per_class.csv", "predictions.csv")
MODEL = "best.safetensors"
"""By its hash MLflow's run is found, whichever checkpoint is evaluated."""
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """What the test split says: single figures, a row a class, a row an image, and the confusion matrix."""

    metrics: dict[str, float]
    per_class: list[Row]
    predictions: list[Row]
    confusion: npt.NDArray[np.int64]
    """(num_classes, num_classes), actual by predicted."""


def evaluate(
    logits: torch.Tensor,
    labels: Labels,
    *,
    loss: str,
    class_names: Sequence[str],
    top_k: int,
    duplicates: Sequence[int],
) -> Evaluation:
    """From logits (N, num_classes) float32 and labels (N,) int64; `duplicates` are test images also found in train."""
    probabilities = logits.softmax(1).numpy()
    predicted = probabilities.argmax(1)
    confusion = np.zeros((len(class_names), len(class_names)), dtype=np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    hits = predicted == labels
    per_class = _per_class(confusion, class_names=class_names)
    low, high = wilson_interval(int(hits.sum()), len(hits))
    metrics: dict[str, float] = {
        "loss": loss_function(loss)(logits, torch.from_numpy(np.asarray(labels))).item(),
        "accuracy": float(hits.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "macro_f1": float(np.mean([row["f1"] for row in per_class])),
    }
    if len(class_names) > top_k:
        ranks = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
        metrics[f"top_{top_k}_accuracy"] = float((ranks == labels[:, None]).any(1).mean())
    alone = np.ones(len(hits), dtype=bool)
    alone[list(duplicates)] = False
    if alone.any():
        metrics["accuracy_without_duplicates"] = float(hits[alone].mean())
    metrics |= {"test_images": len(hits), "test_duplicates": len(duplicates)}
    predictions: list[Row] = [
        {
            "image": index,
            "actual": class_names[actual],
            "predicted": class_names[guess],
            "probability": f"{row[guess]:.6f}",
        }
        for index, (actual, guess, row) in enumerate(zip(labels, predicted, probabilities, strict=True))
    ]
    return Evaluation(metrics=metrics, per_class=per_class, predictions=predictions, confusion=confusion)


def _per_class(confusion: npt.NDArray[np.int64], *, class_names: Sequence[str]) -> list[Row]:
    """Precision, recall and F1 of each class; 0 where nothing was predicted or nothing was there."""
    hits, actual, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    precision = hits / np.maximum(predicted, 1)
    recall = hits / np.maximum(actual, 1)
    f1 = 2 * hits / np.maximum(actual + predicted, 1)
    return [
        {
            "class": name,
            "images": int(actual[index]),
            "precision": round(float(precision[index]), 6),
            "recall": round(float(recall[index]), 6),
            "f1": round(float(f1[index]), 6),
        }
        for index, name in enumerate(class_names)
    ]


def main() -> None:
    """The step: the test split and `artifacts/train/` → `artifacts/evaluate/`, and into the model's run in MLflow."""
    with report_errors():
        params = load_params().evaluate
        verify_splits("test")
        md5 = verify(TRAIN, sorted({"model.json", MODEL, f"{params.checkpoint}.safetensors"}))
        info = DatasetInfo.read()
        device = choose_device(params.device, field="evaluate.device")
        torch.set_num_threads(params.cpu_threads or num_cores())
        classifier, config = load_model(TRAIN, checkpoint=params.checkpoint)
        if config.class_names != info.class_names:
            raise UserError(
                f"{TRAIN}: the model knows other classes than {info.dataset}; `dvc repro train` makes it anew"
            )
        if md5[f"{params.checkpoint}.safetensors"] != md5[MODEL]:
            print(f"evaluates the last epoch; predict and MLflow have {MODEL}, of the epoch that train.selection kept")
        split = Split.read("test", info=info, device=device)
        views = params.test_time_augmentation
        logits = logits_of(classifier.to(device), split, batch_size=params.batch_size, views=views).cpu()
        result = evaluate(
            logits,
            split.labels.cpu().numpy(),
            loss=config.loss,
            class_names=info.class_names,
            top_k=params.top_k,
            duplicates=info.test_duplicates,
        )
        _write(result, class_names=info.class_names)
        _print(result)
        _record(result, model_md5=md5[MODEL], experiment=info.dataset)


def _write(result: Evaluation, *, class_names: Sequence[str]) -> None:
    write_csv(EVALUATE / "per_class.csv", result.per_class)
    write_csv(EVALUATE / "predictions.csv", result.predictions)
    write_bytes(EVALUATE / "confusion_matrix.png", plots.confusion_matrix(result.confusion, class_names=class_names))
    write_json(EVALUATE / "metrics.json", result.metrics)


def _print(result: Evaluation) -> None:
    metrics = result.metrics
    print(
        f"test accuracy {metrics['accuracy']:.2%} (95 % interval {metrics['accuracy_low']:.2%} to "
        f"{metrics['accuracy_high']:.2%}), loss {metrics['loss']:.4f}, {metrics['test_images']} images"
    )
    if metrics["test_duplicates"] and "accuracy_without_duplicates" in metrics:
        print(
            f"without the {metrics['test_duplicates']} test images that have a duplicate or near-duplicate in train: "
            f"{metrics['accuracy_without_duplicates']:.2%}"
        )


def _record(result: Evaluation, *, model_md5: str, experiment: str) -> None:
    """Into the run that made the model, found by the model's hash."""
    run, made = tracking.run_of_model(model_md5, experiment=experiment)
    if made:
        print(
            "no MLflow run here made this model (it was pulled, or trained elsewhere): a new run holds its evaluation"
        )
    print(f"MLflow run {run.run_id}", flush=True)
    run.log({f"test_{name.removeprefix('test_')}": value for name, value in result.metrics.items()}, step=0)
    with tracking.store_errors():
        if not run.flush():
            raise TemporaryError("MLflow stopped answering: it has not got the evaluation; run the same command again")
        run.tag(tracking.outputs_tag(EVALUATE, names=FILES), once=True)  # a later evaluation may have other parameters
        for name in ("confusion_matrix.png", "per_class.csv"):
            run.log_file(EVALUATE / name, folder="plots" if name.endswith("png") else "evaluate")


if __name__ == "__main__":
    main()
