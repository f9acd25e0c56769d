"""Stop a training whose loss is not finite, without waiting for the GPU in every step."""

import math

import torch
from torch import Tensor

from pipeline.core.errors import UserError
from pipeline.params import TrainParams
from pipeline.training.optimizer import are_fused
from pipeline.training.state import TrainingState


class NonFiniteGuard:
    """A check of the loss of every step, which prevents all weight updates after the first non-finite loss.

    On the CPU, and with optimizers that are not fused, a non-finite loss raises at once. With fused optimizers on a
    GPU, each step would have to wait for the device. There the device itself skips the updates, and
    `raise_if_non_finite` reports the loss later. `loss`, a tensor on the device, is the first non-finite loss, or else
    that of the last step.
    """

    def __init__(self, state: TrainingState, *, params: TrainParams, steps_per_epoch: int) -> None:
        self._state, self._params, self._steps_per_epoch = state, params, steps_per_epoch
        self._raises_at_once = can_raise_at_once(state)
        self.loss = torch.zeros((), device=state.device)
        self._is_non_finite = torch.zeros((), device=state.device)
        self._num_finite_steps = torch.full((), state.step, device=state.device)

    def watch(self, loss: Tensor, *, mean_over_ranks: Tensor) -> Tensor:
        """Check the loss of a step, and return the loss for its backward pass.

        `mean_over_ranks` is the loss over the whole batch. Raises UserError where that is not finite and can be read
        without waiting for the device.
        """
        self.loss = torch.where(self._is_non_finite > 0, self.loss, mean_over_ranks)
        self._is_non_finite = (~self.loss.isfinite()).float()
        self._num_finite_steps += self._is_non_finite == 0
        if self._raises_at_once:
            self.raise_if_non_finite()
            return loss
        if self._state.scaler.is_enabled():  # a GradScaler skips the update where a gradient is not finite
            return loss * torch.where(self._is_non_finite > 0, torch.nan, 1.0)
        for optimizer in self._state.optimizers:  # a fused optimizer then skips the update
            optimizer.found_inf = self._is_non_finite  # type: ignore[attr-defined]
        return loss

    def raise_if_non_finite(self) -> None:
        """Raise UserError if a loss was not finite; on a GPU this waits for the device."""
        if self._is_non_finite:
            step = int(self._num_finite_steps) + 1
            epoch = (step - 1) // self._steps_per_epoch + 1
            raise _non_finite_error(self.loss.item(), where=f"epoch {epoch}, step {step}", params=self._params)


def can_raise_at_once(state: TrainingState) -> bool:
    """Return whether each step can read its loss at no cost, which fused optimizers on a GPU exclude."""
    return state.device.type != "cuda" or not are_fused(state.optimizers)


def check_validation_loss(loss: float, *, epoch: int, params: TrainParams) -> None:
    """Raise UserError where the validation loss is not finite."""
    if not math.isfinite(loss):
        raise _non_finite_error(loss, where=f"epoch {epoch}, validation", params=params)


def _non_finite_error(loss: float, *, where: str, params: TrainParams) -> UserError:
    """Return the error to raise for a non-finite loss; `where` names the epoch and the step."""
    return UserError(
        f"{where}: the loss is {loss}; lower train.learning_rate (now {params.learning_rate:g}) "
        "or set train.gradient_clip_norm"
    )
