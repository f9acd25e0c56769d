"""Weights are read from the checkpoints of other programs, whatever their keys and prefixes."""

import copy
import functools
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.artifacts import file_md5
from pipeline.core.errors import UserError
from pipeline.models.build import build
from pipeline.models.lenet import LeNet
from pipeline.models.pretrained import load_pretrained
from tests.test_model import config

Weights = dict[str, Tensor]


@functools.cache
def donor(model: str = "lenet") -> nn.Module:
    torch.manual_seed(3)
    return build(config(model, classes=10, weights="any.pth")).network


def weights(model: str = "lenet") -> Weights:
    return dict(donor(model).state_dict())


def prefixed(prefix: str, model: str = "lenet") -> Weights:
    return {prefix + name: tensor for name, tensor in weights(model).items()}


def load(content: Any, path: Path, *, model: str = "lenet", classes: int = 10) -> tuple[Weights, list[str]]:
    """Save the content, load it as weights, and return the network's weights and the names of those left random."""
    torch.save(content, path)
    return load_file_as_weights(path, model=model, classes=classes)


def load_file_as_weights(path: Path | str, *, model: str = "lenet", classes: int = 10) -> tuple[Weights, list[str]]:
    chosen = config(model, classes=classes, weights=str(path))
    classifier = build(chosen)
    left_random = load_pretrained(classifier, config=chosen, md5=file_md5(Path(path)))
    return classifier.network.state_dict(), left_random


