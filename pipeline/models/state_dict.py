"""Find the weights of a network in the files of other programs.

Programs store a state dict by itself or in a checkpoint (`model_state_dict`, `state_dict`, `model`, …). The names in it
carry what the network was wrapped in: `module.` (DataParallel, DistributedDataParallel), `_orig_mod.` (torch.compile),
`model.` or `net.` (the attribute of a Lightning module). A set of weights is whatever has, below one prefix, all
tensors of the network in their shapes, and no others.
"""

import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.core.errors import UserError

COUNTER = ".num_batches_tracked"  # of batch normalization; not a weight, and missing in files before PyTorch 0.4.1
# the first of these is used where a checkpoint has other sets beside it, such as `state_dict_ema` or `model_ema`
PREFERRED_KEYS = ("state_dict.", "model_state_dict.", "model.")
MAX_DEPTH = 6
NAMES_SHOWN = 3
# parts of a name that only wrappers add, also around a part of the network; no network of torchvision has them
_WRAPPER = r"(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
# `norm.1.weight` for `norm1.weight`, as in torchvision's own files for the DenseNets
_OLD_DENSENET = re.compile(r"(?<=\.)(norm|conv)\.([12]\.)")


@dataclass(frozen=True)
class _Candidate:
    """The tensors of a file below one prefix, by the network's names.

    `wrong` are the network's names that are missing below the prefix or have another shape; `unknown` are the names
    below the prefix that the network does not have.
    """

    prefix: str
    tensors: Mapping[str, Tensor]
    wrong: list[str]
    unknown: list[str]

    @property
    def fits(self) -> bool:
        return not self.wrong and not self.unknown


def flatten(content: object) -> dict[str, Tensor]:
    """Return the tensors in nested mappings by their dotted names: `model_state_dict.fc.weight`.

    Mappings in a list are named by their index: `models.0.fc.weight`. An object that occurs twice is read once.
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
    """Return the one set of weights in `found` that has the tensors of `target`, by its names.

    Of several sets that differ, the one below one of PREFERRED_KEYS is used, and a line on stdout states that. Tensors
    of the head, whose shape depends on the number of classes, may be missing or differ. `file` is the path, `network`
    the name in messages. Raises UserError where no set fits, or where several do and none is preferred.
    """
    candidates, used = [], set[str]()
    for prefix in sorted(_prefixes(found, target=target, head=head), key=lambda each: (-len(each), each)):
        below = {name.removeprefix(prefix): found[name] for name in found.keys() - used if name.startswith(prefix)}
        candidates.append(_candidate(prefix, below, target=target, head=head))
        if candidates[-1].fits:  # else it would be unknown below a shorter prefix
            used |= {prefix + name for name in below}
    fitting = [each for each in candidates if each.fits]
    if not fitting:
        raise UserError(_explain(candidates, target=target, file=file, network=network, image_size=image_size))
    preferred = _preferred(fitting)
    if not all(_are_equal(each, preferred[0]) for each in preferred):
        raise UserError(
            f"train.weights {file}: found {len(preferred)} sets of weights that fit {network}: {_listed(preferred)}; "
            "allowed: one; extract the set you want and name that file in train.weights, as in: "
            + _extraction(file, prefix=preferred[0].prefix)
        )
    if others := [each for each in fitting if not _are_equal(each, preferred[0])]:
        print(f"train.weights {file}: uses the weights {preferred[0].prefix}*, not {_listed(others)}", flush=True)
    return dict(preferred[0].tensors)


def _preferred(fitting: Sequence[_Candidate]) -> Sequence[_Candidate]:
    """Return the sets below the first of PREFERRED_KEYS, after what all prefixes have in common."""
    common = os.path.commonprefix([each.prefix for each in fitting])  # noqa: RUF071  # no paths; cut at a dot below
    length = common.rfind(".") + 1
    for key in PREFERRED_KEYS:
        if chosen := [each for each in fitting if each.prefix.startswith(key, length)]:
            return _preferred(chosen)
    return fitting


def _listed(candidates: Iterable[_Candidate]) -> str:
    return ", ".join(f"{each.prefix}*" for each in candidates)


def _extraction(file: str, *, prefix: str) -> str:
    """Return a shell command that writes the tensors below `prefix` to a file of their own."""
    load = "safetensors.torch.load_file(f)" if file.endswith(".safetensors") else "torch.load(f, map_location='cpu')"
    code = (
        f"import safetensors.torch, torch; from pipeline.models.state_dict import flatten; "
        f"f, p = {file!r}, {prefix!r}; "
        f"w = flatten({load}); torch.save({{n[len(p):]: t for n, t in w.items() if n.startswith(p)}}, 'extracted.pth')"
    )
    return f"python -c {shlex.quote(code)}"


def _prefixes(found: Iterable[str], *, target: Iterable[str], head: set[str]) -> set[str]:
    """Return every prefix of the network's first or last name in the file, wrappers included."""
    body = _body(target, head=head)
    ends = "|".join(rf"\.(?:{_WRAPPER})*".join(map(re.escape, name.split("."))) for name in (body[0], body[-1]))
    matches = (re.fullmatch(rf"(.*\.|)(?:{ends})", name) for name in found)
    return {match[1] for match in matches if match} or {""}


def _body(target: Iterable[str], *, head: set[str]) -> list[str]:
    """Return the names of the tensors that a set of weights must have."""
    return [name for name in target if name not in head and not name.endswith(COUNTER)]


def _candidate(prefix: str, below: Mapping[str, Tensor], *, target: Mapping[str, Tensor], head: set[str]) -> _Candidate:
    tensors: dict[str, Tensor] = {}
    unknown = []
    heads = tuple({f"{name.rpartition('.')[0]}." for name in head})
    for name in sorted(below):
        short = _short(name, target=target)
        if short in target and short not in tensors:
            tensors[short] = below[name]
        elif not short.startswith(heads):
            unknown.append(name)
    wrong = [
        name for name in _body(target, head=head) if name not in tensors or tensors[name].shape != target[name].shape
    ]
    return _Candidate(prefix, tensors, wrong, unknown)


def _short(name: str, *, target: Mapping[str, Tensor]) -> str:
    """Return the network's name of a tensor."""
    short = re.sub(rf"(?:^|(?<=\.)){_WRAPPER}", "", name)
    return short if short in target else _OLD_DENSENET.sub(r"\1\2", short)


def _are_equal(one: _Candidate, other: _Candidate) -> bool:
    """Return whether both hold the same values, as when a module has one network under two names."""
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items()
    )


def _explain(
    candidates: Sequence[_Candidate], *, target: Mapping[str, Tensor], file: str, network: str, image_size: int
) -> str:
    """Return the error message: the first differences of the candidate that differs least."""
    nearest = min(candidates, key=lambda each: len(each.wrong) + len(each.unknown))
    prefix, unknown = nearest.prefix, [nearest.prefix + name for name in nearest.unknown]
    if not nearest.wrong:
        return (
            f"train.weights {file}: found {_first(unknown)}, which {network} does not have; "
            "use weights of the same network"
        )
    name = nearest.wrong[0]
    tensor = nearest.tensors.get(name)
    found = f"no {name}" if tensor is None else f"{prefix}{name} of shape {tuple(tensor.shape)}"
    instead = f", and instead the file has {_first(unknown)}" if tensor is None and unknown else ""
    return (
        f"train.weights {file}: found {found}, but {network} has it of shape {tuple(target[name].shape)} for images of "
        f"{image_size} pixels; what differs: {_first(nearest.wrong)}{instead}; use weights of the same network"
    )


def _first(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
