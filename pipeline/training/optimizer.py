"""What moves the weights: loss functions, the SGD family and its relatives, and the course of the learning rate."""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pipeline.core.errors import UserError
from pipeline.params import TrainParams

MUON_RATE_FACTOR = 0.4
"""Muon's rate for that of SGD beside it; found on LeNet and CIFAR-10."""
MUON_STEPS = 3
"""Newton-Schulz iterations by which Muon makes an update orthogonal; more brought nothing for LeNet."""


def make_optimizers(network: nn.Module, *, params: TrainParams) -> list[torch.optim.Optimizer]:
    """One for all that is trained; with `muon` one for the matrices of the linear layers, and SGD for the rest."""
    if not params.compile:
        _leave_the_compiler_out()
    groups = _parameter_groups(network, params=params)
    rate, momentum, nesterov = params.learning_rate, params.momentum, params.nesterov
    fused = next(network.parameters()).device.type in ("cpu", "cuda")  # one kernel for all parameters
    match params.optimizer:
        case "sgd":
            return [_sgd(groups, params=params, fused=fused)]
        case "adam":
            return [torch.optim.Adam(groups, lr=rate, fused=fused)]
        case "adamw":
            return [torch.optim.AdamW(groups, lr=rate, fused=fused)]
        case "rmsprop":
            return [torch.optim.RMSprop(groups, lr=rate, momentum=momentum)]
        case "muon":
            matrices, rest = _split_groups(groups)
            if not matrices:
                raise UserError(
                    f"train.optimizer is muon, but {params.model} has no linear layers that are trained; "
                    "allowed: sgd, adam, adamw, rmsprop"
                )
            muon = torch.optim.Muon(matrices, lr=rate, momentum=momentum, nesterov=nesterov, ns_steps=MUON_STEPS)
            return [muon, _sgd(rest, params=params, fused=fused)]


def _sgd(groups: list[dict[str, Any]], *, params: TrainParams, fused: bool) -> torch.optim.SGD:
    """With momenta of zero: PyTorch makes them in the first step, and of what is in memory where that is skipped."""
    rate, momentum = params.learning_rate, params.momentum
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=momentum, nesterov=params.nesterov, fused=fused)
    for group in groups if momentum else ():
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _leave_the_compiler_out() -> None:
    """Optimizers import PyTorch's compiler, for two seconds, only to be left alone by it: say that it was told.

    `update` does the rest.
    """
    for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
        if function := getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None):
            setattr(function, "__dynamo_disable", function)  # torch._compile looks for it


def update(optimizers: Iterable[torch.optim.Optimizer], scaler: torch.amp.GradScaler) -> None:
    """A step of each; with a scaler, unless a gradient is infinite."""
    for optimizer in optimizers:
        if scaler.is_enabled():
            scaler.step(optimizer)
        else:
            with torch.no_grad():  # the method itself, without the wrapper that imports the compiler
                inspect.unwrap(type(optimizer).step)(optimizer)
    scaler.update()


def _parameter_groups(network: nn.Module, *, params: TrainParams) -> list[dict[str, Any]]:
    """What is trained: the biases of batch normalisation with a rate of their own, if they have one, and the rest."""
    factor = params.bias_learning_rate_factor
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    biases = {id(module.bias) for module in norms if factor != 1}
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    parts = [
        (1.0, [parameter for parameter in trained if id(parameter) not in biases]),
        (factor, [parameter for parameter in trained if id(parameter) in biases]),
    ]
    return [
        {"params": part, "rate_factor": times, "weight_decay": params.weight_decay / times}
        for times, part in parts
        if part
    ]


def _split_groups(groups: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The matrices, to which Muon gives a share of the rate, and the rest."""
    matrices, rest = [], []
    for group in groups:
        flat = [parameter for parameter in group["params"] if parameter.ndim == 2]
        others = [parameter for parameter in group["params"] if parameter.ndim != 2]
        factor = MUON_RATE_FACTOR * group["rate_factor"]
        matrices += [{**group, "params": flat, "rate_factor": factor, "weight_decay": 0.0}] if flat else []
        rest += [{**group, "params": others}] if others else []
    return matrices, rest


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["rate_factor"]


def are_fused(optimizers: Iterable[torch.optim.Optimizer]) -> bool:
    return all(optimizer.defaults.get("fused") for optimizer in optimizers)
