"""Find the weights of a network in the files of other programs.

Programs store a state dict alone, or in a checkpoint under a key (`model_state_dict`, `state_dict`, `model`, …). Its
names may have prefixes from what the network was wrapped in: `module.` (DataParallel, DistributedDataParallel),
`_orig_mod.` (torch.compile), `model.` or `net.` (the attribute of a Lightning module). Tensors that share a prefix are
a set of weights if they are all tensors of the network, in their shapes, and no others.
"""

import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.core.errors import UserError, escape_control_chars

COUNTER = ".num_batches_tracked"  # of batch normalization; not a weight, and missing in files before PyTorch 0.4.1
# where a checkpoint has several sets, such as `state_dict` and `state_dict_ema`, the first of these that exists is used
PREFERRED_KEYS = ("state_dict.", "model_state_dict.", "model.")
MAX_DEPTH = 6  # of nested mappings that are searched
MAX_NAMES_IN_MESSAGE = 3
# parts of names that wrappers add, also around a part of the network; networks of torchvision have no such names
_WRAPPER = r"(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
# `norm.1.weight` for `norm1.weight`, as in torchvision's own files for the DenseNets
_OLD_DENSENET = re.compile(r"(?<=\.)(norm|conv)\.([12]\.)")


@dataclass(frozen=True)
class _Candidate:
    """The tensors of a file whose names have one prefix, by the network's names.

    `mismatched` are the network's names that are missing with the prefix, or have another shape; `unknown` are the
    names with the prefix that the network does not have.
    """

    prefix: str
    tensors: Mapping[str, Tensor]
    mismatched: list[str]
    unknown: list[str]

    @property
    def fits(self) -> bool:
        return not self.mismatched and not self.unknown


def flatten(content: object) -> dict[str, Tensor]:
    """Return the tensors in nested mappings by their dotted names, as in `model_state_dict.fc.weight`.

    A mapping in a list has its index as name, as in `models.0.fc.weight`. An object that occurs twice is read once.
    """
    seen: set[int] = set()

    def walk(value: object, name: str, depth: int) -> Iterator[tuple[str, Tensor]]:
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping) and depth <= MAX_DEPTH and id(value) not in seen:
            seen.add(id(value))
            for key, each in value.items():
                yield from walk(each, f"{name}.{key}" if name else str(key), depth + 1)
        elif isinstance(value, list | tuple) and depth <= MAX_DEPTH and id(value) not in seen:
            seen.add(id(value))
            for index, each in enumerate(value):
                if isinstance(each, Mapping):  # a list of tensors has no names
                    yield from walk(each, f"{name}.{index}" if name else str(index), depth + 1)

    return {name: tensor for name, tensor in walk(content, "", 0) if name}


def select_weights(
    found: Mapping[str, Tensor],
    *,
    target: Mapping[str, Tensor],
    head: set[str],
    file: str,
    network: str,
    image_size: int,
) -> dict[str, Tensor]:
    """Return the set of weights in `found` that has the tensors of `target`, by the names in `target`.

    Of several sets that differ, that with one of PREFERRED_KEYS is used, and a line on stdout reports that. Tensors of
    the `head`, whose shape depends on the number of classes, may be missing or have another shape. `file` and `network`
    are the names in messages. Raises UserError where no set fits, or where several do and none is preferred.
    """
    candidates, used = [], set[str]()
    for prefix in sorted(_prefixes(found, target=target, head=head), key=lambda each: (-len(each), each)):
        below = {name.removeprefix(prefix): found[name] for name in found.keys() - used if name.startswith(prefix)}
        candidates.append(_candidate(prefix, below, target=target, head=head))
        if candidates[-1].fits:  # these tensors would otherwise be unknown names of a shorter prefix
            used |= {prefix + name for name in below}
    fitting = [each for each in candidates if each.fits]
    if not fitting:
        raise UserError(_explain(candidates, target=target, file=file, network=network, image_size=image_size))
    preferred = _preferred(fitting)
    if not all(_are_equal(each, preferred[0]) for each in preferred):
        raise UserError(
            f"train.weights {file}: found {len(preferred)} sets of weights that fit {network}: "
            f"{_join_prefixes(preferred)}; allowed: one; extract the set you want and name that file in train.weights, "
            f"as in: {_extraction_command(file, prefix=preferred[0].prefix)}"
        )
    if others := [each for each in fitting if not _are_equal(each, preferred[0])]:
        print(
            f"train.weights {file}: uses the weights {preferred[0].prefix}*, not {_join_prefixes(others)}", flush=True
        )
    return dict(preferred[0].tensors)


