from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.artifacts import file_md5
from pipeline.core.errors import UserError
from pipeline.models.build import OWN_NETWORKS, Classifier, build, try_training
from pipeline.models.config import ModelConfig
from pipeline.models.files import load_model, save_config, save_weights
from pipeline.models.lenet import LeNet
from pipeline.models.pretrained import load_pretrained


def config(model: str = "lenet", *, classes: int = 10, channels: int = 3, **changes: object) -> ModelConfig:
    values = {
        "model": model,
        "weights": None,
        "loss": "cross_entropy",
        "class_names": tuple(map(str, range(classes))),
        "image_size": 32,
        "input_size": None,
        "channels": channels,
        "resize": "crop",
        "mean": (0.5,) * channels,
        "std": (0.2,) * channels,
    }
    return ModelConfig.model_validate(values | changes)


def test_lenet_is_the_network_of_the_material() -> None:
    shapes = [tuple(p.shape) for p in LeNet(num_classes=10, channels=3, image_size=32).parameters() if p.ndim > 1]
    assert shapes == [(6, 3, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84)]


@pytest.mark.parametrize(("size", "channels"), [(16, 1), (28, 1), (33, 3), (64, 3)])
def test_lenet_adapts_to_size_and_channels(size: int, channels: int) -> None:
    network = LeNet(num_classes=4, channels=channels, image_size=size)
    assert network(torch.zeros(2, channels, size, size)).shape == (2, 4)


def test_lenet_refuses_images_too_small_for_it() -> None:
    with pytest.raises(UserError, match="at least 16 pixels, found 12; raise normalize"):
        build(config(image_size=12))


def test_a_residual_network_keeps_the_resolution_of_small_images() -> None:
    network = build(config("resnet18")).network
    features = torch.nn.Sequential(*list(network.children())[:-2])(torch.zeros(1, 3, 32, 32))
    assert features.shape == (1, 512, 4, 4)


def test_a_pretrained_residual_network_keeps_its_first_kernel() -> None:
    assert build(config("resnet18", weights="x.pth")).network.conv1.weight.shape == (64, 3, 7, 7)  # type: ignore[union-attr]


def test_networks_for_color_images_accept_gray_images() -> None:
    network = build(config("resnet18", channels=1))
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 10)


def test_input_size_enlarges_the_images_for_the_network() -> None:
    input_shapes: list[torch.Size] = []
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 48 * 48, 2))
    network.register_forward_pre_hook(lambda module, arguments: input_shapes.append(arguments[0].shape))
    Classifier(network, num_classes=2, network_channels=3, input_size=48)(torch.zeros(1, 3, 32, 32))
    assert input_shapes == [torch.Size([1, 3, 48, 48])]


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5", "efficientnet_b0"])
def test_torchvision_models_work_by_name(name: str) -> None:
    assert build(config(name, image_size=64, classes=5))(torch.zeros(2, 3, 64, 64)).shape == (2, 5)


def test_auxiliary_outputs_are_left_out() -> None:
    network = build(config("googlenet", image_size=64, classes=3)).train()
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


