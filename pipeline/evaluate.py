"""Evaluate, the last step: compute the metrics of the model on the test split, which no other step reads.

Its predictions for the validation split are written as well, and no figure is made of them here.

Calibrated probabilities are those after the temperature in `model.json`. It was fitted for the best weights and single
views of the images, and is also used with `evaluate.checkpoint: last` and `evaluate.test_time_augmentation`.
"""

from dataclasses import replace

from pipeline.arrays import DatasetInfo
from pipeline.artifacts import BEST_WEIGHTS, EVALUATE, TRAIN, verify, verify_splits, write_bytes, write_csv, write_json
from pipeline.core.errors import TemporaryError, report_errors
from pipeline.core.report_command import make_report
from pipeline.core.results import StepResult, write_result
from pipeline.core.settings import get_settings
from pipeline.evaluation import plots
from pipeline.evaluation.calibration import NUM_BINS
from pipeline.evaluation.metrics import Evaluation, evaluate, prediction_rows
from pipeline.evaluation.predict_split import load_to_evaluate, predict_split
from pipeline.evaluation.predictions import Predictions, split_md5, write_predictions
from pipeline.params import load_params
from pipeline.tracking.experiments import experiment_name
from pipeline.tracking.models import ensure_model
from pipeline.tracking.provenance import metrics_of_models, output_values, result_values
from pipeline.tracking.registrations import register_evaluation
from pipeline.tracking.run_title import read_setup
from pipeline.tracking.runs import find_or_create_run
from pipeline.tracking.store import store_errors, warn_on_failure
from pipeline.training.device import choose_device

FILES = (
    "calibration.json",
    "confusion_matrix.png",
    "metrics.json",
    "per_class.csv",
    "predictions.csv",
    "predictions.parquet",
    "validation_predictions.parquet",
)
TEST_METRICS = "test/"  # the group of metrics in MLflow


def main() -> None:
    """Evaluate `artifacts/train/` on the test split; write `artifacts/evaluate/` and log to the model's MLflow run.

    The predictions for the validation split are written too, so that a promotion need not look at the test split first.
    """
    with report_errors():
        all_params = load_params()
        params = all_params.evaluate
        verify_splits("validation", "test", with_files=True)
        md5 = verify(TRAIN, sorted({"model.json", BEST_WEIGHTS, f"{params.checkpoint}.safetensors"}))
        device = choose_device(params.device, field="evaluate.device")
        model = load_to_evaluate(TRAIN, params=params, device=device)
        # the MLflow run is the one of these weights, whichever checkpoint is evaluated
        is_recorded_model = model.weights_md5 == md5[BEST_WEIGHTS]
        if not is_recorded_model:
            print(
                f"evaluate.checkpoint is {params.checkpoint}: the metrics are of the last epoch, but predict and "
                f"MLflow use {BEST_WEIGHTS}, of the epoch that train.selection selected"
            )
        predictions, loss = predict_split(model, "test")
        info = DatasetInfo.read()
        result = evaluate(predictions, top_k=params.top_k, duplicates=info.test_duplicates)
        result = replace(result, metrics={"loss": loss, **result.metrics})
        write_predictions(EVALUATE / "validation_predictions.parquet", predict_split(model, "validation")[0])
        _write_files(result, predictions, temperature=model.config.temperature)
        _print_summary(result)
        experiment = experiment_name(info.dataset, folder=all_params.download.folder)
        run_id = _log_to_mlflow(
            result, model_md5=md5[BEST_WEIGHTS], experiment=experiment, is_recorded_model=is_recorded_model
        )
        if is_recorded_model and not get_settings().reproduces:
            register_evaluation(
                run_id,
                experiment=experiment,
                model_md5=model.weights_md5,
                test_md5=split_md5(predictions),
                data_md5=info.md5,
                metrics=result.metrics,
            )
        make_report()


def _write_files(result: Evaluation, predictions: Predictions, *, temperature: float | None) -> None:
    """Write the files of `artifacts/evaluate/`, whose bytes depend on the model, the data and the parameters only."""
    calibration = {"temperature": temperature, "num_bins": NUM_BINS, "raw": result.raw, "calibrated": result.calibrated}
    picture = plots.confusion_matrix(result.confusion, class_names=predictions.class_names)
    write_predictions(EVALUATE / "predictions.parquet", predictions)
    write_csv(EVALUATE / "predictions.csv", list(prediction_rows(predictions)))
    write_csv(EVALUATE / "per_class.csv", result.per_class)
    write_json(EVALUATE / "calibration.json", calibration)
    write_bytes(EVALUATE / "confusion_matrix.png", picture)
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


def _log_to_mlflow(result: Evaluation, *, model_md5: str, experiment: str, is_recorded_model: bool) -> str:
    """Log metrics, tags and plots to the MLflow run that made the model, found by the model's MD5; return its id.

    The metrics are linked to the run's model, and are the result of the run, if that model was evaluated, and not the
    weights of the last epoch. Raises TemporaryError where MLflow does not answer.
    """
    run, created = find_or_create_run(model_md5, experiment=experiment, setup=read_setup())
    if created:
        print(
            "the MLflow store has no run that made this model (it was pulled, or trained elsewhere): its evaluation is "
            "logged to a new run"
        )
    print(f"MLflow run {run.run_id}", flush=True)
    write_result(StepResult(run.run_id, run.experiment_id))
    run.log({f"{TEST_METRICS}{name}": value for name, value in metrics_of_models(result.metrics).items()}, step=0)
    with store_errors():
        if not run.flush():
            raise TemporaryError("MLflow does not answer: the evaluation was not logged; run the same command again")
        if is_recorded_model:
            with warn_on_failure(f"MLflow run {run.run_id} has no model, which cannot be registered"):
                ensure_model(run.run_id, TRAIN)
            run.link_to_model(TEST_METRICS, step=0)
            run.record(result_values(result.metrics))
        # the hashes of the first evaluation stay, as a later one may have other parameters
        run.record(output_values(EVALUATE, names=FILES), overwrite=False)
        for name in ("confusion_matrix.png", "per_class.csv", "metrics.json"):
            run.log_file(EVALUATE / name, folder="plots" if name.endswith("png") else "evaluate")
    return run.run_id


if __name__ == "__main__":
    main()
