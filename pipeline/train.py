"""Train the network on the train split, judge each epoch on the validation split, keep the best and the last model."""

import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import plots, tracking
from pipeline.artifacts import TRAIN, replace_folder, verify_splits, write_bytes, write_csv
from pipeline.checkpoint import (
    Checkpoint,
    Checkpoints,
    checkpoints_of,
    fingerprint,
    optimizer_tensors,
    prefixed,
    random_states,
    restore_optimizer,
    restore_random_states,
    unprefixed,
)
from pipeline.data import Augmentation, DatasetInfo, Split, TrainingBatches, choose_device, generator
from pipeline.errors import UserError, first_line, report_errors, shown, uninterrupted
from pipeline.model import (
    Classifier,
    ModelConfig,
    build,
    load_pretrained,
    logits_of,
    save_config,
    save_weights,
    try_training,
)
from pipeline.params import DownloadParams, TrainParams, load_params
from pipeline.progress import progress

VALIDATION_BATCH = 500
DROPOUT_STREAM = 1


@dataclass(frozen=True)
class Epoch:
    """One row of the history: losses and accuracies are sums over images divided by images."""

    epoch: int
    learning_rate: float
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float


@dataclass(frozen=True)
class Trained:
    """The weights of the best epoch by validation accuracy (the earlier of equals) and of the last, and all epochs."""

    best: dict[str, Tensor]
    last: dict[str, Tensor]
    history: list[Epoch]


OnStep = Callable[[int, float, float], None]
"""Called with the step (from 1), its loss and its learning rate."""
OnEpoch = Callable[[Epoch, float], None]
"""Called with the finished epoch and its speed in images a second."""
Save = Callable[[Checkpoint], None]
"""Called with all that is needed to go on from here."""


def train(
    classifier: Classifier,
    *,
    params: TrainParams,
    train_split: Split,
    validation_split: Split,
    on_step: OnStep = lambda step, loss, rate: None,
    on_epoch: OnEpoch = lambda epoch, images_per_second: None,
    start: Checkpoint | None = None,
    save: Save = lambda checkpoint: None,
) -> Trained:
    """Train `classifier`, which lies on the splits' device, in place; go on from `start`, as if there had been no stop.

    `save` is called after each epoch, every `params.checkpoint_every_minutes`, and on SIGTERM and Ctrl-C. Raises
    UserError where a loss is not finite, before the step that would have spoilt the weights.
    """
    training = _Training(
        classifier, params=params, train_split=train_split, validation_split=validation_split, on_step=on_step
    )
    if start is not None:
        training.restore(start)
    with _saved_on_interrupt(training, save):
        while not training.is_over:
            training.run_epoch(on_epoch=on_epoch, save=save)
    return Trained(best=training.best, last=_copy(classifier), history=training.history)


@contextmanager
def _saved_on_interrupt(training: "_Training", save: Save) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        save(training.checkpoint())
        error.args = (f"the same command goes on from {training.where}",)
        raise


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


