"""Train the network on the train split, judge each epoch on the validation split, keep the best and the last model."""

import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import plots, tracking
from pipeline.artifacts import TRAIN, file_md5, replace_folder, write_bytes, write_csv
from pipeline.data import Augmentation, DatasetInfo, Split, choose_device, generator, training_batches
from pipeline.errors import UserError, report_errors, shown
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


def train(
    classifier: Classifier,
    *,
    params: TrainParams,
    train_split: Split,
    validation_split: Split,
    on_step: OnStep = lambda step, loss, rate: None,
    on_epoch: OnEpoch = lambda epoch, images_per_second: None,
) -> Trained:
    """Train `classifier`, which lies on the splits' device, in place.

    Raises UserError where a loss is not finite, before the step that would have spoilt the weights.
    """
    trainer = _Trainer(
        classifier, params=params, steps_per_epoch=len(train_split) // params.batch_size, on_step=on_step
    )
    history: list[Epoch] = []
    best: dict[str, Tensor] = {}
    best_accuracy, best_epoch = -1.0, 0
    for epoch in range(1, params.epochs + 1):
        started = time.perf_counter()
        loss, accuracy, images = trainer.run_epoch(epoch, train_split)
        images_per_second = images / (time.perf_counter() - started)
        validation_loss, validation_accuracy = judge(classifier, validation_split, loss=params.loss)
        refuse_non_finite(validation_loss, where=f"epoch {epoch}, validation", params=params)
        history.append(Epoch(epoch, trainer.rate, loss, accuracy, validation_loss, validation_accuracy))
        on_epoch(history[-1], images_per_second)
        if validation_accuracy > best_accuracy:
            best, best_accuracy, best_epoch = _copy(classifier), validation_accuracy, epoch
        if params.early_stopping_epochs is not None and epoch - best_epoch >= params.early_stopping_epochs:
            break
    return Trained(best=best, last=_copy(classifier), history=history)


class _Trainer:
    """The state that lives from step to step: weights, optimizer, gradient scale, step number."""

    def __init__(self, classifier: Classifier, *, params: TrainParams, steps_per_epoch: int, on_step: OnStep) -> None:
        self._classifier, self._params, self._on_step = classifier, params, on_step
        self._device = next(classifier.parameters()).device
        self._criterion = loss_function(params.loss, label_smoothing=params.label_smoothing)
        self._optimizer = make_optimizer(classifier.parameters(), params=params)
        self._precision = _autocast_dtype(params.mixed_precision, device=self._device)
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=self._precision is torch.float16)
        self._steps_per_epoch = steps_per_epoch
        self._step = 0
        self.rate = 0.0

    def run_epoch(self, epoch: int, split: Split) -> tuple[float, float, int]:
        """One pass over the split: mean loss, accuracy, and images seen."""
        params = self._params
        torch.manual_seed(generator(params.seed, epoch=epoch, stream=DROPOUT_STREAM).initial_seed())
        self._classifier.train()
        batches = training_batches(
            split, batch_size=params.batch_size, seed=params.seed, epoch=epoch, augmentation=augmentation(params)
        )
        loss_sum = torch.zeros((), device=self._device)
        hits = torch.zeros((), device=self._device, dtype=torch.int64)
        with progress(f"epoch {epoch}", total=self._steps_per_epoch, unit="steps", leave=False) as advance:
            for images, labels in batches:
                loss, logits = self._take_step(images, labels, epoch=epoch)
                loss_sum += loss * len(labels)
                hits += (logits.argmax(1) == labels).sum()
                advance(1)
        images_seen = self._steps_per_epoch * params.batch_size
        return loss_sum.item() / images_seen, hits.item() / images_seen, images_seen

    def _take_step(self, images: Tensor, labels: Tensor, *, epoch: int) -> tuple[Tensor, Tensor]:
        # schedule
        self.rate = learning_rate(self._step, steps_per_epoch=self._steps_per_epoch, params=self._params)
        for group in self._optimizer.param_groups:
            group["lr"] = self.rate
        self._step += 1
        # forward
        with torch.autocast(self._device.type, dtype=self._precision, enabled=self._precision is not None):
            logits = self._classifier(images)
        loss = self._criterion(logits.float(), labels)
        refuse_non_finite(loss.item(), where=f"epoch {epoch}, step {self._step}", params=self._params)
        # backward
        self._optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if self._params.gradient_clip_norm is not None:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self._classifier.parameters(), self._params.gradient_clip_norm)
        # update
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._step % self._params.log_every_steps == 0:
            self._on_step(self._step, loss.item(), self.rate)
        return loss.detach(), logits.detach()


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
        params, info = everything.train, DatasetInfo.read()
        refuse_misfits(params, info)
        device = prepare_torch(params)
        config = configure(params, info)
        classifier = build(config)
        drawn = load_pretrained(classifier, config=config, md5=params.weights_md5)
        try_training(classifier, config=config, batch_size=params.batch_size)
        classifier.to(device).to(memory_format=torch.channels_last if params.channels_last else torch.contiguous_format)
        _say_start(classifier, config=config, device=device, drawn=drawn)
        source = tracking.dataset(info.dataset, source=_source(everything.download), digest=info.md5)
        with tracking.training_run(
            experiment=info.dataset, params=everything.flat(), dataset=source, hardware=_hardware(device)
        ) as run:
            print(f"MLflow run {run.run_id}", flush=True)
            trained = train(
                classifier,
                params=params,
                train_split=Split.read("train", info=info, device=device),
                validation_split=Split.read("validation", info=info, device=device),
                on_step=lambda step, loss, rate: run.log({"loss": loss, "learning_rate": rate}, step=step),
                on_epoch=lambda epoch, speed: _report_epoch(epoch, speed, params=params, run=run),
            )
            _write(trained, classifier, config=config)
            with tracking.told("the model is in artifacts/train, but not in MLflow"):
                _record(run, config=config)


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


def _report_epoch(epoch: Epoch, images_per_second: float, *, params: TrainParams, run: tracking.Run) -> None:
    """The finished epoch, as a line and as metrics."""
    values = vars(epoch)
    run.log(
        {name: value for name, value in values.items() if name not in ("epoch", "learning_rate")}
        | {"images_per_second": images_per_second},
        step=epoch.epoch,
    )
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


def _record(run: tracking.Run, *, config: ModelConfig) -> None:
    run.tag({"model.md5": file_md5(TRAIN / "best.safetensors"), **tracking.outputs_tag(TRAIN)})
    run.log_file(TRAIN / "curves.png", folder="plots")
    size = config.image_size
    weights, config_file = TRAIN / "best.safetensors", TRAIN / "model.json"
    tracking.log_model(weights, config_file, image_shape=(size, size, config.channels), class_names=config.class_names)


if __name__ == "__main__":
    main()
