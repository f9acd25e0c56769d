"""Divide a network into blocks: those that `train.freeze` excludes from training, and learning rates by block.

The blocks are the children of the network in their order, from the input to the output. A child that is an
`nn.Sequential` or `nn.ModuleList` counts as one block for each of its own children, as in `layer3.0`. The head is what
depends on the number of classes: the last layer, in most networks.
"""

from collections.abc import Iterator, Mapping

from torch import nn

from pipeline.core.errors import UserError
from pipeline.models.build import Classifier
from pipeline.models.config import ModelConfig
from pipeline.models.pretrained import head_tensors
from pipeline.params import TrainParams

MAX_BLOCKS_IN_MESSAGE = 12


def apply_freezing(classifier: Classifier, *, config: ModelConfig, params: TrainParams) -> None:
    """Freeze what `train.freeze` selects, and set `classifier.head`, if a parameter of the training depends on it.

    Frozen parameters need no gradient, and frozen modules stay in evaluation mode. Raises UserError where the network
    has no such block, or where nothing would be trained.
    """
    if params.freeze == "none" and params.layer_decay == params.head_learning_rate_factor == 1:
        return
    classifier.head = frozenset(head_tensors(config))
    if params.freeze == "backbone":
        _freeze_backbone(classifier)
    elif params.freeze != "none":
        _freeze_until(classifier, params.freeze.removeprefix("until="), model=params.model)


def head_modules(classifier: Classifier) -> list[str]:
    """Return the names in the network of the modules that own the tensors of the head."""
    return sorted({name.rpartition(".")[0] for name in classifier.head})


def _freeze_backbone(classifier: Classifier) -> None:
    """Freeze all but the head, including dropout before the head."""
    network = classifier.network
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in classifier.head and parameter.requires_grad)
    trained = {module for name in head_modules(classifier) if name for module in network.get_submodule(name).modules()}
    classifier.frozen = [module for module in network.modules() if module not in trained]


def _freeze_until(classifier: Classifier, until: str, *, model: str) -> None:
    """Freeze the block `until`, those before it, and parameters that belong to no block, such as a class token."""
    network, found = classifier.network, blocks(classifier.network)
    matching = [index for index, (name, _) in enumerate(found) if name == until or name.startswith(f"{until}.")]
    if not matching:
        raise UserError(
            f"train.freeze is until={until}, but train.model {model} has no such block; "
            f"allowed: {_list_blocks(classifier)}; set it to one of these"
        )
    frozen = [block for _, block in found[: matching[-1] + 1]]
    for parameter in network.parameters(recurse=False):
        parameter.requires_grad_(False)
    for block in frozen:
        block.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError(
            f"train.freeze is until={until}, which leaves nothing of train.model {model} to train; "
            f"allowed: {_list_blocks(classifier)}; set it to an earlier block"
        )
    classifier.frozen = [module for block in frozen for module in block.modules()]


def blocks(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the blocks of a network with their names, from the input to the output."""
    return [found for name, child in network.named_children() for found in _blocks_of_child(name, child)]


def _blocks_of_child(name: str, child: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the blocks that a child of the network consists of."""
    if isinstance(child, nn.Sequential | nn.ModuleList) and len(child):
        yield from ((f"{name}.{inner}", block) for inner, block in child.named_children())
    else:
        yield name, child


def _list_blocks(classifier: Classifier) -> str:
    """Return the values of `train.freeze` that the network allows, as text of limited length."""
    named = [(name, next(block.parameters(), None)) for name, block in blocks(classifier.network)]
    before = [name for name, parameter in named if parameter is not None and not _has_head(classifier, name)]
    outer = [
        name for name in dict.fromkeys(name.partition(".")[0] for name in before) if not _has_head(classifier, name)
    ]
    more = [f"{len(outer) - MAX_BLOCKS_IN_MESSAGE} more"] if len(outer) > MAX_BLOCKS_IN_MESSAGE else []
    parts = [name for name in before if "." in name]
    within = [f"a part of these from {parts[0]} to {parts[-1]}"] if parts else []
    return f"none, backbone, or until= with one of {', '.join([*outer[:MAX_BLOCKS_IN_MESSAGE], *more, *within])}"


def _has_head(classifier: Classifier, block: str) -> bool:
    """Return whether a tensor of the head is in this block."""
    return any(name.startswith(f"{block}.") for name in classifier.head)


def rate_factors(trained: nn.Module, *, params: TrainParams) -> Mapping[int, float]:
    """Return what the learning rate of each parameter is multiplied by, by the parameter's `id`; 1 where it is missing.

    `layer_decay` is raised to the number of blocks between the block of the parameter and that of the head, as in BEiT
    (Bao et al. 2021, arXiv:2106.08254) and timm. A block without matrices, such as a batch normalization, does not
    count as a step from the block before it. Tensors of the head have the factor `head_learning_rate_factor`.
    """
    if params.layer_decay == params.head_learning_rate_factor == 1:
        return {}
    if not isinstance(trained, Classifier):  # the head alone, trained on features
        return {id(parameter): params.head_learning_rate_factor for parameter in trained.parameters()}
    assert trained.head, "`apply_freezing` must be called first"
    depths, head_depth = _depths(trained)
    return {
        id(parameter): params.head_learning_rate_factor
        if name in trained.head
        else params.layer_decay ** max(0, head_depth - depths.get(id(parameter), 0))
        for name, parameter in trained.network.named_parameters()
    }


def _depths(classifier: Classifier) -> tuple[dict[int, int], int]:
    """Return the number of steps from the first block by the `id` of the parameter, and that of the head."""
    depths: dict[int, int] = {}
    depth = head_depth = -1
    for name, block in blocks(classifier.network):
        depth += any(parameter.ndim > 1 for parameter in block.parameters())
        depths |= {id(parameter): max(0, depth) for parameter in block.parameters()}
        if head_depth < 0 and _has_head(classifier, name):  # the first one, as some networks have several heads
            head_depth = depth
    return depths, head_depth
