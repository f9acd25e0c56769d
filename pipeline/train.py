"""Step 3: train the network on the train split, validate after each epoch, write the best and the last weights.

The algorithm is in `pipeline/training/loop.py`; `pipeline/training/selection.py` selects the best epoch.
"""

import importlib.metadata
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pipeline.arrays import DatasetInfo, Split
from pipeline.artifacts import (
    HISTORY,
    NORMALIZE,
    SELECTED_COLUMN,
    TRAIN,
    replace_folder,
    verify,
    verify_splits,
    write_bytes,
    write_csv,
)
from pipeline.core.errors import UserError, report_errors
from pipeline.core.processes import cpu_name
from pipeline.core.progress import format_time_left
from pipeline.core.results import StepResult, write_result
from pipeline.core.settings import get_settings
from pipeline.core.stage_code import code_md5
from pipeline.core.step_progress import reporter
from pipeline.models.airbench import Airbench
from pipeline.models.build import Classifier, build, memory_format, try_training
from pipeline.models.config import ModelConfig, configure
from pipeline.models.cpu_kernels import cpu_kernels_in_use
from pipeline.models.files import save_config, save_weights
from pipeline.models.freezing import apply_freezing
from pipeline.models.inference import logits_of, probabilities_of
from pipeline.models.names import TIMM_PREFIX
from pipeline.models.pretrained import load_pretrained
from pipeline.params import Params, TrainParams, load_params
from pipeline.tracking.experiments import experiment_name
from pipeline.tracking.logger import RunLogger
from pipeline.tracking.run_title import read_setup
from pipeline.tracking.runs import describe_dataset, training_run
from pipeline.tracking.training_progress import announce_epoch, announce_training
from pipeline.training import distributed
from pipeline.training.checkpoints import Checkpoint, Checkpoints, checkpoints_of, fingerprint
from pipeline.training.curves import curves
from pipeline.training.device import choose_device, gpu_uuids, prepare_torch
from pipeline.training.features import feature_key, kept_features, select_trained
from pipeline.training.gpu_lock import describe_holder, exclusive_gpus
from pipeline.training.initialize import initialize_from_images
from pipeline.training.loop import TrainingResult, train, validate_before_training, validation_batch_size
from pipeline.training.memory import explain_memory_errors
from pipeline.training.state import Epoch, Validation
from pipeline.training.temperature import fit_temperature
from pipeline.training.thresholds import fit_thresholds

FIRST_METRIC = "validation/accuracy"  # MLflow's compare page opens on the metric that was logged first


def main() -> None:
    """Run the step: `artifacts/normalize/` → `artifacts/train/`, with a run in MLflow."""
    with report_errors():
        all_params = load_params()
        params, info = all_params.train, DatasetInfo.read()
        check_params_fit_data(params, info)
        device = choose_device(params.device, field="train.device")
        processes = distributed.num_local_processes(params.processes)
        distributed.check_num_devices(processes, device=device)
        gpus = gpu_uuids(device, processes=processes)
        # the MLflow run is created inside: a training that waits for a GPU has no run yet
        with exclusive_gpus(gpus if distributed.acts_for_its_machine() else []):
            if params.processes > 1 and not distributed.is_launched():
                distributed.launch("pipeline.train", processes=params.processes)
            else:
                _train_in_this_process(all_params, info, gpus=gpus)


def _train_in_this_process(all_params: Params, info: DatasetInfo, *, gpus: Sequence[str]) -> None:
    """Train as the only process, or as one rank of several."""
    params = all_params.train
    device = prepare_torch(params)
    with distributed.process_group(device, processes=params.processes):
        if distributed.is_local_rank_0():
            verify_splits("train", "validation")
        with explain_memory_errors(params):
            classifier = _make_classifier(params, info, device=device)
            if distributed.rank() == 0:
                _train_and_record(classifier, all_params, info, gpus=gpus)
            else:
                _train_as_other_rank(classifier, params, info)


