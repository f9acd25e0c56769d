"""Frozen networks: what is trained, in which mode and at which learning rate, and how such a training resumes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]
from torch import nn

from pipeline.core.errors import UserError
from pipeline.models import freezing
from pipeline.models.build import Classifier, build
from pipeline.models.freezing import blocks, rate_factors
from pipeline.training.checkpoints import Checkpoint
from pipeline.training.features import select_trained
from pipeline.training.loop import TrainingResult
from pipeline.training.optimizer import make_optimizers
from tests.conftest import run_step, train_params
from tests.frozen import UNTIL, as_features, divided, fit, splits, timm_classifier, write_weights
from tests.test_model import config
from tests.test_resume import Project, one_thread  # noqa: F401  # a fixture
from tests.test_train import split_of


def trained_names(classifier: Classifier) -> set[str]:
    return {name.partition(".")[0] for name, found in classifier.network.named_parameters() if found.requires_grad}


def test_a_container_counts_as_one_block_for_each_of_its_children() -> None:
    names = [name for name, block in blocks(build(config("resnet18")).network) if any(True for _ in block.parameters())]
    layers = [f"layer{number}.{index}" for number in range(1, 5) for index in range(2)]
    assert names == ["conv1", "bn1", *layers, "fc"]


def test_a_transformer_of_timm_is_frozen_with_its_class_token() -> None:
    classifier = timm_classifier("vit_tiny_patch16_224")
    freezing._freeze_until(classifier, "blocks.0", model="vit")
    trained = {name for name, found in classifier.network.named_parameters() if found.requires_grad}
    assert {name.partition(".")[0] for name in trained} == {"blocks", "norm", "head"}
    assert {name.split(".")[1] for name in trained if name.startswith("blocks")} == {"1"}


@pytest.mark.parametrize(
    ("model", "freeze", "expected"),
    [
        ("resnet18", "backbone", {"fc"}),
        ("resnet18", "until=layer3", {"layer4", "fc"}),
        ("resnet18", "until=layer3.0", {"layer3", "layer4", "fc"}),
        ("resnet18", "until=avgpool", {"fc"}),
        ("lenet", "until=7", {"9", "11"}),
        ("mobilenet_v3_small", "until=features.5", {"features", "classifier"}),
    ],
)
def test_freeze_selects_what_is_trained(model: str, freeze: str, expected: set[str]) -> None:
    assert trained_names(divided(model, freeze=freeze)[0]) == expected


def test_only_the_later_children_of_a_container_are_trained() -> None:
    classifier, _ = divided("resnet18", freeze="until=layer3.0")
    layer = classifier.network.get_submodule("layer3")
    assert [all(found.requires_grad for found in block.parameters()) for block in layer.children()] == [False, True]


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (
            "until=layer5",
            "train.freeze is until=layer5, but train.model resnet18 has no such block; allowed: none, backbone, or "
            "until= with one of conv1, bn1, layer1, layer2, layer3, layer4, a part of these from layer1.0 to layer4.1; "
            "set it to one of these",
        ),
        ("until=fc", "train.freeze is until=fc, which leaves nothing of train.model resnet18 to train; allowed: none"),
    ],
)
def test_an_unknown_block_and_the_last_one_are_refused(freeze: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        divided("resnet18", freeze=freeze)
    assert str(raised.value).startswith(message)


def test_a_long_list_of_blocks_is_shortened() -> None:
    with pytest.raises(UserError, match=r"with one of 0, 2, .*, 18, 20, 1 more; set it"):
        divided("airbench", freeze="until=nothing")


def training_layers(classifier: Classifier) -> set[str]:
    """Return the first parts of the names of the network's layers that are in training mode."""
    layers = classifier.train().network.named_modules()
    training = [name for name, layer in layers if layer.training and next(layer.children(), None) is None]
    return {name.partition(".")[0] for name in training}


def test_frozen_modules_stay_in_evaluation_mode() -> None:
    assert training_layers(divided("resnet18", freeze="backbone")[0]) == {"fc"}
    assert training_layers(divided("resnet18", freeze="until=layer2")[0]) == {"layer3", "layer4", "avgpool", "fc"}
    classifier, _ = divided("mobilenet_v3_small", freeze="backbone")  # it has dropout before the head
    classifier.train()
    assert torch.equal(classifier(torch.ones(2, 3, 32, 32)), classifier(torch.ones(2, 3, 32, 32)))


@pytest.mark.parametrize("freeze", ["backbone", "until=features.3"])
def test_a_training_changes_no_frozen_weight_or_statistic(freeze: str) -> None:
    classifier, params = divided("mobilenet_v3_small", freeze=freeze, flip=True)
    frozen = {name for name, found in classifier.named_parameters() if not found.requires_grad}
    frozen |= {name for name, _ in classifier.named_buffers() if name.startswith("network.features.3")}
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    after = fit(classifier, params, splits()).last
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not frozen & changed
    assert {"network.classifier.3.weight", "network.classifier.3.bias"} <= changed
    assert any("running_mean" in name for name in changed) == (freeze != "backbone")


