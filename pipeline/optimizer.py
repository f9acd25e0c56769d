"""What moves the weights: loss functions, the SGD family and its relatives, and the course of the learning rate."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.params import TrainParams


def loss_function(name: str, *, label_smoothing: float = 0.0) -> Callable[[Tensor, Tensor], Tensor]:
    """From logits (B, num_classes) and labels (B,) int64 to the mean loss of the batch.

    `mse` compares the outputs with one-hot targets of their shape.
    """
    if name == "cross_entropy":
        return nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    return lambda logits, labels: F.mse_loss(logits, F.one_hot(labels, logits.shape[1]).to(logits.dtype))


def make_optimizer(network: nn.Module, *, params: TrainParams) -> torch.optim.Optimizer:
    groups = _parameter_groups(network, params=params)
    rate, momentum = params.learning_rate, params.momentum
    fused = next(network.parameters()).device.type in ("cpu", "cuda", "mps")  # one kernel for all parameters
    match params.optimizer:
        case "sgd":
            return torch.optim.SGD(groups, lr=rate, momentum=momentum, nesterov=params.nesterov, fused=fused)
        case "adam":
            return torch.optim.Adam(groups, lr=rate, fused=fused)
        case "adamw":
            return torch.optim.AdamW(groups, lr=rate, fused=fused)
        case "rmsprop":
            return torch.optim.RMSprop(groups, lr=rate, momentum=momentum)


def _parameter_groups(network: nn.Module, *, params: TrainParams) -> list[dict[str, Any]]:
    """What is trained: the biases of batch normalisation with a rate of their own, if they have one, and the rest."""
    factor = params.bias_learning_rate_factor
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    biases = {id(module.bias) for module in norms if factor != 1}
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    parts = {
        1.0: [parameter for parameter in trained if id(parameter) not in biases],
        factor: [parameter for parameter in trained if id(parameter) in biases],
    }
    if factor == 1:
        parts = {1.0: trained}
    return [
        {"params": part, "rate_factor": times, "weight_decay": params.weight_decay / times}
        for times, part in parts.items()
        if part
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused"))


def learning_rate(step: int, *, steps_per_epoch: int, params: TrainParams) -> float:
    """The rate of a step (from 0): a linear warm-up to the peak, then the schedule over the steps that are left.

    `one_cycle` is PyTorch's OneCycleLR (Smith and Topin 2017, arXiv:1708.07120) with its defaults: cosine from a 25th
    of the peak, and cosine down to a 250,000th. `cosine` is Loshchilov and Hutter 2016 (arXiv:1608.03983) without
    restarts. `linear` climbs from a fifth of the peak and falls to 7 % of it, as in airbench94 (arXiv:2404.00498).
    """
    peak, total = params.learning_rate, params.epochs * steps_per_epoch
    warmup = params.warmup_fraction * total
    if params.schedule == "one_cycle":
        return _one_cycle(step, warmup=warmup, total=total, peak=peak)
    if params.schedule == "linear":
        up, down = step / warmup if warmup else 1.0, (step - warmup) / (total - warmup)
        return peak * (0.2 + 0.8 * up if step < warmup else 1 - 0.93 * down)
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


class Lookahead:
    """Slow weights behind the fast ones (Zhang et al. 2019, arXiv:1907.08610).

    Every so many steps they move towards these, by 1 - 0.95 ** every * (step / total) ** 3 of the way (Jordan 2024,
    arXiv:2404.00498), and the fast ones go on from there. After the last step the slow weights are the result.
    """

    def __init__(self, network: nn.Module, *, every: int) -> None:
        self._fast = {name: tensor for name, tensor in network.state_dict().items() if tensor.is_floating_point()}
        self._every = every
        self.slow = {name: tensor.clone() for name, tensor in self._fast.items()}

    @torch.no_grad()
    def step(self, number: int, *, total: int) -> None:
        """After step `number`, from 1, of `total`."""
        if number % self._every and number < total:
            return
        kept = 0.95**self._every * (number / total) ** 3 if number < total else 1.0
        for name, fast in self._fast.items():
            fast.copy_(self.slow[name].lerp_(fast, 1 - kept))

    def restore(self, slow: Mapping[str, Tensor]) -> None:
        for name, tensor in slow.items():
            self.slow[name].copy_(tensor)
