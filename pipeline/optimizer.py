"""What moves the weights: loss functions, the SGD family and its relatives, and the course of the learning rate."""

import math
from collections.abc import Callable, Iterable

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


def make_optimizer(parameters: Iterable[nn.Parameter], *, params: TrainParams) -> torch.optim.Optimizer:
    rate, decay, parameters = params.learning_rate, params.weight_decay, list(parameters)
    fused = parameters[0].device.type in ("cpu", "cuda", "mps")  # one kernel for all parameters
    match params.optimizer:
        case "sgd":
            return torch.optim.SGD(
                parameters,
                lr=rate,
                momentum=params.momentum,
                nesterov=params.nesterov,
                weight_decay=decay,
                fused=fused,
            )
        case "adam":
            return torch.optim.Adam(parameters, lr=rate, weight_decay=decay, fused=fused)
        case "adamw":
            return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=fused)
        case "rmsprop":
            return torch.optim.RMSprop(parameters, lr=rate, momentum=params.momentum, weight_decay=decay)


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused"))


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