def test_an_unknown_block_is_reported_in_one_line(workspace: Path) -> None:
    Project(workspace, weights_md5=write_weights(workspace), **UNTIL | {"freeze": "until=nothing"})
    done = run_step("train")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: train.freeze is until=nothing, but train.model lenet has no such block; allowed: ")


# learning rates


def test_the_learning_rate_decays_by_block_and_the_head_has_its_own() -> None:
    classifier, params = divided("resnet18", layer_decay=0.5, head_learning_rate_factor=10.0)
    factors = rate_factors(classifier, params=params)
    names = {name: factors[id(found)] for name, found in classifier.network.named_parameters()}
    assert names["fc.weight"] == names["fc.bias"] == 10.0
    assert names["layer4.1.conv1.weight"] == names["layer4.1.bn2.bias"] == 0.5
    assert names["layer4.0.downsample.0.weight"] == 0.25
    assert names["layer1.0.conv1.weight"] == 0.5**8
    assert names["conv1.weight"] == names["bn1.weight"] == 0.5**9  # a normalization is no step of its own
    [optimizer] = make_optimizers(classifier, params=params)
    assert sorted(group["rate_factor"] for group in optimizer.param_groups) == sorted(set(names.values()))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


def test_the_learning_rates_of_a_transformer_are_those_of_timm() -> None:
    classifier = timm_classifier("vit_tiny_patch16_224")
    factors = rate_factors(classifier, params=train_params(layer_decay=0.75))
    ours = {name: factors[id(found)] for name, found in classifier.network.named_parameters() if "blocks" in name}
    groups = param_groups_layer_decay(classifier.network, layer_decay=0.75)
    theirs = {id(found): group["lr_scale"] for group in groups for found in group["params"]}
    assert ours == pytest.approx(
        {name: theirs[id(found)] for name, found in classifier.network.named_parameters() if "blocks" in name}
    )
    assert factors[id(classifier.network.cls_token)] == pytest.approx(0.75**3)


def test_the_biases_of_batch_normalization_keep_their_rule() -> None:
    changes: dict[str, Any] = {"layer_decay": 0.5, "bias_learning_rate_factor": 4.0, "weight_decay": 0.1}
    classifier, params = divided("resnet18", **changes)
    [optimizer] = make_optimizers(classifier, params=params)
    bias = classifier.network.get_parameter("layer4.1.bn1.bias")
    [group] = [group for group in optimizer.param_groups if any(found is bias for found in group["params"])]
    assert (group["rate_factor"], group["weight_decay"]) == (2.0, 0.025)


@pytest.mark.parametrize(("factor", "groups"), [(1.0, 1), (4.0, 2)])
def test_without_factors_there_are_as_many_groups_as_before_in_the_order_of_the_network(
    factor: float, groups: int
) -> None:
    classifier, params = divided("resnet18", bias_learning_rate_factor=factor)
    [optimizer] = make_optimizers(classifier, params=params)
    assert len(optimizer.param_groups) == groups
    first = [id(found) for found in optimizer.param_groups[0]["params"]]
    assert first == [id(found) for found in classifier.parameters() if id(found) in set(first)]


def test_the_head_alone_has_the_rate_of_the_head() -> None:
    [optimizer] = make_optimizers(nn.Linear(2, 3), params=train_params(head_learning_rate_factor=10.0, layer_decay=0.5))
    assert [group["rate_factor"] for group in optimizer.param_groups] == [10.0]


# resume


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("mobilenet_v3_small", {"freeze": "until=features.3", "layer_decay": 0.7, "head_learning_rate_factor": 5.0}),
        ("mobilenet_v3_small", {"freeze": "backbone", "flip": True, "crop_padding": 2}),
        ("lenet", {"freeze": "backbone", "average_every_steps": 3}),
    ],
)
def test_a_frozen_training_stopped_in_the_middle_of_an_epoch_has_the_same_result(
    model: str, changes: dict[str, Any]
) -> None:
    def run(*, stop_after: int | None = None, start: Checkpoint | None = None) -> TrainingResult | Checkpoint:
        classifier, params = divided(model, **changes, log_every_steps=1, learning_rate=0.01)
        trained, data = select_trained(classifier, split_of(2, seed=0), params=params), splits()
        saved: list[Checkpoint] = []

        def on_step(step: int, _loss: float, _rate: float) -> None:
            if step == stop_after:
                raise KeyboardInterrupt

        if trained is not classifier:
            data = as_features(classifier, trained, data[0]), as_features(classifier, trained, data[1])
        try:
            return fit(trained, params, data, on_step=on_step, start=start, save=saved.append)
        except KeyboardInterrupt:
            return Checkpoint.from_bytes(saved[-1].to_bytes())

    whole, first = run(), run(stop_after=2)
    assert isinstance(first, Checkpoint)
    second = run(stop_after=4, start=first)
    assert isinstance(second, Checkpoint)
    found = run(start=second)
    assert isinstance(found, TrainingResult)
    assert isinstance(whole, TrainingResult)
    assert found.history == whole.history
    assert all(torch.equal(found.last[name], tensor) for name, tensor in whole.last.items())