class _Training:
    """The state that lives from step to step; between two steps, `checkpoint` holds all of it."""

    def __init__(
        self,
        classifier: Classifier,
        *,
        params: TrainParams,
        train_split: Split,
        validation_split: Split,
        on_step: OnStep,
    ) -> None:
        self._classifier, self._params, self._on_step = classifier, params, on_step
        self._train_split, self._validation_split = train_split, validation_split
        self._device = next(classifier.parameters()).device
        self._criterion = loss_function(params.loss, label_smoothing=params.label_smoothing)
        self._optimizer = make_optimizer(classifier.parameters(), params=params)
        self._precision = _autocast_dtype(params.mixed_precision, device=self._device)
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=self._precision is torch.float16)
        self._step, self._rate = 0, 0.0
        self._saved, self._started = time.monotonic(), time.perf_counter()
        self.history: list[Epoch] = []
        self.best: dict[str, Tensor] = {}
        self._best_accuracy, self._best_epoch = -1.0, 0
        self._batches: TrainingBatches | None = None
        """Of the epoch that is under way, if one is."""
        self._loss_sum = torch.zeros((), device=self._device)
        self._hits = torch.zeros((), device=self._device, dtype=torch.int64)

    @property
    def is_over(self) -> bool:
        patience, done = self._params.early_stopping_epochs, len(self.history)
        return done >= self._params.epochs or (patience is not None and done - self._best_epoch >= patience)

    @property
    def where(self) -> str:
        return f"epoch {len(self.history) + (self._batches is not None)}, step {self._step}"

    def run_epoch(self, *, on_epoch: OnEpoch, save: Save) -> None:
        """One pass over the train split, or what is left of it, and one over the validation split."""
        epoch = len(self.history) + 1
        batches = self._batches = self._batches or self._begin(epoch)
        with progress(
            f"epoch {epoch}", total=len(batches), done=batches.position, unit="steps", leave=False
        ) as advance:
            while batches.position < len(batches):
                with uninterrupted():
                    self._take_step(*next(batches), epoch=epoch)
                advance(1)
                self._save_if_due(save)
        images_per_second = len(batches) * self._params.batch_size / (time.perf_counter() - self._started)
        loss, accuracy = judge(self._classifier, self._validation_split, loss=self._params.loss)
        refuse_non_finite(loss, where=f"epoch {epoch}, validation", params=self._params)
        with uninterrupted():
            self._finish(epoch, validation_loss=loss, validation_accuracy=accuracy)
            on_epoch(self.history[-1], images_per_second)
        self._save(save)

    def _begin(self, epoch: int) -> TrainingBatches:
        params = self._params
        torch.manual_seed(generator(params.seed, epoch=epoch, stream=DROPOUT_STREAM).initial_seed())
        self._classifier.train()
        self._loss_sum.zero_()
        self._hits.zero_()
        self._started = time.perf_counter()
        return self._batches_of(epoch)

    def _batches_of(self, epoch: int) -> TrainingBatches:
        params = self._params
        return TrainingBatches(
            self._train_split,
            batch_size=params.batch_size,
            seed=params.seed,
            epoch=epoch,
            augmentation=augmentation(params),
        )

    def _finish(self, epoch: int, *, validation_loss: float, validation_accuracy: float) -> None:
        assert self._batches
        images = len(self._batches) * self._params.batch_size
        loss, accuracy = self._loss_sum.item() / images, self._hits.item() / images
        self.history.append(Epoch(epoch, self._rate, loss, accuracy, validation_loss, validation_accuracy))
        if validation_accuracy > self._best_accuracy:
            self.best, self._best_accuracy, self._best_epoch = _copy(self._classifier), validation_accuracy, epoch
        self._batches = None

    def _save_if_due(self, save: Save) -> None:
        if time.monotonic() - self._saved > 60 * self._params.checkpoint_every_minutes:
            self._save(save)

    def _save(self, save: Save) -> None:
        save(self.checkpoint())
        self._saved = time.monotonic()

    def checkpoint(self) -> Checkpoint:
        """All of the state, as it is after the last step."""
        batches = self._batches
        tensors = {
            **prefixed("model", self._classifier.state_dict()),
            **prefixed("best", self.best),
            **optimizer_tensors(self._optimizer),
            **random_states(self._device),
            **({"random.batches": batches.random_state()} if batches else {}),
            "loss_sum": self._loss_sum,
            "hits": self._hits,
        }
        state = {
            "position": batches.position if batches else None,
            "seconds": time.perf_counter() - self._started,
            "rate": self._rate,
            "history": [vars(epoch) for epoch in self.history],
            "best_accuracy": self._best_accuracy,
            "best_epoch": self._best_epoch,
            "scaler": self._scaler.state_dict(),
        }
        return Checkpoint(self._step, tensors, state)

    def restore(self, start: Checkpoint) -> None:
        """Be as when `start` was taken."""
        tensors, state = start.tensors, start.state
        self._classifier.load_state_dict(unprefixed("model", tensors))
        self.best = {name: tensor.to(self._device) for name, tensor in unprefixed("best", tensors).items()}
        restore_optimizer(self._optimizer, unprefixed("optimizer", tensors))
        self._scaler.load_state_dict(state["scaler"])
        self._step, self._rate = start.step, state["rate"]
        self.history = [Epoch(**row) for row in state["history"]]
        self._best_accuracy, self._best_epoch = state["best_accuracy"], state["best_epoch"]
        self._loss_sum.copy_(tensors["loss_sum"])
        self._hits.copy_(tensors["hits"])
        self._started = time.perf_counter() - state["seconds"]
        if state["position"] is not None:
            self._batches = self._batches_of(len(self.history) + 1)
            self._batches.go_to(state["position"], random_state=tensors["random.batches"])
            self._classifier.train()
        restore_random_states(tensors, device=self._device)

    def _take_step(self, images: Tensor, labels: Tensor, *, epoch: int) -> None:
        # schedule
        steps_per_epoch = len(self._train_split) // self._params.batch_size
        self._rate = learning_rate(self._step, steps_per_epoch=steps_per_epoch, params=self._params)
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate
        # forward
        with torch.autocast(self._device.type, dtype=self._precision, enabled=self._precision is not None):
            logits = self._classifier(images)
        loss = self._criterion(logits.float(), labels)
        refuse_non_finite(loss.item(), where=f"epoch {epoch}, step {self._step + 1}", params=self._params)
        # backward
        self._optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if self._params.gradient_clip_norm is not None:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self._classifier.parameters(), self._params.gradient_clip_norm)
        # update
        self._scaler.step(self._optimizer)
        self._scaler.update()
        # account
        self._step += 1
        self._loss_sum += loss.detach() * len(labels)
        self._hits += (logits.detach().argmax(1) == labels).sum()
        if self._step % self._params.log_every_steps == 0:
            self._on_step(self._step, loss.item(), self._rate)


