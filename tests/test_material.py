"""The concepts of PyTorch's tutorials, shown by the pipeline's own functions; docs/material.md lists them."""

import ast
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.ways.peers import Net
from pipeline.arrays import DatasetInfo, Split
from pipeline.artifacts import file_md5, read_split
from pipeline.models.airbench import Airbench
from pipeline.models.build import build
from pipeline.models.inference import logits_of
from pipeline.models.lenet import LeNet
from pipeline.models.losses import loss_function
from pipeline.models.pretrained import load_pretrained
from pipeline.params import check_params
from pipeline.recipes import compose
from pipeline.train import _make_classifier
from pipeline.training.batches import epoch_batches
from pipeline.training.device import choose_device
from pipeline.training.loop import train
from pipeline.training.optimizer import make_optimizers
from pipeline.training.schedule import learning_rate
from tests.conftest import PROJECT, colored_images, train_params, write_normalized
from tests.test_model import config

META = torch.device("meta")  # a device that every machine has: tensors on it have shape and dtype, but no values
RATE, MOMENTUM = 0.1, 0.9
BARE = {"optimizer": "sgd", "momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "learning_rate": RATE}


def split_of(number: int, *, device: torch.device | None = None) -> Split:
    images, labels = colored_images(number)
    return Split.of(images, labels, mean=[0.4] * 3, std=[0.25] * 3, device=device or torch.device("cpu"))


# --- tensors and devices


def test_a_split_shares_the_memory_of_its_arrays() -> None:
    images, labels = colored_images(4)
    split = Split.of(images, labels, mean=[0.4] * 3, std=[0.25] * 3)
    images[0, 0, 0, 0], labels[1] = 77, 2
    assert (int(split.images[0, 0, 0, 0]), int(split.labels[1])) == (77, 2)
    split.images[0] += 1  # in place, hence in the array too
    assert images[0, 0, 0, 0] == 78
    assert split.images.numpy().ctypes.data == images.ctypes.data


def test_a_split_of_a_file_is_not_read_into_memory(tmp_path: Path) -> None:
    folder = write_normalized(tmp_path)
    images, labels = read_split("train", folder=folder)
    split = Split.of(images, labels, mean=[0.4] * 3, std=[0.25] * 3)
    assert isinstance(images, np.memmap)
    assert split.images.data_ptr() == images.ctypes.data


def test_to_copies_only_where_device_or_dtype_differ() -> None:
    pixels = split_of(2).images
    assert pixels.to("cpu", torch.uint8) is pixels
    device = choose_device("auto", field="train.device")
    floats = pixels.to(device, torch.float64)
    assert (floats.device.type, floats.dtype) == (device.type, torch.float64)
    assert torch.equal(floats.to(pixels.device, torch.uint8), pixels)


def test_a_split_and_a_network_move_to_a_device_whole() -> None:
    split, network = split_of(2, device=META), build(config()).to(META)
    tensors = [split.images, split.labels, split.scale, split.shift, *network.parameters()]
    assert {tensor.device for tensor in tensors} == {META}
    assert (split.images.dtype, split.labels.dtype, split.scale.dtype) == (torch.uint8, torch.int64, torch.float32)


def test_the_step_train_moves_the_network_to_the_device(tmp_path: Path) -> None:
    info = DatasetInfo.read(write_normalized(tmp_path))
    network = _make_classifier(train_params(), info, device=META)
    assert {tensor.device for tensor in network.state_dict().values()} == {META}


def test_auto_takes_a_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto", field="train.device").type == "cuda"


# --- autograd


@pytest.mark.parametrize("how", ["gradient", "sum"])
def test_the_gradient_of_q_is_that_of_the_material(how: str) -> None:
    a, b = torch.tensor([2.0, 3.0], requires_grad=True), torch.tensor([6.0, 4.0], requires_grad=True)
    q = 3 * a**3 - b**2
    if how == "gradient":  # q is a vector: its gradient towards itself is ones
        q.backward(gradient=torch.tensor([1.0, 1.0]))  # type: ignore[no-untyped-call]
    else:
        q.sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(a.grad, 9 * a.detach() ** 2)  # type: ignore[arg-type]
    assert torch.equal(b.grad, -2 * b.detach())  # type: ignore[arg-type]


def test_the_graph_leads_from_the_loss_back_through_the_layers() -> None:
    logits = build(config())(torch.zeros(2, 3, 32, 32))
    node = loss_function("mse")(logits, torch.tensor([0, 1])).grad_fn
    names = []
    while node is not None:
        names.append(node.name().removesuffix("0"))
        node = next((before for before, _ in node.next_functions if before and "Accumulate" not in before.name()), None)
    layers = ["AddmmBackward", "ReluBackward", "AddmmBackward", "ReluBackward", "AddmmBackward"]
    assert names[:6] == ["MseLossBackward", *layers]
    assert names.count("ConvolutionBackward") == 2


def test_only_leaves_that_require_it_get_a_gradient() -> None:
    x, z = torch.rand(5, 5), torch.rand(5, 5, requires_grad=True)
    a, b = x + x, x + z
    assert (a.requires_grad, b.requires_grad) == (False, True)
    b.retain_grad()  # b is no leaf: without this its gradient is not kept
    c = b * 2
    c.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is None
    assert torch.equal(z.grad, b.grad)  # type: ignore[arg-type]
    assert (z.is_leaf, b.is_leaf, c.is_leaf) == (True, False, False)
    with pytest.warns(UserWarning, match="not a leaf Tensor"):
        assert c.grad is None


def test_what_is_frozen_gets_no_gradient_and_no_update() -> None:
    network = Airbench(num_classes=3, channels=3, image_size=32)
    network(torch.rand(2, 3, 32, 32)).sum().backward()
    frozen = {name for name, parameter in network.named_parameters() if parameter.grad is None}
    assert {"0.weight"} < frozen  # the whitening layer, and the factors of batch normalization
    [optimizer] = make_optimizers(network, params=train_params(**BARE))
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for name, parameter in network.named_parameters() if name not in frozen}


