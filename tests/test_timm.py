"""Networks of timm: their names, and pretrained weights from a package or a file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image

from flows.checks import check_inputs
from pipeline.arrays import Split
from pipeline.artifacts import file_md5
from pipeline.core.errors import UserError
from pipeline.images.decode import decode
from pipeline.models import packaged
from pipeline.models.build import Classifier, build
from pipeline.models.config import ModelConfig
from pipeline.models.files import load_model, save_config, save_weights
from pipeline.models.inference import class_probabilities, logits_of
from pipeline.models.names import check_network_name, timm_network_names
from pipeline.models.packaged import PACKAGED_NETWORK, packaged_weights_file
from pipeline.models.pretrained import load_pretrained
from pipeline.models.timm import read_timm_weights
from pipeline.recipes import compose
from pipeline.tracking.models import _requirements
from pipeline.training.loop import train
from tests.conftest import colored_images, train_params
from tests.pretrained import SMALL, configured, dataset
from tests.raw_folders import encoded
from tests.test_model import config

# the largest logits of EfficientNet-Lite0 for `drawing(256)`
GOLDEN_CLASSES = [906, 885, 772]
GOLDEN_LOGITS = [7.2566, 5.7437, 5.5112]


# names


def test_the_names_of_networks_are_known_without_an_import_of_timm() -> None:
    assert sorted(timm_network_names()) == sorted(timm.list_models())


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("timm/tf_eficientnet_lite0", "timm/tf_efficientnet_lite0"),
        ("tf_efficientnet_lite0", "timm/tf_efficientnet_lite0"),
        ("convnext_atto", "timm/convnext_atto"),
        ("timm/resnet19", "timm/resnet18"),
        ("resnet19", "resnet18"),
    ],
)
def test_an_unknown_name_is_refused_with_the_one_that_was_meant(name: str, meant: str) -> None:
    message = rf"train.model is '{name}'; allowed: .* timm/<name> .* \(did you mean {meant}\?\)"
    for check in (check_network_name, lambda unknown: build(config(unknown))):
        with pytest.raises(UserError, match=message):
            check(name)


@pytest.mark.slow
def test_a_tag_of_weights_is_part_of_the_name_and_an_unknown_one_is_refused() -> None:
    check_network_name("timm/resnet18.a1_in1k")
    assert build(config("timm/resnet18.a1_in1k", classes=2))(torch.zeros(2, 3, 32, 32)).shape == (2, 2)
    with pytest.raises(UserError, match=r"timm's resnet18 has no weights a9; allowed: .*timm/resnet18\.a1_in1k"):
        build(config("timm/resnet18.a9"))


# networks


def test_a_transformer_of_timm_takes_the_size_of_the_images() -> None:
    assert build(config("timm/test_vit", image_size=48, classes=2))(torch.zeros(1, 3, 48, 48)).shape == (1, 2)


def test_a_size_that_a_network_cannot_take_is_reported() -> None:
    with pytest.raises(UserError, match=r"train\.model timm/test_vit cannot take images of 40 pixels") as error:
        build(config("timm/test_vit", image_size=40))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_network_of_timm_trains_and_is_loaded_with_the_same_logits(tmp_path: Path) -> None:
    info = dataset()
    chosen = configured(SMALL, weights=None, info=info)
    splits = [Split.of(*colored_images(24, seed=seed), mean=chosen.mean, std=chosen.std) for seed in (1, 2)]
    classifier = build(chosen)
    before = classifier.network.state_dict()["fc.weight"].clone()
    params = train_params(model=SMALL, epochs=1, batch_size=8, crop_padding=0)
    train(classifier, params=params, train_split=splits[0], validation_split=splits[1])
    assert not torch.equal(classifier.network.state_dict()["fc.weight"], before)
    save_weights(classifier, tmp_path / "best.safetensors")
    save_config(chosen, tmp_path)
    loaded, read = load_model(tmp_path)
    logits = [logits_of(each, splits[1], batch_size=24) for each in (classifier, loaded)]
    assert torch.equal(*logits)
    assert read == chosen


def test_only_a_network_of_timm_needs_timm_where_it_is_served() -> None:
    names = [{each.partition("==")[0] for each in _requirements(model)} for model in (SMALL, "resnet18")]
    assert names[0] - names[1] == {"timm"}


# the weights in the package


@pytest.fixture(scope="module")
def pretrained() -> tuple[Classifier, ModelConfig]:
    """Return EfficientNet-Lite0 with its packaged weights and 1000 classes, for images of 256 pixels."""
    chosen = configured(PACKAGED_NETWORK, weights="DEFAULT", info=dataset(classes=1000, size=256), input_size=224)
    classifier = build(chosen)
    assert load_pretrained(classifier, config=chosen, md5=None) == []
    return classifier.eval(), chosen


def test_the_packaged_weights_are_mapped_to_the_names_of_timm(pretrained: tuple[Classifier, ModelConfig]) -> None:
    stored = torch.load(packaged_weights_file(), weights_only=True)
    tensors = pretrained[0].network.state_dict()
    names = {
        "_conv_stem.weight": "conv_stem.weight",
        "_bn0.running_var": "bn1.running_var",
        "_blocks.1._expand_conv.weight": "blocks.1.0.conv_pw.weight",
        "_blocks.1._bn2.bias": "blocks.1.0.bn3.bias",
        "_blocks.15._project_conv.weight": "blocks.6.0.conv_pwl.weight",
        "_conv_head.weight": "conv_head.weight",
        "_fc.bias": "classifier.bias",
    }
    assert all(torch.equal(stored[theirs], tensors[name]) for theirs, name in names.items())
    assert len(stored) == len(tensors) == 296


def drawing(size: int) -> Any:
    """Return smooth waves of three colors, (1, size, size, 3) uint8, which depend on nothing but the size."""
    rows, columns = np.meshgrid(*[np.linspace(0, 1, size)] * 2, indexing="ij")
    waves = [np.sin(2 * np.pi * (a * rows + b * columns)) for a, b in ((3, 1), (1, 4), (5, 5))]
    return np.stack([127.5 + 127.5 * wave for wave in waves], 2).round().astype(np.uint8)[None]


def test_the_packaged_weights_give_known_logits(pretrained: tuple[Classifier, ModelConfig]) -> None:
    classifier, chosen = pretrained
    split = Split.of(drawing(256), np.zeros(1, np.int64), mean=chosen.mean, std=chosen.std)
    logits = logits_of(classifier, split, batch_size=1)[0]
    assert logits.topk(3).indices.tolist() == GOLDEN_CLASSES
    assert logits.topk(3).values.tolist() == pytest.approx(GOLDEN_LOGITS, abs=1e-3)


@pytest.mark.parametrize(("photograph", "expected"), [("flower", 985), ("china", 698)])  # daisy, palace
def test_the_packaged_weights_know_what_a_photograph_shows(
    pretrained: tuple[Classifier, ModelConfig], photograph: str, expected: int
) -> None:
    classifier, chosen = pretrained
    content = encoded(load_sample_image(f"{photograph}.jpg"))
    pixels = decode(content, image_size=256, channels=3, resize="crop")
    probabilities = class_probabilities(classifier, pixels[None].copy(), config=chosen)[0]
    assert probabilities.argmax() == expected
    assert probabilities[expected] > 0.2


@pytest.mark.slow
def test_the_head_of_the_packaged_weights_is_replaced_for_other_classes() -> None:
    chosen = configured(PACKAGED_NETWORK, weights="DEFAULT", info=dataset(), input_size=None)
    assert load_pretrained(build(chosen), config=chosen, md5=None) == ["classifier.weight", "classifier.bias"]


def test_damaged_packaged_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray(packaged_weights_file().read_bytes())
    content[9_000_000] ^= 1
    (tmp_path / "damaged.pth").write_bytes(content)
    monkeypatch.setattr(packaged, "WEIGHTS_FILE", tmp_path / "damaged.pth")
    values = compose("digits", {"train.model": PACKAGED_NETWORK, "train.weights": "DEFAULT"})
    for read in (lambda: read_timm_weights(PACKAGED_NETWORK, md5=None), lambda: check_inputs(values)):
        with pytest.raises(UserError, match=rf"damaged\.pth has SHA-256 .*; allowed: {packaged.WEIGHTS_SHA256}"):
            read()


def test_a_missing_package_is_reported_before_a_flow_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "PACKAGE", "no-such-package")
    values = compose("digits", {"train.model": PACKAGED_NETWORK, "train.weights": "DEFAULT"})
    with pytest.raises(UserError, match=r"the package no-such-package is not installed .*; delete \.venv"):
        check_inputs(values)


def test_packaged_weights_with_another_md5_than_the_parameter_are_refused() -> None:
    with pytest.raises(UserError, match=r"train\.weights_md5 is 0{32}, but "):
        read_timm_weights(PACKAGED_NETWORK, md5="0" * 32)


# weights in a file


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_of_weights_is_loaded_and_the_head_replaced(tmp_path: Path, suffix: str) -> None:
    path, donor = tmp_path / f"weights{suffix}", timm.create_model("test_resnet").state_dict()
    save_file(donor, path) if suffix == ".safetensors" else torch.save(donor, path)
    chosen = configured(SMALL, weights=str(path), info=dataset())
    classifier = build(chosen)
    assert load_pretrained(classifier, config=chosen, md5=file_md5(path)) == ["fc.weight", "fc.bias"]
    assert torch.equal(classifier.network.state_dict()["conv1.0.weight"], donor["conv1.0.weight"])
