"""The training loop: from a network and two splits to its best and last weights, one epoch after another."""

import ctypes
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.arrays import Split
from pipeline.core.errors import UserError, uninterrupted
from pipeline.core.processes import num_cores
from pipeline.core.progress import progress
from pipeline.models.build import Classifier
from pipeline.models.inference import logits_of
from pipeline.models.losses import loss_function
from pipeline.params import TrainParams
from pipeline.training import distributed
from pipeline.training.batches import Augmentation, TrainingBatches, generator
from pipeline.training.checkpoints import (
    Checkpoint,
    optimizer_tensors,
    prefixed,
    random_states,
    restore_optimizers,
    restore_random_states,
    unprefixed,
)
from pipeline.training.device import choose_device
from pipeline.training.lookahead import Lookahead
from pipeline.training.optimizer import are_fused, make_optimizers, set_learning_rate, update
from pipeline.training.schedule import learning_rate
from pipeline.training.selection import Epoch, Kept, epochs_since_best, select_epoch

VALIDATION_BATCH = 500
DROPOUT_STREAM = 1


@dataclass(frozen=True)
class Trained:
    """The weights of the kept epoch and of the last one, all epochs, and which one is kept why."""

    best: dict[str, Tensor]
    last: dict[str, Tensor]
    history: list[Epoch]
    kept: Kept


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
    UserError where a loss is not finite; the step that would have spoilt the weights is not taken.
    """
    training = _Training(
        classifier, params=params, train_split=train_split, validation_split=validation_split, on_step=on_step
    )
    if start is not None:
        training.restore(start)
    with _saved_on_interrupt(training, save):
        while not training.is_over:
            training.run_epoch(on_epoch=on_epoch, save=save)
    return Trained(training.best, _copy(classifier), training.history, training.kept)


@contextmanager
def _saved_on_interrupt(training: "_Training", save: Save) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        training.refuse_spoilt()
        save(training.checkpoint())
        error.args = (f"the same command goes on from {training.where}",)
        raise


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
        self._steps_per_epoch = len(train_split) // params.batch_size
        self._device = next(classifier.parameters()).device
        if params.compile:
            classifier.compile()
        self._network = distributed.averaged(classifier)
        self._criterion = loss_function(params.loss, label_smoothing=params.label_smoothing)
        self._optimizers = make_optimizers(classifier, params=params)
        every = params.average_every_steps
        self._lookahead = Lookahead(classifier, every=every) if every else None
        self._precision = _autocast_dtype(params.mixed_precision, device=self._device)
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=self._precision is torch.float16)
        self._asks_at_once = self._device.type != "cuda" or not are_fused(self._optimizers)
        """Whether a loss is finite; else when there is something to log, as a GPU must be waited for."""
        self._step, self._rate = 0, 0.0
        self._saved, self._started = time.monotonic(), time.perf_counter()
        self.history: list[Epoch] = []
        self.best: dict[str, Tensor] = {}
        self._batches: TrainingBatches | None = None
        """Of the epoch that is under way, if one is."""
        zero = torch.zeros((), device=self._device)
        self._loss_sum, self._hits = zero.clone(), zero.long()
        self._loss, self._is_spoilt, self._sound_steps = zero.clone(), zero.clone(), zero.long()
        """Of the last step, or the first that was not finite; whether there was one; and the steps before it."""

    @property
    def is_over(self) -> bool:
        patience = self._params.early_stopping_epochs
        has_stalled = patience is not None and epochs_since_best(self.history, **self._selection) >= patience
        return len(self.history) >= self._params.epochs or has_stalled

    @property
    def kept(self) -> Kept:
        return select_epoch(self.history, **self._selection)

    @property
    def _selection(self) -> dict[str, Any]:
        return {"selection": self._params.selection, "num_images": len(self._validation_split)}

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
                    self._take_step(*next(batches))
                advance(1)
                self._save_if_due(save)
        self.refuse_spoilt()
        images_per_second = len(batches) * self._params.batch_size / (time.perf_counter() - self._started)
        distributed.share_buffers(self._classifier)
        with self._autocast():
            loss, accuracy = judge(self._classifier, self._validation_split, loss=self._params.loss)
        _refuse_non_finite(loss, where=f"epoch {epoch}, validation", params=self._params)
        with uninterrupted():
            self._finish(epoch, validation_loss=loss, validation_accuracy=accuracy)
            on_epoch(self.history[-1], images_per_second)
        self._save(save)

    def _begin(self, epoch: int) -> TrainingBatches:
        self._seed_dropout(epoch)
        self._classifier.train()
        self._loss_sum.zero_()
        self._hits.zero_()
        self._started = time.perf_counter()
        return self._batches_of(epoch)

    def _seed_dropout(self, epoch: int, number: int = 0) -> None:
        draw = generator(self._params.seed, epoch=epoch, stream=DROPOUT_STREAM, number=number)
        torch.manual_seed(draw.initial_seed())

    def _batches_of(self, epoch: int) -> TrainingBatches:
        params = self._params
        return TrainingBatches(
            self._train_split,
            batch_size=params.batch_size,
            seed=params.seed,
            epoch=epoch,
            augmentation=Augmentation(params.flip, params.crop_padding, params.cutout_size),
            rank=distributed.rank(),
            processes=distributed.world_size(),
        )

    def _finish(self, epoch: int, *, validation_loss: float, validation_accuracy: float) -> None:
        assert self._batches
        images = len(self._batches) * self._params.batch_size
        loss, accuracy = self._loss_sum.item() / images, self._hits.item() / images
        self.history.append(Epoch(epoch, self._rate, loss, accuracy, validation_loss, validation_accuracy))
        if self.kept.epoch == epoch:
            self.best = _copy(self._classifier)
        self._batches = None

    def _save_if_due(self, save: Save) -> None:
        if time.monotonic() - self._saved > 60 * self._params.checkpoint_every_minutes:
            self.refuse_spoilt()
            self._save(save)

    def _save(self, save: Save) -> None:
        save(self.checkpoint())
        self._saved = time.monotonic()

    def checkpoint(self) -> Checkpoint:
        """All of the state, as it is after the last step."""
        tensors = {
            **prefixed("model", self._classifier.state_dict()),
            **prefixed("best", self.best),
            **optimizer_tensors(self._optimizers),
            **random_states(self._device),
            **(prefixed("slow", self._lookahead.slow) if self._lookahead else {}),
            "loss_sum": self._loss_sum,
            "hits": self._hits,
        }
        state = {
            "position": self._batches.position if self._batches else None,
            "seconds": time.perf_counter() - self._started,
            "rate": self._rate,
            "history": [vars(epoch) for epoch in self.history],
            "scaler": self._scaler.state_dict(),
        }
        return Checkpoint(self._step, tensors, state)

    def restore(self, start: Checkpoint) -> None:
        """Be as when `start` was taken."""
        tensors, state = start.tensors, start.state
        self._classifier.load_state_dict(unprefixed("model", tensors))
        self.best = {name: tensor.to(self._device) for name, tensor in unprefixed("best", tensors).items()}
        restore_optimizers(self._optimizers, unprefixed("optimizer", tensors))
        if self._lookahead:
            self._lookahead.restore(unprefixed("slow", tensors))
        self._scaler.load_state_dict(state["scaler"])
        self._step, self._rate = start.step, state["rate"]
        self._sound_steps.fill_(start.step)
        self.history = [Epoch(**row) for row in state["history"]]
        self._loss_sum.copy_(tensors["loss_sum"])
        self._hits.copy_(tensors["hits"])
        self._started = time.perf_counter() - state["seconds"]
        if state["position"] is not None:
            self._batches = self._batches_of(len(self.history) + 1)
            self._batches.position = state["position"]
            self._classifier.train()
        restore_random_states(tensors, device=self._device)

    def _take_step(self, images: Tensor, labels: Tensor) -> None:
        # schedule
        self._rate = learning_rate(self._step, steps_per_epoch=self._steps_per_epoch, params=self._params)
        set_learning_rate(self._optimizers, self._rate)
        if (processes := distributed.world_size()) > 1:  # a checkpoint has the random state of the first of them
            self._seed_dropout(len(self.history) + 1, self._step * processes + distributed.rank())
        # forward
        with self._autocast():
            logits = self._network(images)
        loss = self._criterion(logits.float(), labels)
        # backward
        self._classifier.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if self._params.gradient_clip_norm is not None:
            for optimizer in self._optimizers:
                self._scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self._classifier.parameters(), self._params.gradient_clip_norm)
        # account
        self._step += 1
        loss_sum = distributed.total(loss.detach() * len(labels))
        self._loss_sum += loss_sum
        self._hits += distributed.total((logits.detach().argmax(1) == labels).sum())
        self._watch(loss_sum / self._params.batch_size)
        # update
        update(self._optimizers, self._scaler)
        if self._lookahead:
            self._lookahead.step(self._step, total=self._params.epochs * self._steps_per_epoch)
        if self._step % self._params.log_every_steps == 0:
            self.refuse_spoilt()
            self._on_step(self._step, self._loss.item(), self._rate)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, dtype=self._precision, enabled=self._precision is not None)

    def _watch(self, loss: Tensor) -> None:
        """Let the optimizer take no step from the first loss on that is not finite.

        The device itself sees to that, where the optimizer can: a GPU must be waited for to be asked.
        """
        self._loss = torch.where(self._is_spoilt > 0, self._loss, loss)
        self._is_spoilt = (~self._loss.isfinite()).float()
        self._sound_steps += self._is_spoilt == 0
        if self._asks_at_once:
            self.refuse_spoilt()
            return
        for optimizer in self._optimizers:
            optimizer.found_inf = self._is_spoilt  # type: ignore[attr-defined]  # as GradScaler has it

    def refuse_spoilt(self) -> None:
        """Raises UserError if a loss was not finite."""
        if self._is_spoilt:
            step = int(self._sound_steps) + 1
            epoch = (step - 1) // self._steps_per_epoch + 1
            _refuse_non_finite(self._loss.item(), where=f"epoch {epoch}, step {step}", params=self._params)


def prepare_torch(params: TrainParams) -> torch.device:
    """Set threads, memory, determinism and seed; returns the device. Raises UserError where it is not there."""
    device = choose_device(params.device, field="train.device")
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        _keep_freed_memory()
    torch.set_num_threads(params.cpu_threads or num_cores())
    # PyTorch takes 1.5 s to ask for it, and lenet on the CPU has no operation to which it applies
    if params.deterministic and (device.type != "cpu" or params.model != "lenet"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, before its first call
        torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(params.seed)
    return device


def _keep_freed_memory() -> None:
    """Have glibc keep up to 1 GB that is freed: each step would give it back, and take it anew page by page."""
    mmap_threshold, trim_threshold = -3, -1  # malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(mmap_threshold, 2**25)  # the most that is allowed: larger tensors are given back all the same
    mallopt(trim_threshold, 2**30)


def _refuse_non_finite(loss: float, *, where: str, params: TrainParams) -> None:
    if not math.isfinite(loss):
        raise UserError(
            f"{where}: the loss is {loss}; lower train.learning_rate (now {params.learning_rate:g}) "
            "or set train.gradient_clip_norm"
        )


def judge(classifier: Classifier, split: Split, *, loss: str) -> tuple[float, float]:
    """Mean loss (without label smoothing) and accuracy over a whole split; each process judges its share of it."""
    rank, processes = distributed.rank(), distributed.world_size()
    start, stop = (len(split) * number // processes for number in (rank, rank + 1))
    logits = logits_of(classifier, split, batch_size=VALIDATION_BATCH, between=(start, stop))
    labels = split.labels[start:stop]
    mean, hits = loss_function(loss)(logits, labels), (logits.argmax(1) == labels).sum()
    mine = torch.tensor([mean.item() * (stop - start), hits.item()], dtype=torch.float64)
    sums = distributed.total(mine.cuda() if logits.is_cuda else mine)
    return sums[0].item() / len(split), sums[1].item() / len(split)


def _autocast_dtype(name: str, *, device: torch.device) -> torch.dtype | None:
    if device.type != "cuda" or name == "none":
        return None
    return torch.bfloat16 if name == "bfloat16" else torch.float16


def _copy(classifier: Classifier) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
