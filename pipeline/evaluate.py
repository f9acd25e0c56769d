"""Evaluate, the last step: compute the metrics of the model on the test split, which no other step reads."""

from collections.abc import Sequence

import torch

from pipeline.arrays import DatasetInfo, Split
from pipeline.artifacts import BEST_WEIGHTS, EVALUATE, TRAIN, verify, verify_splits, write_bytes, write_csv, write_json
from pipeline.core.errors import TemporaryError, UserError, report_errors
from pipeline.core.processes import num_cores
from pipeline.core.results import StepResult, write_result
from pipeline.evaluation import plots
from pipeline.evaluation.metrics import Evaluation, evaluate
from pipeline.models.cpu_kernels import use_cpu_kernels
from pipeline.models.files import load_model
from pipeline.models.inference import logits_of
from pipeline.params import load_params
from pipeline.tracking.experiments import experiment_name
from pipeline.tracking.provenance import output_values, result_values
from pipeline.tracking.run_title import read_setup
from pipeline.tracking.runs import find_or_create_run
from pipeline.tracking.store import store_errors
from pipeline.training.device import choose_device

FILES = ("confusion_matrix.png", "metrics.json", "per_class.csv", "predictions.csv")


def main() -> None:
    """Evaluate `artifacts/train/` on the test split; write `artifacts/evaluate/` and log to the model's MLflow run."""
    with report_errors():
        all_params = load_params()
        params = all_params.evaluate
        verify_splits("test")
        md5 = verify(TRAIN, sorted({"model.json", BEST_WEIGHTS, f"{params.checkpoint}.safetensors"}))
        info = DatasetInfo.read()
        device = choose_device(params.device, field="evaluate.device")
        use_cpu_kernels(params.cpu_kernels, field="evaluate.cpu_kernels")
        torch.set_num_threads(params.cpu_threads or num_cores())
        classifier, config = load_model(TRAIN, checkpoint=params.checkpoint)
        if config.class_names != info.class_names:
            raise UserError(
                f"{TRAIN}: the classes of the model are not those of {info.dataset}; `dvc repro train` trains it again"
            )
        if md5[f"{params.checkpoint}.safetensors"] != md5[BEST_WEIGHTS]:
            print(
                f"evaluate.checkpoint is {params.checkpoint}: the metrics are of the last epoch, but predict and "
                f"MLflow use {BEST_WEIGHTS}, of the epoch that train.selection selected"
            )
        split = Split.read("test", info=info, mean=config.mean, std=config.std, device=device)
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
        _write_files(result, class_names=info.class_names)
        _print_summary(result)
        # the MLflow run is the one of these weights, whichever checkpoint is evaluated
        experiment = experiment_name(info.dataset, folder=all_params.download.folder)
        _log_to_mlflow(result, model_md5=md5[BEST_WEIGHTS], experiment=experiment)


def _write_files(result: Evaluation, *, class_names: Sequence[str]) -> None:
    write_csv(EVALUATE / "per_class.csv", result.per_class)
    write_csv(EVALUATE / "predictions.csv", result.predictions)
    write_bytes(EVALUATE / "confusion_matrix.png", plots.confusion_matrix(result.confusion, class_names=class_names))
    write_json(EVALUATE / "metrics.json", result.metrics)


def _print_summary(result: Evaluation) -> None:
    metrics = result.metrics
    print(
        f"test accuracy {metrics['accuracy']:.2%} (95% interval {metrics['accuracy_low']:.2%} to "
        f"{metrics['accuracy_high']:.2%}), loss {metrics['loss']:.4f}, {metrics['test_images']} images"
    )
    if metrics["test_duplicates"] and "accuracy_without_duplicates" in metrics:
        print(
            f"without the {metrics['test_duplicates']} test images that have a duplicate or near-duplicate in train: "
            f"{metrics['accuracy_without_duplicates']:.2%}"
        )


def _log_to_mlflow(result: Evaluation, *, model_md5: str, experiment: str) -> None:
    """Log metrics, tags and plots to the MLflow run that made the model, which is found by the model's MD5.

    Raises TemporaryError where MLflow does not answer.
    """
    run, created = find_or_create_run(model_md5, experiment=experiment, setup=read_setup())
    if created:
        print(
            "the MLflow store has no run that made this model (it was pulled, or trained elsewhere): its evaluation is "
            "logged to a new run"
        )
    print(f"MLflow run {run.run_id}", flush=True)
    write_result(StepResult(run.run_id, run.experiment_id))
    run.log({f"test_{name.removeprefix('test_')}": value for name, value in result.metrics.items()}, step=0)
    with store_errors():
        if not run.flush():
            raise TemporaryError("MLflow does not answer: the evaluation was not logged; run the same command again")
        # the hashes of the first evaluation stay, as a later one may have other parameters
        run.record(output_values(EVALUATE, names=FILES), overwrite=False)
        run.record(result_values(result.metrics))
        for name in ("confusion_matrix.png", "per_class.csv"):
            run.log_file(EVALUATE / name, folder="plots" if name.endswith("png") else "evaluate")


if __name__ == "__main__":
    main()