class Lightning(nn.Module):
    """A module as in Lightning: the network is an attribute, beside a loss that has weights."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.net = network
        self.criterion = nn.CrossEntropyLoss(weight=torch.ones(10))


def optimizer_state() -> dict[str, Any]:
    network = copy.deepcopy(donor())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.zeros(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


FORMS: dict[str, Callable[[], Any]] = {
    "a state dict": weights,
    "DataParallel": lambda: nn.DataParallel(donor()).state_dict(),
    "averaged weights": lambda: torch.optim.swa_utils.AveragedModel(donor()).state_dict(),
    "compiled": lambda: prefixed("_orig_mod."),
    "compiled and parallel": lambda: prefixed("module._orig_mod."),
    "parallel and compiled": lambda: prefixed("_orig_mod.module."),
    "the tutorial's checkpoint": lambda: {
        "epoch": 3,
        "model_state_dict": weights(),
        "optimizer_state_dict": optimizer_state(),
        "loss": torch.tensor(0.4),
    },
    "ImageNet example": lambda: {
        "epoch": 3,
        "arch": "lenet",
        "best_acc1": torch.tensor(7),
        "state_dict": prefixed("module."),
    },
    "Lightning": lambda: {"epoch": 3, "state_dict": Lightning(donor()).state_dict(), "hyper_parameters": {"lr": 0.1}},
    "Lightning, compiled": lambda: {"state_dict": prefixed("model._orig_mod.")},
    "nested twice": lambda: {"checkpoint": {"model": prefixed("model.module.")}},
    "ours": lambda: prefixed("network."),
    **{
        name: functools.partial(lambda name: {name: weights()}, name) for name in ("model", "net", "network", "weights")
    },
    "an average beside it": lambda: {
        "state_dict": weights(),
        "state_dict_ema": {n: t + 1 for n, t in weights().items()},
    },
    "an average beside the model": lambda: {
        "model_ema": {n: t + 1 for n, t in prefixed("module.").items()},
        "model": weights(),
    },
    "an average in Lightning": lambda: {
        "state_dict": {**prefixed("model."), **{n: t + 1 for n, t in prefixed("model_ema.").items()}},
    },
    "a list of one": lambda: {"models": [weights()]},
    "a list of checkpoints": lambda: [{"epoch": 3}, {"model": weights(), "sizes": [torch.zeros(3)]}],
    "twice the same": lambda: {
        "model": weights(),
        "best": {name: tensor.clone() for name, tensor in weights().items()},
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_the_same_network_are_read(form: str, tmp_path: Path) -> None:
    found, left_random = load(FORMS[form](), tmp_path / "weights.pth")
    assert left_random == []
    assert all(torch.equal(found[name], tensor) for name, tensor in weights().items())


def test_a_part_of_the_network_may_be_wrapped(tmp_path: Path) -> None:
    network: Any = copy.deepcopy(donor("resnet18"))
    network.layer1 = nn.DataParallel(network.layer1)
    content = {
        name: tensor for name, tensor in network.state_dict().items() if not name.endswith("num_batches_tracked")
    }
    found, left_random = load({"model": content}, tmp_path / "weights.pth", model="resnet18", classes=4)
    assert left_random == ["fc.weight", "fc.bias"]
    assert torch.equal(found["layer1.0.conv1.weight"], weights("resnet18")["layer1.0.conv1.weight"])


def test_the_old_names_of_densenet_are_read(tmp_path: Path) -> None:
    old = {name: name.replace("norm1", "norm.1").replace("conv2", "conv.2") for name in weights("densenet121")}
    content = {old[name] if "denselayer" in name else name: tensor for name, tensor in weights("densenet121").items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in content
    assert load(content, tmp_path / "weights.pth", model="densenet121")[1] == []


def test_a_regnet_takes_weights_from_a_file(tmp_path: Path) -> None:
    assert load(weights("regnet_x_400mf"), tmp_path / "weights.pth", model="regnet_x_400mf")[1] == []


def deeper() -> Weights:
    """Return weights of ResNet-34, which has all names of ResNet-18 with the same shapes."""
    return dict(build(config("resnet34", weights="any.pth")).network.state_dict())


REFUSED: dict[str, tuple[str, Callable[[], Any], str]] = {
    "a deeper network": (
        "resnet18",
        deeper,
        r"found layer1\.2\.bn1\.bias, .* and \d+ more, which train\.model resnet18",
    ),
    "a name is missing": (
        "lenet",
        lambda: {"model": {name: tensor for name, tensor in weights().items() if name != "3.bias"}},
        r"found no 3\.bias, but train\.model lenet has it of shape \(16,\) .*what differs: 3\.bias; use weights",
    ),
    "other names": (
        "lenet",
        lambda: {f"module.conv{name}": tensor for name, tensor in weights().items()},
        r"found no 0\.weight, but .* the file has module\.conv0\.bias, module\.conv0\.weight, .* and 7 more; use",
    ),
    "another shape": (
        "lenet",
        lambda: {"state_dict": LeNet(num_classes=10, channels=1, image_size=32).state_dict()},
        r"found state_dict\.0\.weight of shape \(6, 1, 5, 5\), but train\.model lenet has it of shape \(6, 3, 5, 5\)",
    ),
    "two networks": (
        "lenet",
        lambda: {
            f"{who}.{name}": tensor + (who == "student")
            for who in ("student", "teacher")
            for name, tensor in weights().items()
        },
        r"found 2 sets of weights that fit .*: student\.\*, teacher\.\*; allowed: one; .* python -c .*student\.",
    ),
    "a list of two": (
        "lenet",
        lambda: {"models": [weights(), {name: tensor + 1 for name, tensor in weights().items()}]},
        r"found 2 sets of weights that fit .*: models\.0\.\*, models\.1\.\*; allowed: one",
    ),
    "a preferred key inside others": (
        "lenet",
        lambda: {
            "teacher": {"state_dict": weights()},
            "student": {"model": {name: tensor + 1 for name, tensor in weights().items()}},
        },
        r"found 2 sets of weights that fit .*: teacher\.state_dict\.\*, student\.model\.\*; allowed: one",
    ),
    "with and without a wrapper": (
        "lenet",
        lambda: {**weights(), **{f"module.{name}": tensor + 1 for name, tensor in weights().items()}},
        r"found 2 sets of weights that fit .*module\.\*",
    ),
    "no tensors": ("lenet", lambda: {"state_dict": {"epoch": 3}}, "holds no named tensors; allowed: a state dict"),
    "a list": ("lenet", lambda: [torch.zeros(3)], "holds no named tensors; allowed: a state dict"),
    "one tensor": ("lenet", lambda: torch.zeros(3), "holds no named tensors; allowed: a state dict"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_weights_that_do_not_fit_are_refused_in_one_line_with_the_differences(name: str, tmp_path: Path) -> None:
    model, content, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as error:
        load(content(), tmp_path / "weights.pth", model=model)
    assert "\n" not in str(error.value)


def test_a_mapping_that_contains_itself_is_read_once(tmp_path: Path) -> None:
    content: dict[str, Any] = {"model": weights()}
    content["again"] = content
    assert load(content, tmp_path / "weights.pth")[1] == []


def test_the_set_of_weights_that_is_used_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(FORMS["an average beside the model"](), tmp_path / "weights.pth")
    expected = f"train.weights {tmp_path / 'weights.pth'}: uses the weights model.*, not model_ema.module.*\n"
    assert capsys.readouterr().out == expected
    load(FORMS["twice the same"](), tmp_path / "weights.pth")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["it's.pth", "weights.safetensors"])
def test_the_command_in_the_message_extracts_a_set(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = REFUSED["two networks"][1]()
    if name.endswith(".safetensors"):
        save_file(content, name)
        with pytest.raises(UserError) as error:
            load_file_as_weights(name)
    else:
        with pytest.raises(UserError) as error:
            load(content, Path(name))
    *_, program, option, code = shlex.split(str(error.value).rpartition("as in: ")[2])
    assert (program, option) == ("python", "-c")
    exec(code, {})  # the user is asked to run this code
    found, left_random = load(torch.load("extracted.pth"), Path("again.pth"))
    assert left_random == []
    assert all(torch.equal(found[each], tensor + 1) for each, tensor in weights().items())