def test_a_frozen_resnet18_trains_its_new_head_alone() -> None:
    network = build(config("resnet18")).network.requires_grad_(False)
    network.fc = nn.Linear(512, 10)
    [optimizer] = make_optimizers(network, params=train_params(**BARE))
    [group] = optimizer.param_groups
    assert [tuple(parameter.shape) for parameter in group["params"]] == [(10, 512), (10,)]


def test_predictions_are_made_without_a_graph() -> None:
    classifier, split = build(config(classes=3)), split_of(4)
    assert not logits_of(classifier, split, batch_size=2).requires_grad
    assert classifier(torch.zeros(1, 3, 32, 32)).requires_grad


# --- networks


def test_resnet18_from_a_weights_file_goes_forward_back_and_one_step(tmp_path: Path) -> None:
    path = tmp_path / "resnet18.safetensors"
    chosen = config("resnet18", classes=1000, image_size=64, weights=str(path))
    donor = build(chosen)
    save_file(donor.network.state_dict(), path)
    classifier, data, labels = build(chosen), torch.rand(1, 3, 64, 64), torch.rand(1, 1000)
    assert load_pretrained(classifier, config=chosen, md5=file_md5(path)) == []
    prediction = classifier(data)
    assert torch.equal(prediction, donor(data))
    (prediction - labels).sum().backward()
    [optimizer] = make_optimizers(classifier, params=train_params(**BARE | {"learning_rate": 0.01, "momentum": 0.9}))
    optimizer.step()
    for before, after in zip(donor.parameters(), classifier.parameters(), strict=True):
        torch.testing.assert_close(after.detach(), before.detach() - 0.01 * after.grad)  # type: ignore[operator]


def test_lenet_prints_the_layers_of_the_material() -> None:
    lines = str(LeNet(num_classes=10, channels=1, image_size=32)).splitlines()
    assert [line.partition(": ")[2] for line in lines if "Conv2d" in line or "Linear" in line] == [
        "Conv2d(1, 6, kernel_size=(5, 5), stride=(1, 1))",
        "Conv2d(6, 16, kernel_size=(5, 5), stride=(1, 1))",
        "Linear(in_features=400, out_features=120, bias=True)",
        "Linear(in_features=120, out_features=84, bias=True)",
        "Linear(in_features=84, out_features=10, bias=True)",
    ]


def test_lenet_computes_what_the_tutorials_network_computes() -> None:
    ours, theirs = LeNet(num_classes=10, channels=3, image_size=32), Net()
    weights = zip(theirs.state_dict(), ours.state_dict().values(), strict=True)
    theirs.load_state_dict(dict(weights))
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images))  # ours pools before the ReLU


# --- losses


def test_mse_needs_a_target_of_the_outputs_shape() -> None:
    output, labels = torch.randn(4, 1), torch.zeros(4, dtype=torch.int64)
    with pytest.warns(UserWarning, match="Using a target size"):  # each of the 4 outputs meets each of the 4 targets
        broadcast = nn.MSELoss()(output, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    right = nn.MSELoss()(output, torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1))
    assert broadcast != right
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = loss_function("mse")(output, labels)  # makes one-hot targets of shape (4, 1) from the labels
    assert torch.equal(ours, nn.MSELoss()(output, torch.ones(4, 1)))


# --- the update


def test_gradients_add_up_until_they_are_zeroed() -> None:
    network = build(config(classes=3))
    for times in (1, 2):
        network(torch.ones(1, 3, 32, 32)).sum().backward()
        bias = network.network[11].bias  # type: ignore[index]
        assert torch.equal(bias.grad, torch.full((3,), float(times)))
    network.zero_grad()
    assert bias.grad is None


