"""Frozen networks: what is trained, at which learning rate, and training on kept features with the same bits."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]
from torch import nn

from pipeline.arrays import Split
from pipeline.artifacts import file_md5
from pipeline.core.errors import UserError
from pipeline.models import freezing
from pipeline.models.build import Classifier, build
from pipeline.models.freezing import apply_freezing, blocks, rate_factors
from pipeline.params import TrainParams
from pipeline.training import features
from pipeline.training.batches import epoch_batches
from pipeline.training.checkpoints import Checkpoint
from pipeline.training.features import (
    compute_features,
    find_separable_head,
    kept_features,
    select_trained,
    with_features,
)
from pipeline.training.loop import TrainingResult, train
from pipeline.training.optimizer import make_optimizers
from tests.conftest import PROJECT, read_until, run_step, start_step, train_params
from tests.test_model import config
from tests.test_resume import EVERY_STEP, Project
from tests.test_train import QUICK, split_of

WEIGHTS = "body.safetensors"
FROZEN = {"freeze": "backbone", "weights": WEIGHTS, "crop_padding": 0}
FLIPPED = {**FROZEN, "flip": True}
UNTIL = {"freeze": "until=3", "weights": WEIGHTS}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, as in test_resume.py."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def divided(model: str, *, classes: int = 3, size: int = 32, **changes: Any) -> tuple[Classifier, TrainParams]:
    """Return a network with random weights, divided as the parameters say, and the parameters."""
    params = train_params(model=model, weights=WEIGHTS, **{"crop_padding": 0} | QUICK | changes)
    configuration = config(model, classes=classes, image_size=size)
    torch.manual_seed(0)
    classifier = build(configuration)
    apply_freezing(classifier, config=configuration, params=params)
    return classifier, params


def timm_classifier(name: str) -> Classifier:
    """Return a network of timm with 3 classes and a marked head."""
    size: dict[str, Any] = {"depth": 2, "embed_dim": 24, "num_heads": 2} if name.startswith("vit") else {}
    network, other = (timm.create_model(name, num_classes=number, **size) for number in (3, 4))
    classifier, shapes = Classifier(network, num_classes=3, network_channels=3, input_size=None), other.state_dict()
    tensors = network.state_dict()
    classifier.head = {name for name in tensors if tensors[name].shape != shapes[name].shape}
    return classifier


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


def splits() -> tuple[Split, Split]:
    return split_of(48, seed=1), split_of(24, seed=2)


def fit(trained: nn.Module, params: TrainParams, data: tuple[Split, Split], **options: Any) -> TrainingResult:
    return train(trained, params=params, train_split=data[0], validation_split=data[1], **options)


def as_features(classifier: Classifier, head: nn.Module, split: Split) -> Split:
    return with_features(split, np.concatenate(list(compute_features(classifier, head, split, name="a split"))))


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


@pytest.mark.parametrize(
    ("model", "size", "separable"),
    [
        ("lenet", 32, True),
        ("mobilenet_v3_small", 32, True),
        ("googlenet", 64, True),
        ("squeezenet1_1", 64, False),
        ("airbench", 32, False),
    ],
)
def test_training_goes_over_features_where_the_output_is_that_of_the_head(
    model: str, size: int, separable: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier, params = divided(model, size=size, freeze="backbone")
    split = Split.of(np.zeros((2, size, size, 3), np.uint8), np.arange(2), mean=[0.5] * 3, std=[0.2] * 3)
    trained = select_trained(classifier, split, params=params)
    assert isinstance(trained, nn.Linear) == separable
    assert (trained is classifier) == ("each epoch passes all images through the whole net" in capsys.readouterr().out)
    flipped = train_params(model=model, **FLIPPED)
    assert select_trained(classifier, split, params=flipped) is classifier


@pytest.mark.parametrize(("name", "separable"), [("vit_tiny_patch16_224", True), ("levit_128s", False)])
def test_a_network_of_timm_can_be_frozen(name: str, separable: bool) -> None:
    classifier = timm_classifier(name)
    images = np.zeros((2, 224, 224, 3), np.uint8)
    split = Split.of(images, np.arange(2), mean=[0.5] * 3, std=[0.2] * 3)
    assert (find_separable_head(classifier, split) is not None) == separable


def test_a_training_on_features_has_the_losses_of_one_through_the_frozen_network() -> None:
    classifier, params = divided("mobilenet_v3_small", freeze="backbone", learning_rate=0.01)
    head = select_trained(classifier, split_of(2, seed=0), params=params)
    start = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    whole = fit(classifier, params, splits())
    head.load_state_dict(start)
    alone = fit(head, params, tuple(as_features(classifier, head, split) for split in splits()))  # type: ignore[arg-type]
    assert alone.last.keys() == {"weight", "bias"}
    for found, expected in zip(alone.history, whole.history, strict=True):
        assert vars(found) == pytest.approx(vars(expected), rel=1e-4)
    for name, tensor in alone.last.items():
        assert torch.allclose(tensor, whole.last[f"network.classifier.3.{name}"], atol=1e-5)


def test_features_larger_than_the_window_are_read_from_their_file_even_if_it_is_deleted(tmp_path: Path) -> None:
    split = replace(split_of(40, seed=1), window_bytes=400)
    rows = np.arange(40, dtype=np.float32)[:, None].repeat(5, 1)
    np.save(tmp_path / "rows.npy", rows)
    kept = with_features(split, np.load(tmp_path / "rows.npy", mmap_mode="c"))
    (tmp_path / "rows.npy").unlink()
    assert kept.file is not None
    found = [batch for _ in range(2) for batch in epoch_batches(kept, params=train_params(**QUICK, **FROZEN), epoch=1)]
    assert [tuple(rows.shape) for rows, _ in found] == [(16, 5)] * 4
    assert torch.equal(torch.cat([rows for rows, _ in found[:2]]), torch.cat([rows for rows, _ in found[2:]]))
    for rows_found, labels in found:
        assert torch.equal(split.labels[rows_found[:, 0].long()], labels)


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


# resume and the command


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


def write_weights(folder: Path, model: str = "lenet") -> str:
    """Write weights of a network with 10 classes, and return their MD5."""
    torch.manual_seed(1)
    save_file(build(config(model)).network.state_dict(), folder / WEIGHTS)
    return file_md5(folder / WEIGHTS)


@pytest.fixture
def frozen(workspace: Path) -> Callable[..., Project]:
    """Return a function that makes a project whose pretrained LeNet is frozen as in its arguments."""
    return lambda **changes: Project(workspace, weights_md5=write_weights(workspace), **changes)


def outputs() -> dict[str, str]:
    """Return the MD5 of each file that the step wrote, by name."""
    return {path.name: file_md5(path) for path in Path("artifacts/train").iterdir()}


def feature_files() -> list[Path]:
    return sorted(Path(".cache/features").iterdir())


@pytest.mark.slow
def test_kept_features_save_time_only(frozen: Callable[..., Project], monkeypatch: pytest.MonkeyPatch) -> None:
    project = frozen(**FROZEN)
    output = project.finish()
    assert "features of train: computed for 320 images, kept in .cache/features" in output
    assert "(255 trained)" in output
    expected, [train_file, validation_file] = outputs(), feature_files()
    body, written = load_file(WEIGHTS), load_file("artifacts/train/best.safetensors")
    assert torch.equal(written["network.0.weight"], body["0.weight"])
    assert not torch.equal(written["network.11.weight"], body["11.weight"][:3])

    output = project.finish()
    assert f"features of train: read from {train_file}" in output
    assert outputs() == expected

    content = bytearray(train_file.read_bytes())
    content[-1] ^= 1
    train_file.write_bytes(content)
    validation_file.unlink()
    output = project.finish()
    assert f"warning: {train_file}: damaged (its MD5 is not the one in its name); it is computed again" in output
    assert "features of validation: computed for 24 images" in output
    assert outputs() == expected
    assert feature_files() == [train_file, validation_file]


@pytest.mark.slow
def test_features_that_cannot_be_kept_stay_in_memory(frozen: Callable[..., Project]) -> None:
    project = frozen(**FROZEN)
    project.finish()
    expected = outputs()
    for path in feature_files():
        path.unlink()
    Path(".cache/features").rmdir()
    Path(".cache/features").write_text("not a folder")
    output = project.finish()
    assert "the features of train are not kept" in output
    assert outputs() == expected


@pytest.mark.slow
def test_other_images_weights_or_sizes_have_other_features(frozen: Callable[..., Project]) -> None:
    project = frozen(**FROZEN)
    project.finish()
    before = feature_files()
    other = load_file(WEIGHTS)
    other["0.weight"][0, 0, 0, 0] += 1
    save_file(other, WEIGHTS)
    project.set(**FROZEN, weights_md5=file_md5(Path(WEIGHTS)))
    assert "computed for 320 images" in project.finish()
    assert len(feature_files()) == 4
    assert set(before) < set(feature_files())


@pytest.mark.slow
@pytest.mark.parametrize("changes", [FROZEN, FLIPPED, UNTIL], ids=["features", "flip", "until"])
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_frozen_training_resumes_with_the_same_bits(
    frozen: Callable[..., Project], changes: dict[str, Any], sent: signal.Signals
) -> None:
    project = frozen(**changes, **EVERY_STEP)
    project.finish()
    expected = outputs()
    process = project.start_until("epoch 2/4")
    process.send_signal(sent)
    process.communicate()
    for path in Path(".cache").glob("features/*"):
        path.unlink()
    assert "resumes from its checkpoint" in project.finish()
    assert outputs() == expected


def test_the_least_recently_used_features_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for age, name in enumerate(["new", "used", "old"]):
        (tmp_path / name).write_bytes(bytes(10))
        seconds = (tmp_path / name).stat().st_mtime - 2 * age * features.MIN_SECONDS_KEPT
        os.utime(tmp_path / name, (seconds, seconds))
    features._remove_unused(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    monkeypatch.setattr(features, "MAX_KEPT_BYTES", 20)
    features._remove_unused(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "used"]
    monkeypatch.setattr(features, "MAX_KEPT_BYTES", 0)
    features._remove_unused(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]  # a training may be reading it


# several processes


@pytest.mark.slow
@pytest.mark.parametrize("changes", [FROZEN, UNTIL], ids=["features", "until"])
def test_two_processes_have_the_losses_of_one_and_resume(
    frozen: Callable[..., Project], changes: dict[str, Any]
) -> None:
    project = frozen(**changes)
    project.finish()
    one = load_file("artifacts/train/last.safetensors")
    changes = changes | {"weights_md5": file_md5(Path(WEIGHTS)), "processes": 2}
    project.set(**changes)
    project.finish()
    two, expected = load_file("artifacts/train/last.safetensors"), outputs()
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], rtol=1e-2, atol=1e-4)
    process = start_step("train", hold="epoch 2/4")
    read_until("epoch 2/4", process)
    process.terminate()
    _, stderr = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, stderr
    for path in Path(".cache").glob("features/*"):
        path.unlink()
    assert "resumes from its checkpoint" in project.finish()
    assert outputs() == expected


FAILS_IN_RANK_0 = """
import runpy
from pipeline.core.errors import UserError
from pipeline.training import distributed, features
def fail(*arguments, **options):
    raise UserError("planted")
