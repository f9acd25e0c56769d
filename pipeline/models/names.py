"""Check the name of a network without importing PyTorch and torchvision, which takes seconds."""

import difflib
import importlib.util
import re
from collections.abc import Collection
from pathlib import Path

from pipeline.core.errors import UserError

_OWN_NETWORKS = re.compile(r"^OWN_NETWORKS\b.*?\{(.*?)\}", re.DOTALL | re.MULTILINE)
_OWN_NAME = re.compile(r'"(\w+)":')
# a function that torchvision lists as a model; models for other tasks than classification are in sub-folders
_REGISTERED = re.compile(r"^@register_model\(\)\n(?:@.*\n)*def (\w+)", re.MULTILINE)


def check_network_name(name: str) -> None:
    """Raise UserError where `train.model` is neither a network of ours nor one of torchvision's.

    Where torchvision's source code cannot be read as expected, every name is allowed here: `build` checks it again.
    """
    own_names, torchvision_names = own_network_names(), torchvision_network_names()
    if torchvision_names and name not in {*own_names, *torchvision_names}:
        raise unknown_network_error(name, own_names=own_names, torchvision_names=torchvision_names)


def unknown_network_error(name: str, *, own_names: Collection[str], torchvision_names: Collection[str]) -> UserError:
    """Return the error for a name of `train.model` that is not allowed; suggests the closest name."""
    close = difflib.get_close_matches(name.lower(), [*own_names, *torchvision_names], n=1)
    return UserError(
        f"train.model is {name!r}; allowed: {', '.join(own_names)} or one of torchvision's {len(torchvision_names)} "
        f"classification models, such as resnet18{f' (did you mean {close[0]}?)' if close else ''}; "
        "set it to one of these"
    )


def own_network_names() -> list[str]:
    """Return the keys of `OWN_NETWORKS`, from the source code of `build.py`."""
    table = _OWN_NETWORKS.search(Path(__file__).with_name("build.py").read_text(encoding="utf-8"))
    return _OWN_NAME.findall(table[1]) if table else []


def torchvision_network_names() -> list[str]:
    """Return the names of torchvision's classification models, from its source code; empty without torchvision."""
    package = importlib.util.find_spec("torchvision")
    if package is None or package.origin is None:
        return []
    files = sorted((Path(package.origin).parent / "models").glob("*.py"))
    return [name for file in files for name in _REGISTERED.findall(file.read_text(encoding="utf-8"))]