def refuse_non_finite(loss: float, *, where: str, params: TrainParams) -> None:
    if not math.isfinite(loss):
        raise UserError(
            f"{where}: the loss is {loss}; lower train.learning_rate (now {params.learning_rate:g}) "
            "or set train.gradient_clip_norm"
        )


def augmentation(params: TrainParams) -> Augmentation:
    return Augmentation(flip=params.flip, crop_padding=params.crop_padding, cutout_size=params.cutout_size)


def loss_function(name: str, *, label_smoothing: float = 0.0) -> Callable[[Tensor, Tensor], Tensor]:
    """From logits (B, num_classes) and labels (B,) int64 to the mean loss of the batch.

    `mse` compares the outputs with one-hot targets of their shape.
    """
    if name == "cross_entropy":
        return nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    return lambda logits, labels: F.mse_loss(logits, F.one_hot(labels, logits.shape[1]).to(logits.dtype))


def make_optimizer(parameters: Iterator[nn.Parameter], *, params: TrainParams) -> torch.optim.Optimizer:
    rate, decay = params.learning_rate, params.weight_decay
    match params.optimizer:
        case "sgd":
            return torch.optim.SGD(
                parameters, lr=rate, momentum=params.momentum, nesterov=params.nesterov, weight_decay=decay
            )
        case "adam":
            return torch.optim.Adam(parameters, lr=rate, weight_decay=decay)
        case "adamw":
            return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
        case "rmsprop":
            return torch.optim.RMSprop(parameters, lr=rate, momentum=params.momentum, weight_decay=decay)


