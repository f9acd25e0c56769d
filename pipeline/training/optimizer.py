"""Make the optimizers of a training with their parameter groups, and set their learning rate."""

import inspect
from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
from torch import nn

from pipeline.core.errors import UserError
from pipeline.models.freezing import rate_factors
from pipeline.params import TrainParams

MUON_RATE_FACTOR = 0.4  # Muon's learning rate relative to that of SGD beside it; found on LeNet and CIFAR-10
MUON_ITERATIONS = 3  # of Newton-Schulz, which make an update orthogonal; more gained nothing for LeNet


def make_optimizers(network: nn.Module, *, params: TrainParams) -> list[torch.optim.Optimizer]:
    """Return the optimizers of all trained parameters.

    That is one optimizer, or with `train.optimizer: muon` two: Muon for the linear layers and SGD for the rest.

    Raises UserError where `train.optimizer` is muon and the network has no linear layer that is trained.
    """
    if params.compile:
        return _make_optimizers(network, params=params)
    # PyTorch wraps the methods of optimizers so that its compiler skips them, and imports the compiler for that at the
    # first call. Without the wrappers a training saves 1.2 s of CPU time (torch 2.15, AMD EPYC); the digits take 2 s.
    for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
        if method := getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None):
            setattr(method, "__dynamo_disable", method)
    optimizers = _make_optimizers(network, params=params)
    for optimizer in optimizers:
        plain_step = torch.no_grad()(inspect.unwrap(type(optimizer).step))
        setattr(optimizer, "step", MethodType(plain_step, optimizer))  # noqa: B010  # mypy forbids assigning to a method
    return optimizers


def _make_optimizers(network: nn.Module, *, params: TrainParams) -> list[torch.optim.Optimizer]:
    """Return the optimizers as PyTorch makes them; see `make_optimizers`."""
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
                    "allowed for it: sgd, adam, adamw, rmsprop; set one of them"
                )
            muon = torch.optim.Muon(matrices, lr=rate, momentum=momentum, nesterov=nesterov, ns_steps=MUON_ITERATIONS)
            return [muon, _sgd(rest, params=params, fused=fused)]


def _sgd(groups: list[dict[str, Any]], *, params: TrainParams, fused: bool) -> torch.optim.SGD:
    """Return SGD whose momentum buffers are zero.

    PyTorch would create them in the first step; where a GradScaler skips that step, their values would be undefined.
    """
    rate, momentum = params.learning_rate, params.momentum
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=momentum, nesterov=params.nesterov, fused=fused)
    for group in groups if momentum else ():
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _parameter_groups(network: nn.Module, *, params: TrainParams) -> list[dict[str, Any]]:
    """Return the trained parameters in groups of equal learning rate and weight decay.

    The biases of batch normalization, the head and each block of the network may have their own learning rate.
    """
    factor = params.bias_learning_rate_factor
    batch_norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    biases = {id(module.bias) for module in batch_norms if factor != 1}
    factors = rate_factors(network, params=params)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in sorted(network.parameters(), key=lambda parameter: id(parameter) in biases):
        if parameter.requires_grad:
            bias_factor = factor if id(parameter) in biases else 1.0
            key = bias_factor * factors.get(id(parameter), 1.0), params.weight_decay / bias_factor
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "rate_factor": rate_factor, "weight_decay": weight_decay}
        for (rate_factor, weight_decay), parameters in groups.items()
    ]


def _split_groups(groups: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the groups of the matrices, for Muon, and the groups of all other parameters, for SGD."""
    matrices, rest = [], []
    for group in groups:
        in_matrices = [parameter for parameter in group["params"] if parameter.ndim == 2]
        in_rest = [parameter for parameter in group["params"] if parameter.ndim != 2]
        factor = MUON_RATE_FACTOR * group["rate_factor"]
        if in_matrices:
            matrices.append({**group, "params": in_matrices, "rate_factor": factor, "weight_decay": 0.0})
        if in_rest:
            rest.append({**group, "params": in_rest})
    return matrices, rest


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    """Set the learning rate of every parameter group: `rate` times the group's factor."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["rate_factor"]


def are_fused(optimizers: Iterable[torch.optim.Optimizer]) -> bool:
    """Return whether all optimizers are fused: one kernel updates all parameters, and can itself skip an update."""
    return all(optimizer.defaults.get("fused") for optimizer in optimizers)
