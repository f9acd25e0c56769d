"""The state of a training, which changes with every step; save it to a checkpoint, and restore it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.models.build import Classifier
from pipeline.params import TrainParams
from pipeline.training.batches import seed_dropout
from pipeline.training.checkpoints import Checkpoint
from pipeline.training.device import autocast_dtype
from pipeline.training.lookahead import Lookahead
from pipeline.training.optimizer import make_optimizers


@dataclass(frozen=True)
class Validation:
    """The result of a validation: the mean loss of the images, their accuracy, and the mean F1 score of the classes."""

    loss: float
    accuracy: float
    macro_f1: float


@dataclass(frozen=True)
class Epoch:
    """One row of the history: losses and accuracies are sums over images divided by images.

    The train loss is the one that is minimized, with label smoothing and class weights; the validation loss is without
    them, so that trainings can be compared.
    """

    epoch: int
    learning_rate: float
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    validation_macro_f1: float


class TrainingState:
    """Weights, optimizers, counters and sums of one training; between two steps, `checkpoint` returns all of it.

    `step` counts the steps of the training, `position` those of the current epoch. `loss_sum` and `num_correct` are
    sums over the epoch's images so far, on the device. `best` are the weights of the epoch that is selected so far.
    """

    def __init__(self, classifier: Classifier, *, params: TrainParams) -> None:
        self._classifier, self._seed = classifier, params.seed
        self.device = next(classifier.parameters()).device
        self.optimizers = make_optimizers(classifier, params=params)
        every = params.average_every_steps
        self.lookahead = Lookahead(classifier, every=every) if every else None
        is_float16 = autocast_dtype(params.mixed_precision, device=self.device) is torch.float16
        # with the default, 2**16, the first steps may overflow and be skipped; the scale doubles every 2,000 steps
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=2.0**10, enabled=is_float16)
        self.step, self.position, self.learning_rate = 0, 0, 0.0
        self.loss_sum = torch.zeros((), device=self.device)
        self.num_correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.history: list[Epoch] = []
        self.best: dict[str, Tensor] = {}
        self.epoch_start = time.perf_counter()

    def begin_epoch(self) -> None:
        """Set the sums to zero and seed dropout for the epoch that follows the history."""
        seed_dropout(self._seed, epoch=len(self.history) + 1)
        self.loss_sum.zero_()
        self.num_correct.zero_()
        self.epoch_start = time.perf_counter()

    def finish_epoch(self, validation: Validation, *, num_train_images: int) -> None:
        """Append the current epoch, which trained on `num_train_images` images, to the history."""
        train_loss, train_accuracy = self.loss_sum.item() / num_train_images, self.num_correct.item() / num_train_images
        self.history.append(
            Epoch(
                epoch=len(self.history) + 1,
                learning_rate=self.learning_rate,
                train_loss=train_loss,
                train_accuracy=train_accuracy,
                validation_loss=validation.loss,
                validation_accuracy=validation.accuracy,
                validation_macro_f1=validation.macro_f1,
            )
        )
        self.position = 0

    def checkpoint(self) -> Checkpoint:
        """Return the whole state as it is after the last step."""
        tensors = {
            **_prefixed("model", self._classifier.state_dict()),
            **_prefixed("best", self.best),
            **_optimizer_tensors(self.optimizers),
            **_random_states(self.device),
            **(_prefixed("slow", self.lookahead.slow) if self.lookahead else {}),
            "loss_sum": self.loss_sum,
            "num_correct": self.num_correct,
        }
        state = {
            "position": self.position,
            "epoch_seconds": time.perf_counter() - self.epoch_start,
            "learning_rate": self.learning_rate,
            "history": [vars(epoch) for epoch in self.history],
            "scaler": self.scaler.state_dict(),
        }
        return Checkpoint(self.step, tensors, state)

    def restore(self, start: Checkpoint) -> None:
        """Set the whole state to that of the checkpoint `start`."""
        tensors, state = start.tensors, start.state
        self._classifier.load_state_dict(_unprefixed("model", tensors))
        self.best = {name: tensor.to(self.device) for name, tensor in _unprefixed("best", tensors).items()}
        _restore_optimizers(self.optimizers, _unprefixed("optimizer", tensors))
        if self.lookahead:
            self.lookahead.restore(_unprefixed("slow", tensors))
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.position, self.learning_rate = start.step, state["position"], state["learning_rate"]
        self.history = [Epoch(**row) for row in state["history"]]
        self.loss_sum.copy_(tensors["loss_sum"])
        self.num_correct.copy_(tensors["num_correct"])
        self.epoch_start = time.perf_counter() - state["epoch_seconds"]
        _restore_random_states(tensors, device=self.device)


def copy_weights(classifier: Classifier) -> dict[str, Tensor]:
    """Return a copy of the classifier's parameters and buffers."""
    return {name: tensor.clone() for name, tensor in classifier.state_dict().items()}


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under `<prefix>.<name>`."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _unprefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose name begins with `<prefix>.`, under their names without it."""
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return the optimizers' state as tensors named `optimizer.<index>.<index of the parameter>.<name>`."""
    return {
        f"optimizer.{index}.{number}.{name}": tensor
        for index, optimizer in enumerate(optimizers)
        for number, values in optimizer.state_dict()["state"].items()
        for name, tensor in values.items()
    }


def _restore_optimizers(optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor]) -> None:
    """Set the optimizers' state to tensors of `_optimizer_tensors`, named without `optimizer.`."""
    for index, optimizer in enumerate(optimizers):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _unprefixed(str(index), tensors).items():
            number, _, kind = name.partition(".")
            parameter = parameters[int(number)]
            # copied into the memory format of the parameter: sums over another format may be rounded differently
            same_format = torch.empty_like(parameter).copy_(tensor) if tensor.shape == parameter.shape else tensor
            state.setdefault(int(number), {})[kind] = same_format
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _random_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of PyTorch's generators on the CPU and on the device: uint8 tensors named `random.<device>`."""
    states: dict[str, Any] = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        states["random.mps"] = torch.mps.get_rng_state()
    return states


def _restore_random_states(tensors: Mapping[str, Tensor], *, device: torch.device) -> None:
    """Set PyTorch's generators to the states that `_random_states` returned."""
    torch.set_rng_state(tensors["random.cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"], device)
    if device.type == "mps":
        torch.mps.set_rng_state(tensors["random.mps"])