def learning_rate(step: int, *, steps_per_epoch: int, params: TrainParams) -> float:
    """The rate of a step (from 0): a linear warm-up to the peak, then the schedule over the steps that are left.

    `one_cycle` is PyTorch's OneCycleLR (Smith and Topin 2017, arXiv:1708.07120) with its defaults: cosine from a 25th
    of the peak, and cosine down to a 250,000th. `cosine` is Loshchilov and Hutter 2016 (arXiv:1608.03983) without
    restarts.
    """
    peak, total = params.learning_rate, params.epochs * steps_per_epoch
    warmup = params.warmup_fraction * total
    if params.schedule == "one_cycle":
        return _one_cycle(step, warmup=warmup, total=total, peak=peak)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    match params.schedule:
        case "constant":
            return peak
        case "step":
            return peak * float(params.step_factor ** ((step - warmup) // (params.step_epochs * steps_per_epoch)))
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def _one_cycle(step: int, *, warmup: float, total: int, peak: float) -> float:
    top = warmup - 1
    if step <= top:
        return _cosine(peak / 25, peak, step / top if top else 1.0)
    return _cosine(peak, peak / 250_000, (step - top) / (total - 1 - top))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def judge(classifier: Classifier, split: Split, *, loss: str) -> tuple[float, float]:
    """Mean loss (without label smoothing) and accuracy over a whole split."""
    logits = logits_of(classifier, split, batch_size=VALIDATION_BATCH)
    mean = loss_function(loss)(logits, split.labels).item()
    return mean, (logits.argmax(1) == split.labels).double().mean().item()


def _autocast_dtype(name: str, *, device: torch.device) -> torch.dtype | None:
    if device.type != "cuda" or name == "none":
        return None
    return torch.bfloat16 if name == "bfloat16" else torch.float16


def _copy(classifier: Classifier) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in classifier.state_dict().items()}


def prepare_torch(params: TrainParams) -> torch.device:
    """Set threads, determinism and seed; returns the device. Raises UserError where it is not there."""
    device = choose_device(params.device, field="train.device")
    torch.set_num_threads(params.cpu_threads or os.cpu_count() or 1)
    # PyTorch takes 1.5 s to ask for it, and lenet on the CPU has no operation that heeds it
    if params.deterministic and (device.type != "cpu" or params.model != "lenet"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, before its first call
        torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(params.seed)
    return device


def _hardware(device: torch.device) -> dict[str, str]:
    """What the last bits of a model depend on, besides code, data and parameters."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(": ")[2] for line in cpu.splitlines() if line.startswith("model name")]
    name = next(iter(names), platform.processor() or platform.machine())
    return {
        "cpu": f"{name}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.replace("cpu", "none"),
    }


def configure(params: TrainParams, info: DatasetInfo) -> ModelConfig:
    return ModelConfig(
        model=params.model,
        weights=params.weights,
        loss=params.loss,
        class_names=info.class_names,
        image_size=info.image_size,
        input_size=params.input_size,
        channels=info.channels,
        resize=info.resize,
        mean=info.mean,
        std=info.std,
    )


def refuse_misfits(params: TrainParams, info: DatasetInfo) -> None:
    """Raises UserError where a parameter does not fit the size or number of the images."""
    num_images, size = sum(info.counts["train"].values()), info.image_size
    limits = {
        "batch_size": (params.batch_size, num_images, f"the train split has {num_images} images"),
        "crop_padding": (params.crop_padding, size - 1, f"the images have {size} pixels a side"),
        "cutout_size": (params.cutout_size, size - 1, f"the images have {size} pixels a side"),
    }
    for field, (value, most, reason) in limits.items():
        if value > most:
            raise UserError(f"train.{field} is {value}, but {reason}; allowed: up to {most}")


def main() -> None:
    """The step: `artifacts/normalize/` → `artifacts/train/`, with a run in MLflow."""
    with report_errors():
        everything = load_params()
        verify_splits("train", "validation")
        info = DatasetInfo.read()
        refuse_misfits(everything.train, info)
        device = prepare_torch(everything.train)
        config = configure(everything.train, info)
        training = fingerprint(
            **_determinants(everything.train, info, device=device), reproduces=os.environ.get("PIPELINE_REPRODUCES")
        )
        with _told_memory(everything.train), checkpoints_of(training) as checkpoints:
            classifier = _make_classifier(everything.train, config=config, device=device)
            start = checkpoints.newest()
            with tracking.training_run(
                experiment=info.dataset,
                params=everything.flat(),
                dataset=tracking.dataset(info.dataset, source=_source(everything.download), digest=info.md5),
                hardware=_hardware(device),
                training=training,
                earlier=start.state["mlflow"] if start else None,
            ) as run:
                _say_run(run, start=start, params=everything.train)
                trained = _train(classifier, everything.train, info, start=start, checkpoints=checkpoints, run=run)
                _write(trained, classifier, config=config)
                run.record(TRAIN)


def _make_classifier(params: TrainParams, *, config: ModelConfig, device: torch.device) -> Classifier:
    """With its first weights, on the device; says what it is."""
    classifier = build(config)
    drawn = load_pretrained(classifier, config=config, md5=params.weights_md5)
    try_training(classifier, config=config, batch_size=params.batch_size)
    classifier.to(device).to(memory_format=torch.channels_last if params.channels_last else torch.contiguous_format)
    _say_start(classifier, config=config, device=device, drawn=drawn)
    return classifier


def _train(
    classifier: Classifier,
    params: TrainParams,
    info: DatasetInfo,
    *,
    start: Checkpoint | None,
    checkpoints: Checkpoints,
    run: tracking.Run,
) -> Trained:
    device = next(classifier.parameters()).device
    return train(
        classifier,
        params=params,
        train_split=Split.read("train", info=info, device=device),
        validation_split=Split.read("validation", info=info, device=device),
        on_step=lambda step, loss, rate: run.log({"loss": loss, "learning_rate": rate}, step=step),
        on_epoch=lambda epoch, speed: _report_epoch(epoch, speed, params=params, run=run),
        start=start,
        save=lambda checkpoint: _save(checkpoint, checkpoints, run=run),
    )


def _determinants(params: TrainParams, info: DatasetInfo, *, device: torch.device) -> dict[str, Any]:
    """What the trained weights depend on: data, parameters, code, and how sums are made."""
    return {
        "data": info.md5,
        "params": params.model_dump(mode="json", exclude={"checkpoint_every_minutes"}),
        "code": tracking.code_md5(),
        "torch": torch.__version__,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
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


def _say_start(classifier: Classifier, *, config: ModelConfig, device: torch.device, drawn: Sequence[str]) -> None:
    count = sum(parameter.numel() for parameter in classifier.parameters())
    print(f"{config.model}: {count:,} parameters, {len(config.class_names)} classes, on {device}", flush=True)
    if config.weights is not None:
        fresh = f"; freshly drawn: {', '.join(drawn)}" if drawn else ""
        print(f"weights from {config.weights}{fresh}", flush=True)


def _metrics(epoch: Epoch) -> dict[str, float]:
    return {name: value for name, value in vars(epoch).items() if name not in ("epoch", "learning_rate")}


def _report_epoch(epoch: Epoch, images_per_second: float, *, params: TrainParams, run: tracking.Run) -> None:
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
        rows: list[Mapping[str, float]] = [vars(epoch) for epoch in trained.history]
        write_csv(folder / "history.csv", rows)
        write_bytes(folder / "curves.png", plots.curves(rows))


if __name__ == "__main__":
    main()
