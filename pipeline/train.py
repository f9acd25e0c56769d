"""Train the network on the train split, validate after each epoch, keep the best and the last model.

Which epoch is the best is decided in `pipeline.training.loop.best_epochs`.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline.arrays import DatasetInfo, Split
from pipeline.artifacts import HISTORY, KEPT, TRAIN, replace_folder, verify_splits, write_bytes, write_csv
from pipeline.core.errors import UserError, first_line, report_errors, shown
from pipeline.core.processes import cpu_name
from pipeline.core.stage_code import code_md5
from pipeline.models.airbench import Airbench
from pipeline.models.build import Classifier, build, memory_format, try_training
from pipeline.models.config import ModelConfig, configure
from pipeline.models.files import save_config, save_weights
from pipeline.models.pretrained import load_pretrained
from pipeline.params import DownloadParams, Params, TrainParams, load_params
from pipeline.tracking import runs as tracking
from pipeline.training import distributed
from pipeline.training.checkpoints import Checkpoint, Checkpoints, checkpoints_of, fingerprint
from pipeline.training.curves import curves
from pipeline.training.device import choose_device
from pipeline.training.initialize import initialize_from_images
from pipeline.training.loop import Trained, prepare_torch, train
from pipeline.training.selection import Epoch


@contextmanager
def _told_memory(params: TrainParams) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # the allocator for the CPU has no exception of its own
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise UserError(
            f"train.batch_size is {params.batch_size}: too much for the memory of this machine ({first_line(error)}); "
            "lower it, or train.input_size, or end what else uses the memory"
        ) from None


def refuse_misfits(params: TrainParams, info: DatasetInfo) -> None:
    """Raises UserError where a parameter does not fit the size or number of the images."""
    num_images, num_validation = (sum(info.counts[split].values()) for split in ("train", "validation"))
    size = info.image_size
    limits = {
        "batch_size": (params.batch_size, num_images, f"the train split has {num_images} images"),
        "crop_padding": (params.crop_padding, size - 1, f"the images have {size} pixels a side"),
        "processes": (params.processes, num_validation, f"the validation split has {num_validation} images"),
        "cutout_size": (params.cutout_size, size - 1, f"the images have {size} pixels a side"),
    }
    for field, (value, most, reason) in limits.items():
        if value > most:
            raise UserError(f"train.{field} is {value}, but {reason}; allowed: up to {most}")
    compiler = os.environ.get("CXX", "g++")
    if params.compile and shutil.which(compiler) is None:
        raise UserError(
            f"train.compile is true, but there is no C++ compiler {compiler}; install it, or set CXX or false"
        )


def main() -> None:
    """The step: `artifacts/normalize/` → `artifacts/train/`, with a run in MLflow."""
    with report_errors():
        everything = load_params()
        params, info = everything.train, DatasetInfo.read()
        refuse_misfits(params, info)
        if params.processes > 1 and not distributed.is_launched():
            device = choose_device(params.device, field="train.device")
            distributed.launch("pipeline.train", processes=params.processes, device=device)
            return
        device = prepare_torch(params)
        with distributed.joined(device, processes=params.processes):
            if distributed.is_first_on_its_machine():
                verify_splits("train", "validation")
            classifier = _make_classifier(params, info, device=device)
            with _told_memory(params):
                if distributed.rank() == 0:
                    _lead(classifier, everything, info)
                else:
                    _follow(classifier, params, info)


def _lead(classifier: Classifier, everything: Params, info: DatasetInfo) -> None:
    """Train, alone or as the first of several processes, and keep what comes of it."""
    params, device = everything.train, next(classifier.parameters()).device
    training = fingerprint(
        **_determinants(params, info, device=device), reproduces=os.environ.get("PIPELINE_REPRODUCES")
    )
    with checkpoints_of(training) as checkpoints:
        start = checkpoints.newest()
        with (
            tracking.training_run(
                experiment=info.dataset,
                params=everything.flat(),
                dataset=tracking.dataset(info.dataset, source=_source(everything.download), digest=info.md5),
                hardware=_hardware(device),
                training=training,
                earlier=start.state["mlflow"] if start else None,
            ) as run,
            distributed.announced(),  # before the run is ended, which may take seconds
        ):
            _say_run(run, start=start, params=params)
            distributed.from_first(start.to_bytes() if start else b"")
            trained = train(
                classifier,
                params=params,
                train_split=_read_split("train", params, info, device=device),
                validation_split=_read_split("validation", params, info, device=device),
                on_step=lambda step, loss, rate: run.log({"loss": loss, "learning_rate": rate}, step=step),
                on_epoch=lambda epoch, speed: report_epoch(epoch, speed, params=params, run=run),
                start=start,
                save=lambda checkpoint: _save(checkpoint, checkpoints, run=run),
            )
            run.log({"kept_epoch": trained.kept.epoch}, step=trained.kept.epoch)
            _write(trained, classifier, config=configure(params, info))
            run.record(TRAIN)


def _follow(classifier: Classifier, params: TrainParams, info: DatasetInfo) -> None:
    """Train as one of several processes, of which the first one keeps what comes of it."""
    content, device = distributed.from_first(), next(classifier.parameters()).device
    train(
        classifier,
        params=params,
        train_split=_read_split("train", params, info, device=device),
        validation_split=_read_split("validation", params, info, device=device),
        start=Checkpoint.from_bytes(content) if content else None,
    )


def _read_split(name: str, params: TrainParams, info: DatasetInfo, *, device: torch.device) -> Split:
    return Split.read(name, info=info, device=device, window_bytes=params.window_megabytes * 2**20)


def _hardware(device: torch.device) -> dict[str, str]:
    """What the last bits of a model depend on, besides code, data and parameters."""
    return {
        "cpu": f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.replace("cpu", "none"),
    }


def _make_classifier(params: TrainParams, info: DatasetInfo, *, device: torch.device) -> Classifier:
    """With its first weights, on the device; says what it is."""
    config = configure(params, info)
    classifier = build(config)
    drawn = load_pretrained(classifier, config=config, md5=params.weights_md5)
    if config.weights is None and isinstance(classifier.network, Airbench):
        split = _read_split("train", params, info, device=torch.device("cpu"))
        initialize_from_images(classifier, split, seed=params.seed)
    try_training(classifier, config=config, batch_size=params.batch_size)
    classifier.to(device).to(memory_format=memory_format(params))
    _say_start(classifier, config=config, params=params, device=device, drawn=drawn)
    return classifier


def _determinants(params: TrainParams, info: DatasetInfo, *, device: torch.device) -> dict[str, Any]:
    """What the trained weights depend on: data, parameters, code, and how sums are made."""
    return {
        "data": info.md5,
        "params": params.model_dump(mode="json", exclude={"checkpoint_every_minutes"}),
        "code": code_md5("train"),
        "torch": torch.__version__,
        "device": device.type,
        "threads": torch.get_num_threads(),
    }


def _save(checkpoint: Checkpoint, checkpoints: Checkpoints, *, run: tracking.Run) -> None:
    """Write it, with what MLflow has yet to be told; a training does not end for want of a checkpoint."""
    try:
        checkpoints.write(replace(checkpoint, state={**checkpoint.state, "mlflow": run.notes()}))
    except OSError as error:
        print(
            f"warning: step {checkpoint.step} has no checkpoint: {error.filename}: {error.strerror}; "
            "the training goes on, and the checkpoint before it stays",
            flush=True,
        )


def _say_run(run: tracking.Run, *, start: Checkpoint | None, params: TrainParams) -> None:
    """Name the run, and say where the training goes on; a run that lacks the epochs until there is told them."""
    print(f"MLflow run {run.run_id}", flush=True)
    if start is None:
        return
    history = [Epoch(**row) for row in start.state["history"]]
    print(f"goes on from its checkpoint: {len(history)}/{params.epochs} epochs done, step {start.step}", flush=True)
    if not run.taken_up:
        print("warning: MLflow no longer has the run that began this training: its losses by step are lost", flush=True)
        for epoch in history:
            run.log(_metrics(epoch), step=epoch.epoch)


def _source(params: DownloadParams) -> str | None:
    return {"digits": None, "cifar10": shown(params.urls[0]), "imagefolder": str(Path(params.folder).resolve())}[
        params.dataset
    ]


def _say_start(
    classifier: Classifier, *, config: ModelConfig, params: TrainParams, device: torch.device, drawn: Sequence[str]
) -> None:
    count, classes = sum(parameter.numel() for parameter in classifier.parameters()), len(config.class_names)
    together = f" in {params.processes} processes" if params.processes > 1 else ""
    print(f"{config.model}: {count:,} parameters, {classes} classes, on {device}{together}", flush=True)
    if config.weights is not None:
        fresh = f"; freshly drawn: {', '.join(drawn)}" if drawn else ""
        print(f"weights from {config.weights}{fresh}", flush=True)


def _metrics(epoch: Epoch) -> dict[str, float]:
    return {name: value for name, value in vars(epoch).items() if name not in ("epoch", "learning_rate")}


def report_epoch(epoch: Epoch, images_per_second: float, *, params: TrainParams, run: tracking.Run) -> None:
    """The finished epoch, as a line and as metrics."""
    run.log({**_metrics(epoch), "images_per_second": images_per_second}, step=epoch.epoch)
    done = 10 * epoch.epoch // params.epochs
    print(
        f"epoch {epoch.epoch:>{len(str(params.epochs))}}/{params.epochs} {'█' * done}{'░' * (10 - done)} "
        f"loss {epoch.train_loss:.3f} accuracy {epoch.train_accuracy:.1%} | "
        f"validation {epoch.validation_loss:.3f} {epoch.validation_accuracy:.1%} | {images_per_second:,.0f} images/s",
        flush=True,
    )


def _write(trained: Trained, classifier: Classifier, *, config: ModelConfig) -> None:
    with replace_folder(TRAIN) as folder:
        for name, weights in (("best", trained.best), ("last", trained.last)):
            classifier.load_state_dict(weights)
            save_weights(classifier, folder / f"{name}.safetensors")
        save_config(config, folder)
        kept = trained.kept
        rows = [{**vars(epoch), KEPT: kept.reason if epoch.epoch == kept.epoch else ""} for epoch in trained.history]
        write_csv(folder / HISTORY, rows)
        write_bytes(folder / "curves.png", curves(rows, kept=kept.epoch, reason=kept.reason))


if __name__ == "__main__":
    main()