def test_each_step_of_the_loop_begins_without_gradients() -> None:
    params = train_params(**BARE | {"learning_rate": 1e-12, "epochs": 1, "batch_size": 16, "schedule": "constant"})
    torch.manual_seed(0)
    classifier, split = build(config(classes=3)), split_of(48)
    train(classifier, params=params, train_split=split, validation_split=split_of(12))
    trained = [parameter.grad for parameter in classifier.parameters()]
    *_, (images, labels) = epoch_batches(split, params=params, epoch=1)  # the last of three batches
    classifier.zero_grad()
    loss_function("cross_entropy")(classifier(images), labels).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(trained, [parameter.grad for parameter in classifier.parameters()])


def sgd(weight: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    for gradient in gradients:
        weight = weight - RATE * gradient
    return weight


def momentum(weight: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    velocity = torch.zeros_like(weight)
    for gradient in gradients:
        velocity = MOMENTUM * velocity + gradient
        weight = weight - RATE * velocity
    return weight


def nesterov(weight: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    velocity = torch.zeros_like(weight)
    for gradient in gradients:
        velocity = MOMENTUM * velocity + gradient
        weight = weight - RATE * (gradient + MOMENTUM * velocity)
    return weight


def adam(weight: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, gradient in enumerate(gradients, start=1):
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        weight = weight - RATE * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    return weight


def rmsprop(weight: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    square = torch.zeros_like(weight)
    for gradient in gradients:
        square = 0.99 * square + 0.01 * gradient**2
        weight = weight - RATE * gradient / (square.sqrt() + 1e-8)
    return weight


FORMULAS = [
    (sgd, {}),
    (momentum, {"momentum": MOMENTUM}),
    (nesterov, {"momentum": MOMENTUM, "nesterov": True}),
    (adam, {"optimizer": "adam"}),
    (rmsprop, {"optimizer": "rmsprop"}),
]


@pytest.mark.parametrize(("formula", "changes"), FORMULAS, ids=[formula.__name__ for formula, _ in FORMULAS])
def test_two_steps_of_an_optimizer_are_those_of_its_formula(
    formula: Callable[[Tensor, Sequence[Tensor]], Tensor], changes: dict[str, object]
) -> None:
    weight = nn.Parameter(start := torch.tensor([1.0, -2.0, 3.0]))
    start, gradients = start.clone(), [torch.tensor([0.5, 1.0, -2.0]), torch.tensor([-0.1, 0.3, 4.0])]
    [optimizer] = make_optimizers(nn.ParameterList([weight]), params=train_params(**BARE | changes))
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(weight.detach(), formula(start, gradients))


def test_the_bare_rule_over_all_parameters_is_a_step_of_sgd() -> None:
    network = LeNet(num_classes=10, channels=1, image_size=32)
    network(torch.randn(1, 1, 32, 32)).sum().backward()
    expected = [parameter.data - RATE * parameter.grad.data for parameter in network.parameters()]  # type: ignore[union-attr]
    [optimizer] = make_optimizers(network, params=train_params(**BARE))
    optimizer.step()
    torch.testing.assert_close([parameter.data for parameter in network.parameters()], expected)


def test_the_recipe_has_the_settings_of_the_tutorial() -> None:
    params = check_params(compose("cifar10_tutorial", {}), origin="test").train
    [optimizer] = make_optimizers(nn.Linear(1, 1), params=params)
    [group] = optimizer.param_groups
    assert (type(optimizer), group["lr"], group["momentum"]) == (torch.optim.SGD, 0.001, 0.9)
    assert (params.loss, params.batch_size, params.epochs) == ("cross_entropy", 4, 2)
    assert {learning_rate(step, steps_per_epoch=10_000, params=params) for step in (0, 19_999)} == {0.001}


# --- docs/material.md

ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (PROJECT / "docs/material.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("|") and not line.startswith(("| concept", "| ---"))
]
REFERENCE = re.compile(r"\[([^]]+)\]\(\.\./([^)#]+)\)((?:,? `[\w.]+`)*)")


def names_of(path: Path) -> set[str]:
    """Return the functions, classes, methods (`Class.method`) and constants of a module, or the keys of a YAML file."""
    if path.suffix == ".yaml":
        return set(re.findall(r"^ *(\w+):", path.read_text(encoding="utf-8"), re.MULTILINE))
    found = set[str]()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case ast.FunctionDef(name=name):
                found.add(name)
            case ast.ClassDef(name=name, body=body):
                found |= {name} | {f"{name}.{each.name}" for each in body if isinstance(each, ast.FunctionDef)}
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                found.add(name)
    return found


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_row_of_the_material_names_code_and_tests_that_exist(row: list[str]) -> None:
    concept, places, tests = row
    for cell, folder in ((places, ""), (tests, "tests/")):
        references = REFERENCE.findall(cell)
        assert references, f"{concept}: {cell} has no link"
        for text, target, names in references:
            assert text == target
            assert target.startswith(folder)
            missing = set(re.findall(r"`([\w.]+)`", names)) - names_of(PROJECT / target)
            assert not missing, f"{concept}: {target} has no {', '.join(missing)}"
    assert re.findall(r"`test_\w+`", tests), f"{concept}: names no test"