features.compute_features = fail
runpy.run_module("pipeline.train", run_name="__main__")
"""


@pytest.mark.slow
def test_a_failure_while_features_are_computed_ends_all_processes(frozen: Callable[..., Project]) -> None:
    frozen(**FROZEN, processes=2)
    Path("failing.py").write_text(FAILS_IN_RANK_0)
    launch = "from pipeline.training.distributed import launch; launch('failing', processes=2)"
    environment = os.environ | {"PYTHONPATH": f"{PROJECT}{os.pathsep}{Path.cwd()}"}
    done = subprocess.run(
        [sys.executable, "-c", launch], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stderr) == (2, "error: planted\n")


def test_an_unknown_block_is_reported_in_one_line(frozen: Callable[..., Project]) -> None:
    frozen(**UNTIL | {"freeze": "until=nothing"})
    done = run_step("train")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: train.freeze is until=nothing, but train.model lenet has no such block; allowed: ")


def test_kept_features_of_the_same_key_are_read_once_computed(workspace: Path) -> None:
    classifier, params = divided("lenet", freeze="backbone")
    split = split_of(70, seed=1)
    head = select_trained(classifier, split, params=params)
    first, second = (kept_features(classifier, head, split, name="train", key="0" * 32) for _ in range(2))
    assert torch.equal(first.images, second.images)
    assert first.images.shape == (70, 1, 1, 84)
    limited = kept_features(classifier, head, replace(split, window_bytes=100), name="train", key="0" * 32)
    assert limited.file is not None
    assert torch.equal(limited.pixels(3, 70), first.images[3:])