def _train_and_record(classifier: Classifier, all_params: Params, info: DatasetInfo, *, gpus: Sequence[str]) -> None:
    """Train, alone or as rank 0, and write the model, the checkpoints and the MLflow run."""
    params, device = all_params.train, next(classifier.parameters()).device
    training = fingerprint(**_determinants(params, info, device=device), reproduces=get_settings().reproduces)
    with checkpoints_of(training) as checkpoints:
        start = checkpoints.newest()
        with (
            training_run(
                experiment=experiment_name(info.dataset, folder=all_params.download.folder),
                setup=read_setup(),
                params=all_params.flat(),
                dataset=describe_dataset(info.dataset, source=all_params.download.origin, digest=info.md5),
                hardware=_hardware(params, device),
                training=training,
                checkpointed=start.state["mlflow"] if start else None,
            ) as run,
            distributed.announce_failure(),  # inside, as ending the MLflow run may take seconds
        ):
            _report_start(run, start=start, params=params)
            describe_holder(gpus, f"MLflow run {run.run_id}")
            distributed.broadcast_bytes(start.to_bytes() if start else b"")
            trained, train_split, validation_split = _select_module_and_splits(classifier, params, info)
            if start is None:
                report_before_training(validate_before_training(trained, validation_split, params=params), run=run)
            run.start_system_metrics()
            announce_training(start, params=params, num_train_images=len(train_split))
            result = train(
                trained,
                params=params,
                train_split=train_split,
                validation_split=validation_split,
                on_step=lambda step, loss, rate: report_step(step, loss, rate, run=run),
                on_epoch=lambda epoch, speed: report_epoch(epoch, speed, params=params, run=run),
                start=start,
                save=lambda checkpoint: _save(checkpoint, checkpoints, run=run),
            )
            report_selected(result, run=run)
            _write(
                result,
                classifier,
                trained=trained,
                params=params,
                config=configure(params, info),
                validation_split=validation_split,
            )
            run.log_training(TRAIN)


def _train_as_other_rank(classifier: Classifier, params: TrainParams, info: DatasetInfo) -> None:
    """Train as one of several processes; rank 0 writes the result."""
    content = distributed.broadcast_bytes()
    trained, train_split, validation_split = _select_module_and_splits(classifier, params, info)
    if not content:
        validate_before_training(trained, validation_split, params=params)  # rank 0 logs the result
    train(
        trained,
        params=params,
        train_split=train_split,
        validation_split=validation_split,
        start=Checkpoint.from_bytes(content) if content else None,
    )


def _select_module_and_splits(
    classifier: Classifier, params: TrainParams, info: DatasetInfo
) -> tuple[nn.Module, Split, Split]:
    """Return what to train with its train and validation split: the classifier on images, or its head on features."""
    device = next(classifier.parameters()).device
    splits = {name: _read_split(name, params, info, device=device) for name in ("train", "validation")}
    trained = select_trained(classifier, splits["train"], params=params)
    if trained is not classifier:
        # the head's number of classes, and where weights and labels are from, do not matter
        config = configure(params, info).model_dump(mode="json", exclude={"weights", "loss", "class_names"})
        md5s = verify(NORMALIZE, (), allow_unlisted=True)
        with distributed.local_rank_0_first("features"):
            for name, split in splits.items():
                determinants = {
                    "images": md5s[f"{name}_images.npy"],
                    "network": config,
                    "code": code_md5("train"),
                    **_hardware(params, device),
                }
                key = feature_key(classifier, params=params, determinants=determinants)
                splits[name] = kept_features(classifier, trained, split, name=name, key=key)
    return trained, splits["train"], splits["validation"]


def check_params_fit_data(params: TrainParams, info: DatasetInfo) -> None:
    """Raise UserError where a parameter is too large for the images, or needs a compiler that is missing."""
    num_images, num_validation = (sum(info.counts[split].values()) for split in ("train", "validation"))
    size = info.image_size
    cropped_size = (params.input_size or size) if params.random_resized_crop else size
    limits = {
        "batch_size": (params.batch_size, num_images, f"the train split has {num_images} images"),
        "crop_padding": (params.crop_padding, size - 1, f"the images have {size} pixels a side"),
        "processes": (params.processes, num_validation, f"the validation split has {num_validation} images"),
        "cutout_size": (params.cutout_size, cropped_size - 1, f"the images have {cropped_size} pixels a side"),
    }
    for field, (value, maximum, reason) in limits.items():
        if value > maximum:
            raise UserError(
                f"train.{field} is {value}, but {reason}; allowed: up to {maximum}; set train.{field}={maximum}"
            )
    if (params.mixup_alpha or params.cutmix_alpha) and params.batch_size < 2 * params.processes:
        field = "mixup_alpha" if params.mixup_alpha else "cutmix_alpha"
        raise UserError(
            f"train.{field} is {getattr(params, field):g}, but with train.batch_size {params.batch_size} and "
            f"train.processes {params.processes} each process has one image, and none to mix it with; allowed: 0; set "
            f"train.{field} to 0, or train.batch_size to at least {2 * params.processes}"
        )
    compiler = get_settings().cxx
    if params.compile and shutil.which(compiler) is None:
        raise UserError(
            f"train.compile is true, but there is no C++ compiler {compiler}; install it, set CXX to the compiler that "
            "you have, or set train.compile to false"
        )