def _preferred(fitting: Sequence[_Candidate]) -> Sequence[_Candidate]:
    """Return the sets with the first of PREFERRED_KEYS that exists, or all sets where there is none.

    The keys are compared after the part that all prefixes have in common.
    """
    common = os.path.commonprefix([each.prefix for each in fitting])  # noqa: RUF071  # not paths; cut at a dot below
    length = common.rfind(".") + 1
    for key in PREFERRED_KEYS:
        if chosen := [each for each in fitting if each.prefix.startswith(key, length)]:
            return _preferred(chosen)
    return fitting


def _join_prefixes(candidates: Iterable[_Candidate]) -> str:
    return ", ".join(f"{each.prefix}*" for each in candidates)


def _extraction_command(file: str, *, prefix: str) -> str:
    """Return a shell command that writes the tensors whose names have `prefix` to a file of their own."""
    load = "safetensors.torch.load_file(f)" if file.endswith(".safetensors") else "torch.load(f, map_location='cpu')"
    code = (
        f"import safetensors.torch, torch; from pipeline.models.state_dict import flatten; "
        f"f, p = {file!r}, {prefix!r}; "
        f"w = flatten({load}); torch.save({{n[len(p):]: t for n, t in w.items() if n.startswith(p)}}, 'extracted.pth')"
    )
    return f"python -c {shlex.quote(code)}"


def _prefixes(found: Iterable[str], *, target: Iterable[str], head: set[str]) -> set[str]:
    """Return every prefix with which the network's first or last tensor occurs in the file, wrappers included."""
    body = _body(target, head=head)
    ends = "|".join(rf"\.(?:{_WRAPPER})*".join(map(re.escape, name.split("."))) for name in (body[0], body[-1]))
    matches = (re.fullmatch(rf"(.*\.|)(?:{ends})", name) for name in found)
    return {match[1] for match in matches if match} or {""}


def _body(target: Iterable[str], *, head: set[str]) -> list[str]:
    """Return the names of the tensors that a set of weights must have."""
    return [name for name in target if name not in head and not name.endswith(COUNTER)]


def _candidate(prefix: str, below: Mapping[str, Tensor], *, target: Mapping[str, Tensor], head: set[str]) -> _Candidate:
    """Compare the tensors `below` a prefix, by their names without it, with those of the network."""
    tensors: dict[str, Tensor] = {}
    unknown = []
    heads = tuple({f"{name.rpartition('.')[0]}." for name in head})
    for name in sorted(below):
        network_name = _network_name(name, target=target)
        if network_name in target and network_name not in tensors:
            tensors[network_name] = below[name]
        elif not network_name.startswith(heads):
            unknown.append(name)
    mismatched = [
        name for name in _body(target, head=head) if name not in tensors or tensors[name].shape != target[name].shape
    ]
    return _Candidate(prefix, tensors, mismatched, unknown)


def _network_name(name: str, *, target: Mapping[str, Tensor]) -> str:
    """Return the name that a tensor of the file has in the network: without wrappers, and in today's spelling."""
    unwrapped = re.sub(rf"(?:^|(?<=\.)){_WRAPPER}", "", name)
    return unwrapped if unwrapped in target else _OLD_DENSENET.sub(r"\1\2", unwrapped)


def _are_equal(first: _Candidate, second: _Candidate) -> bool:
    """Return whether both have the same values, as where a module has one network under two names."""
    return first.tensors.keys() == second.tensors.keys() and all(
        torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items()
    )


def _explain(
    candidates: Sequence[_Candidate], *, target: Mapping[str, Tensor], file: str, network: str, image_size: int
) -> str:
    """Return the error message: the first differences of the candidate that has the fewest."""
    nearest = min(candidates, key=lambda each: len(each.mismatched) + len(each.unknown))
    prefix, unknown = nearest.prefix, [nearest.prefix + name for name in nearest.unknown]
    if not nearest.mismatched:
        return (
            f"train.weights {file}: found {_shorten_list(unknown)}, which {network} does not have; "
            "use weights of the same network"
        )
    name = nearest.mismatched[0]
    tensor = nearest.tensors.get(name)
    path = escape_control_chars(f"{prefix}{name}")
    found = f"no {name}" if tensor is None else f"{path} of shape {tuple(tensor.shape)}"
    instead = f", and instead the file has {_shorten_list(unknown)}" if tensor is None and unknown else ""
    return (
        f"train.weights {file}: found {found}, but {network} has it of shape {tuple(target[name].shape)} for images of "
        f"{image_size} pixels; what differs: {_shorten_list(nearest.mismatched)}{instead}; use weights of the same "
        "network"
    )


def _shorten_list(names: list[str]) -> str:
    """Return the first names and the number of the others, as text."""
    more = f" and {len(names) - MAX_NAMES_IN_MESSAGE} more" if len(names) > MAX_NAMES_IN_MESSAGE else ""
    return escape_control_chars(", ".join(names[:MAX_NAMES_IN_MESSAGE])) + more