def test_a_vision_transformer_takes_the_size_of_the_images() -> None:
    assert build(config("vit_b_16", classes=2))(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


def test_an_unknown_model_suggests_close_names() -> None:
    own = ", ".join(OWN_NETWORKS)
    with pytest.raises(UserError, match=rf"train.model is 'resnet81'; allowed: {own}, .*did you mean resnet18"):
        build(config("resnet81"))


def test_the_error_about_an_image_size_names_the_parameter_to_set() -> None:
    with pytest.raises(UserError, match=r"alexnet cannot take images of 32 pixels .*set train\.input_size") as error:
        build(config("alexnet"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_pretrained_weights_are_loaded_and_the_head_is_replaced(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    donor = build(config("resnet18", classes=1000, weights=str(path))).network.state_dict()
    save_file(donor, path) if suffix == ".safetensors" else torch.save(donor, path)
    chosen = config("resnet18", classes=4, weights=str(path))
    classifier = build(chosen)
    assert load_pretrained(classifier, config=chosen, md5=file_md5(path)) == ["fc.weight", "fc.bias"]
    assert torch.equal(classifier.network.state_dict()["conv1.weight"], donor["conv1.weight"])


def test_weights_of_a_model_file_of_the_pipeline_are_loaded(tmp_path: Path) -> None:
    donor = build(config(classes=7))
    save_weights(donor, tmp_path / "best.safetensors")
    md5 = file_md5(tmp_path / "best.safetensors")
    chosen = config(classes=3, weights=str(tmp_path / "best.safetensors"))
    assert load_pretrained(build(chosen), config=chosen, md5=md5) == ["11.weight", "11.bias"]


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "lenet.safetensors"
    save_file(LeNet(num_classes=10, channels=3, image_size=32).state_dict(), path)
    chosen = config("resnet18", weights=str(path))
    with pytest.raises(
        UserError, match=r"lenet\.safetensors: found no conv1\.weight, but train\.model resnet18 has it"
    ):
        load_pretrained(build(chosen), config=chosen, md5=file_md5(path))


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (eval, ("__import__('pathlib').Path('pwned').touch()",))


def test_a_pickle_in_a_weights_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": Malicious()}, tmp_path / "bad.pth")
    chosen = config("resnet18", weights="bad.pth")
    with pytest.raises(UserError, match=r"bad\.pth: not readable as weights") as error:
        load_pretrained(build(chosen), config=chosen, md5=file_md5(Path("bad.pth")))
    assert "\n" not in str(error.value)
    assert not Path("pwned").exists()


def test_weights_without_their_md5_are_refused(tmp_path: Path) -> None:
    save_weights(build(config()), tmp_path / "best.safetensors")
    chosen = config(weights=str(tmp_path / "best.safetensors"))
    with pytest.raises(
        UserError, match=r"train\.weights_md5 is null, but .*best\.safetensors has [0-9a-f]{32}; set it"
    ):
        load_pretrained(build(chosen), config=chosen, md5=None)


def test_only_the_head_may_keep_its_random_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    donor = build(config("resnet18", classes=64, weights="any.pth")).network.state_dict()
    save_file(donor | {"conv1.weight": torch.zeros(64, 3, 3, 3)}, path)
    chosen = config("resnet18", classes=64, weights=str(path))
    with pytest.raises(UserError, match=r"found conv1\.weight of shape \(64, 3, 3, 3\), but train\.model resnet18"):
        load_pretrained(build(chosen), config=chosen, md5=file_md5(path))


def test_a_batch_too_small_for_batch_normalization_is_refused() -> None:
    chosen = config("resnet18", image_size=8)
    with pytest.raises(UserError, match=r"cannot take images of 8 pixels in batches of 1 .*raise batch_size"):
        try_training(build(chosen), config=chosen, batch_size=1)


@pytest.mark.parametrize("name", ["absent.pth", "absent.safetensors"])
def test_missing_weights_are_reported(name: str) -> None:
    chosen = config(weights=name)
    with pytest.raises(UserError, match=f"train.weights: no such file {name}; allowed"):
        load_pretrained(build(chosen), config=chosen, md5=None)


def test_lenet_has_no_default_weights() -> None:
    chosen = config(weights="DEFAULT")
    with pytest.raises(UserError, match="lenet has no pretrained weights"):
        load_pretrained(build(chosen), config=chosen, md5=None)


def test_a_saved_model_is_loaded_unchanged(tmp_path: Path) -> None:
    classifier = build(config("resnet18"))
    save_weights(classifier, tmp_path / "best.safetensors")
    save_config(config("resnet18"), tmp_path)
    loaded, read = load_model(tmp_path)
    images = torch.rand(3, 3, 32, 32)
    assert torch.equal(loaded(images), classifier.eval()(images))
    assert read == config("resnet18")


@pytest.mark.parametrize("kept", [0, 7, 1000])
def test_a_damaged_model_file_is_reported(tmp_path: Path, kept: int) -> None:
    save_weights(build(config()), tmp_path / "best.safetensors")
    save_config(config(), tmp_path)
    content = (tmp_path / "best.safetensors").read_bytes()
    (tmp_path / "best.safetensors").write_bytes(content[:kept])
    with pytest.raises(UserError, match=r"best\.safetensors: damaged"):
        load_model(tmp_path)