def _read_split(name: str, params: TrainParams, info: DatasetInfo, *, device: torch.device) -> Split:
    """Read a split; its images are copied to the device if all fit into train.window_megabytes."""
    config, window_bytes = configure(params, info), params.window_megabytes * 2**20
    return Split.read(name, info=info, mean=config.mean, std=config.std, device=device, window_bytes=window_bytes)


def _hardware(params: TrainParams, device: torch.device) -> dict[str, str]:
    """Return what a model depends on to the last bit, besides code, data and parameters, as text by name."""
    return {
        "cpu": f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}",
        "cpu_kernels": cpu_kernels_in_use(params),
        "threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.replace("cpu", "none"),
    }


def _make_classifier(params: TrainParams, info: DatasetInfo, *, device: torch.device) -> Classifier:
    """Build the network with its first weights on the device, and print its name, size and device."""
    config = configure(params, info)
    classifier = build(config)
    newly_drawn = load_pretrained(classifier, config=config, md5=params.weights_md5)
    apply_freezing(classifier, config=config, params=params)
    if config.weights is None and isinstance(classifier.network, Airbench):
        initialize_from_images(classifier, _read_split("train", params, info, device=device), seed=params.seed)
    try_training(classifier, config=config, batch_size=params.batch_size)
    classifier.to(device).to(memory_format=memory_format(params))
    _print_network(classifier, config=config, params=params, device=device, newly_drawn=newly_drawn)
    return classifier


def _determinants(params: TrainParams, info: DatasetInfo, *, device: torch.device) -> dict[str, Any]:
    """Return what the trained weights depend on: data, parameters, code, and what decides how sums are rounded."""
    return {
        "data": info.md5,
        "params": params.model_dump(mode="json", exclude={"checkpoint_every_minutes"}),
        "code": code_md5("train"),
        "torch": torch.__version__,
        **({"timm": importlib.metadata.version("timm")} if params.model.startswith(TIMM_PREFIX) else {}),
        "device": device.type,
        "threads": torch.get_num_threads(),
    }


def _save(checkpoint: Checkpoint, checkpoints: Checkpoints, *, run: RunLogger) -> None:
    """Write a checkpoint that also holds the metrics still queued for MLflow; on failure, only warn."""
    try:
        checkpoints.write(replace(checkpoint, state={**checkpoint.state, "mlflow": run.state()}))
    except OSError as error:
        print(
            f"warning: step {checkpoint.step} has no checkpoint: {error.filename}: {error.strerror}; "
            "the training continues, and the checkpoint before it stays",
            flush=True,
        )


def _report_start(run: RunLogger, *, start: Checkpoint | None, params: TrainParams) -> None:
    """Print the MLflow run and where the training resumes; log the earlier epochs to a run that does not have them."""
    print(f"MLflow run {run.run_id}", flush=True)
    write_result(StepResult(run.run_id, run.experiment_id))
    if start is None:
        return
    history = [Epoch(**row) for row in start.state["history"]]
    print(f"resumes from its checkpoint: {len(history)}/{params.epochs} epochs done, step {start.step}", flush=True)
    if not run.resumed:
        print("warning: MLflow no longer has the run that began this training: its losses by step are lost", flush=True)
        for epoch in history:
            run.log(_metrics(epoch), step=epoch.epoch)


