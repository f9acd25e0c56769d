"""Check the name of a network without importing PyTorch, torchvision and timm, which takes seconds."""

import difflib
import importlib.util
import re
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.models.packaged import PACKAGED_NETWORK

TIMM_PREFIX = "timm/"  # of the names of timm's networks in `train.model`

_OWN_NETWORKS = re.compile(r"^OWN_NETWORKS\b.*?\{(.*?)\}", re.DOTALL | re.MULTILINE)
_OWN_NAME = re.compile(r'"(\w+)":')
# a function that torchvision or timm lists as a model; torchvision's for other tasks are in sub-folders
_REGISTERED = re.compile(r"^@register_model(?:\(\))?\n(?:@.*\n)*def (\w+)", re.MULTILINE)


def check_network_name(name: str) -> None:
    """Raise UserError where `train.model` is neither a network of ours nor one of torchvision's or timm's.

    Where the source code of the library cannot be read as expected, every name is allowed here, and so is every tag in
    `timm/<name>.<tag>`: `build` checks it again.
    """
    if name.startswith(TIMM_PREFIX):
        library = timm_network_names()
        is_known = name.removeprefix(TIMM_PREFIX).partition(".")[0] in library
    else:
        library = torchvision_network_names()
        is_known = name in {*own_network_names(), *library}
    if library and not is_known:
        raise unknown_network_error(name)


def unknown_network_error(name: str) -> UserError:
    """Return the error for a name of `train.model` that is not allowed; suggests the closest name."""
    own, torchvision, timm = own_network_names(), torchvision_network_names(), timm_network_names()
    candidates = {each: TIMM_PREFIX + each for each in timm}
    if not name.startswith(TIMM_PREFIX):
        candidates |= {each: each for each in (*own, *torchvision)}
    close = difflib.get_close_matches(name.removeprefix(TIMM_PREFIX).lower(), candidates, n=1)
    return UserError(
        f"train.model is {name!r}; allowed: {', '.join(own)}, one of torchvision's {len(torchvision)} classification "
        f"models, such as resnet18, or {TIMM_PREFIX}<name> for one of timm's {len(timm)}, such as "
        f"{PACKAGED_NETWORK}{f' (did you mean {candidates[close[0]]}?)' if close else ''}; set it to one of these"
    )


def own_network_names() -> list[str]:
    """Return the keys of `OWN_NETWORKS`, from the source code of `build.py`."""
    table = _OWN_NETWORKS.search(Path(__file__).with_name("build.py").read_text(encoding="utf-8"))
    return _OWN_NAME.findall(table[1]) if table else []


def torchvision_network_names() -> list[str]:
    """Return the names of torchvision's classification models, from its source code; empty without torchvision."""
    return _registered_names("torchvision")


def timm_network_names() -> list[str]:
    """Return the names of timm's networks, without prefix, from its source code; empty without timm."""
    return _registered_names("timm")


def _registered_names(library: str) -> list[str]:
    """Return the names of the functions in the folder `models` of a library that its register lists."""
    package = importlib.util.find_spec(library)
    if package is None or package.origin is None:
        return []
    files = sorted((Path(package.origin).parent / "models").glob("*.py"))
    return [name for file in files for name in _REGISTERED.findall(file.read_text(encoding="utf-8"))]