def _print_network(
    classifier: Classifier,
    *,
    config: ModelConfig,
    params: TrainParams,
    device: torch.device,
    newly_drawn: Sequence[str],
) -> None:
    """Print the network's name, size and device, and where its first weights are from."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in classifier.parameters()]
    count, num_trained = sum(count for count, _ in counts), sum(count for count, is_trained in counts if is_trained)
    trained = f" ({num_trained:,} trained)" if num_trained < count else ""
    processes = f" in {params.processes} processes" if params.processes > 1 else ""
    kernels_in_use = cpu_kernels_in_use(params)
    kernels = "" if device.type != "cpu" or kernels_in_use == "portable" else f", kernels {kernels_in_use}"
    classes = f"{len(config.class_names)} classes"
    print(f"{config.model}: {count:,} parameters{trained}, {classes}, on {device}{processes}{kernels}", flush=True)
    if config.weights is not None:
        drawn = f"; newly drawn: {', '.join(newly_drawn)}" if newly_drawn else ""
        print(f"weights from {config.weights}{drawn}", flush=True)


def report_before_training(validation: Validation, *, run: RunLogger) -> None:
    """Log the validation of the untrained or pretrained network to MLflow, as epoch 0."""
    run.log(_first_metric_first({f"validation/{name}": value for name, value in vars(validation).items()}), step=0)


def _metrics(epoch: Epoch) -> dict[str, float]:
    """Return the metrics that are logged once an epoch, in the groups `validation/` and `train/`."""
    values = {name: value for name, value in vars(epoch).items() if name not in ("epoch", "learning_rate")}
    return _first_metric_first({name.replace("_", "/", 1): value for name, value in values.items()})


def _first_metric_first(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics with FIRST_METRIC before the others."""
    return {FIRST_METRIC: metrics[FIRST_METRIC], **metrics}


def report_selected(result: TrainingResult, *, run: RunLogger) -> None:
    """Log the number of the selected epoch and its validation accuracy to MLflow."""
    epoch = result.history[result.selected.epoch - 1]
    figures = {"selected/validation_accuracy": epoch.validation_accuracy, "selected/epoch": epoch.epoch}
    run.log(figures, step=0)  # MLflow draws a metric with another step as a curve


def report_step(step: int, loss: float, learning_rate: float, *, run: RunLogger) -> None:
    """Log loss and learning rate of a step to MLflow, and report the loss to the flow run."""
    run.log({"step/loss": loss, "step/learning_rate": learning_rate}, step=step)
    reporter().log_step(loss)


def report_epoch(epoch: Epoch, images_per_second: float, *, params: TrainParams, run: RunLogger) -> None:
    """Log a finished epoch to MLflow, and print it as one line; a terminal of 80 columns has room for 64."""
    run.log({**_metrics(epoch), "speed/images_per_second": images_per_second}, step=epoch.epoch)
    announce_epoch(epoch, images_per_second)
    validation = f"acc {epoch.validation_accuracy:.1%}"
    if params.select_by == "macro_f1":
        validation += f" F1 {epoch.validation_macro_f1:.1%}"
    else:
        validation = f"loss {epoch.validation_loss:.3f} {validation}"
    number = f"{epoch.epoch:>{len(str(params.epochs))}}/{params.epochs}"
    print(f"epoch {number} loss {epoch.train_loss:.3f} | val {validation}{_time_left(epoch, params)}", flush=True)


def _time_left(epoch: Epoch, params: TrainParams) -> str:
    """Return the estimated time left after an epoch, as the end of its line; empty while it is unknown."""
    seconds = reporter().seconds_left()
    if seconds is None or epoch.epoch == params.epochs:
        return ""
    at_most = "" if params.early_stopping_epochs is None else "≤"
    return f" | {at_most}{format_time_left(seconds)} left"


def _write(
    result: TrainingResult,
    classifier: Classifier,
    *,
    trained: nn.Module,
    params: TrainParams,
    config: ModelConfig,
    validation_split: Split,
) -> None:
    """Write weights, configuration, history and curves to `artifacts/train/`, all or nothing.

    `trained` is the classifier or its head, to which the weights of the result belong. Temperature and thresholds in
    the configuration are those of the best weights on the validation split.
    """
    with replace_folder(TRAIN) as folder:
        for name, weights in (("last", result.last), ("best", result.best)):
            trained.load_state_dict(weights)
            save_weights(classifier, folder / f"{name}.safetensors")
        logits = logits_of(trained, validation_split, batch_size=validation_batch_size(trained, validation_split))
        temperature = fit_temperature(logits.cpu().numpy(), validation_split.labels.cpu().numpy())
        thresholds = fit_thresholds(probabilities_of(logits, temperature=temperature))
        save_config(config.model_copy(update={"temperature": temperature, "thresholds": thresholds}), folder)
        selected = result.selected
        reasons = {selected.epoch: selected.reason}
        rows = [{**vars(epoch), SELECTED_COLUMN: reasons.get(epoch.epoch, "")} for epoch in result.history]
        write_csv(folder / HISTORY, rows)
        with_macro_f1 = params.select_by == "macro_f1"
        picture = curves(rows, selected=selected.epoch, reason=selected.reason, with_macro_f1=with_macro_f1)
        write_bytes(folder / "curves.png", picture)


if __name__ == "__main__":
    main()
