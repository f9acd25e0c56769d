"""Networks of timm: names, pretrained weights from a package, a file or the hub, and the preparation of their input."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from flows.checks import check_inputs
from pipeline.arrays import DatasetInfo, Split
from pipeline.artifacts import file_md5, read_csv, read_json
from pipeline.core.errors import UserError
from pipeline.core.yaml import dump_yaml
from pipeline.models import packaged
from pipeline.models.build import Classifier, build
from pipeline.models.config import ModelConfig, configure
from pipeline.models.files import load_model, save_config, save_weights
from pipeline.models.inference import class_probabilities, logits_of
from pipeline.models.names import check_network_name, timm_network_names
from pipeline.models.packaged import PACKAGED_NETWORK, packaged_weights_file
from pipeline.models.preparation import fit_to_size
from pipeline.models.pretrained import load_pretrained
from pipeline.models.timm import read_timm_weights
from pipeline.params import Channels
from pipeline.recipes import compose
from pipeline.tracking.models import _requirements
from pipeline.training.loop import train
from tests.conftest import DEFAULTS, PROJECT, colored_images, run_step, train_params, write_normalized
from tests.test_model import config

SMALL = "timm/test_resnet"  # 0.4 million parameters
# the largest logits of EfficientNet-Lite0 for `drawing(256)`
GOLDEN_CLASSES = [906, 885, 772]
GOLDEN_LOGITS = [7.2566, 5.7437, 5.5112]


def dataset(*, classes: int = 3, size: int = 32, channels: Channels = 3) -> DatasetInfo:
    return DatasetInfo.model_validate(
        {
            "dataset": "imagefolder",
            "class_names": tuple(map(str, range(classes))),
            "image_size": size,
            "channels": channels,
            "resize": "crop",
            "mean": (0.4,) * channels,
            "std": (0.2,) * channels,
            "counts": {"train": {}, "validation": {}, "test": {}},
            "test_duplicates": (),
            "md5": "",
        }
    )


def configured(model: str, *, weights: str | None, info: DatasetInfo, input_size: int | None = None) -> ModelConfig:
    return configure(train_params(model=model, weights=weights, input_size=input_size), info)


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


# weights from the hub


class Hub(http.server.BaseHTTPRequestHandler):
    """A server that answers as the Hugging Face hub does for one file; other files and private ones do not exist."""

    protocol_version = "HTTP/1.1"
    content = b""
    requests: list[tuple[str, str, Mapping[str, str]]]

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        self.requests.append((self.command, self.path, dict(self.headers)))
        is_known = self.path == "/timm/test_resnet.r160_in1k/resolve/main/model.safetensors"
        self.send_response(200 if is_known else 401)
        if not is_known:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("ETag", '"0123456789abcdef"')
        self.send_header("X-Repo-Commit", "0123456789abcdef0123456789abcdef01234567")
        self.send_header("X-Linked-Size", str(len(self.content)))
        self.send_header("Content-Length", str(len(self.content) if is_known else 0))
        self.end_headers()
        if with_body and is_known:
            self.wfile.write(self.content)


@contextmanager
def served(content: bytes) -> Iterator[tuple[str, list[tuple[str, str, Mapping[str, str]]]]]:
    """Serve the content as a hub does; yield the address and the list of requests."""
    handler = type("Handler", (Hub,), {"content": content, "requests": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.requests  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()


READ_WEIGHTS = """
import json, sys
from pipeline.models.timm import read_timm_weights
for name, md5 in json.loads(sys.argv[1]):
    try:
        print(len(read_timm_weights(name, md5=md5)))
    except Exception as error:
        print(type(error).__name__, error)
"""


def read_from_hub(address: str, cache: Path, *reads: tuple[str, str | None]) -> list[str]:
    """Read the default weights of networks in a process of their own; return a line for each."""
    done = subprocess.run(
        [sys.executable, "-c", READ_WEIGHTS, json.dumps(reads)],
        cwd=PROJECT,
        env={**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_TOKEN": "secret", "NO_PROXY": "*"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert not done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_weights_from_the_hub_are_trusted_by_their_md5_only(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), file)
    md5 = file_md5(file)
    with served(file.read_bytes()) as (address, requests):
        reads = [(SMALL, None), (SMALL, "0" * 32), (SMALL, md5), ("timm/test_vit", None)]
        unknown, wrong, right, private = read_from_hub(address, tmp_path / "cache", *reads)
    assert unknown.startswith("UserError train.weights_md5 is null, but ")
    assert unknown.endswith(f"model.safetensors has {md5}; set it to that if you trust the file")
    assert wrong.startswith(f"UserError train.weights_md5 is {'0' * 32}, but ")
    assert right == str(len(timm.create_model("test_resnet").state_dict()))
    assert private.startswith(f"UserError train.weights DEFAULT: {address}/timm/test_vit.r160_in1k/resolve/main/")
    # one download, and neither the token nor the versions of packages are sent
    assert [path for method, path, _ in requests if method == "GET"] == [
        "/timm/test_resnet.r160_in1k/resolve/main/model.safetensors"
    ]
    assert not [headers for _, _, headers in requests if "secret" in str(headers) or "torch/" in str(headers)]
    # another file with a trusted MD5
    md5_of_page = hashlib.md5(b"<html>", usedforsecurity=False).hexdigest()
    with served(b"<html>") as (address, _):
        (page,) = read_from_hub(address, tmp_path / "another cache", (SMALL, md5_of_page))
    assert "model.safetensors is not readable as .safetensors (" in page
    # a file that was downloaded needs no connection; without it, the remedy is a local file
    right, absent = read_from_hub(address, tmp_path / "cache", (SMALL, md5), ("timm/test_vit", None))
    assert right.isdigit()
    assert absent.startswith(f"TemporaryError train.weights DEFAULT: {address}/timm/test_vit.r160_in1k/")
    assert absent.endswith("without internet, copy that file here and name it in train.weights")


@pytest.mark.parametrize(("model", "is_allowed"), [(SMALL, True), ("resnet18", False)])
def test_default_weights_have_an_md5_only_where_timm_downloads_them(model: str, is_allowed: bool) -> None:
    values = {"model": model, "weights": "DEFAULT", "weights_md5": "0" * 32}
    if is_allowed:
        assert train_params(**values).weights_md5 == "0" * 32
    else:
        with pytest.raises(UserError, match="weights_md5 is set, but weights is DEFAULT"):
            train_params(**values)


# preparation of the input


@pytest.mark.parametrize(
    ("model", "weights", "expected"),
    [
        (PACKAGED_NETWORK, "DEFAULT", (127 / 255, 128 / 255, "bicubic", 0.875)),
        (PACKAGED_NETWORK, "x.safetensors", (0.5, 0.5, "bicubic", 0.875)),
        (SMALL, "DEFAULT", (0.5, 0.5, "bilinear", 0.95)),
        ("resnet18", "DEFAULT", (0.485, 0.229, "bilinear", 224 / 256)),
        ("resnet18", "x.pth", (0.485, 0.229, "bilinear", 224 / 256)),
        ("resnet18", None, (0.4, 0.2, "bilinear", 1.0)),
        (SMALL, None, (0.4, 0.2, "bilinear", 1.0)),
        ("lenet", "x.pth", (0.4, 0.2, "bilinear", 1.0)),
    ],
)
def test_pretrained_weights_decide_how_the_input_is_prepared(
    model: str, weights: str | None, expected: tuple[float, float, str, float]
) -> None:
    chosen = configured(model, weights=weights, info=dataset())
    assert (chosen.mean[0], chosen.std[0], chosen.interpolation, chosen.crop_fraction) == pytest.approx(expected)


def test_gray_images_are_prepared_with_the_mean_of_the_colors() -> None:
    chosen = configured("resnet18", weights="DEFAULT", info=dataset(channels=1))
    assert chosen.mean == pytest.approx([(0.485 + 0.456 + 0.406) / 3])
    assert chosen.std == pytest.approx([(0.229 + 0.224 + 0.225) / 3])


def test_images_of_the_size_before_the_crop_are_only_cropped() -> None:
    images = torch.rand(2, 3, 256, 256)
    fitted = fit_to_size(images, size=224, interpolation="bicubic", crop_fraction=0.875)
    assert torch.equal(fitted, images[:, :, 16:240, 16:240])


def test_images_of_the_size_of_the_network_are_unchanged() -> None:
    images = torch.rand(2, 3, 224, 224)
    assert fit_to_size(images, size=224, interpolation="bicubic", crop_fraction=0.875) is images


def test_other_images_are_resized_with_the_interpolation_of_the_network_and_cropped() -> None:
    images = torch.rand(2, 3, 100, 100)
    resized = torch.nn.functional.interpolate(images, size=(64, 64), mode="bicubic", antialias=True)
    fitted = fit_to_size(images, size=56, interpolation="bicubic", crop_fraction=0.875)
    assert torch.equal(fitted, resized[:, :, 4:60, 4:60])


def test_a_model_file_from_before_these_fields_has_no_crop(tmp_path: Path) -> None:
    save_config(config(), tmp_path)
    values = read_json(tmp_path / "model.json")
    old: Mapping[str, Any] = {k: v for k, v in values.items() if k not in ("interpolation", "crop_fraction")}
    (tmp_path / "model.json").write_text(json.dumps(old))
    save_weights(build(config()), tmp_path / "best.safetensors")
    read = load_model(tmp_path)[1]
    assert (read.interpolation, read.crop_fraction) == ("bilinear", 1.0)


def test_a_split_for_evaluation_is_normalized_as_predict_does_it(tmp_path: Path) -> None:
    folder = write_normalized(tmp_path, size=64)
    info = DatasetInfo.read(folder)
    chosen = configured(SMALL, weights="x.pth", info=info, input_size=32)
    classifier = build(chosen).eval()
    split = Split.read("test", info=info, mean=chosen.mean, std=chosen.std, folder=folder)
    expected = logits_of(classifier, split, batch_size=30).softmax(1).numpy()
    assert np.array_equal(class_probabilities(classifier, split.images.numpy(), config=chosen), expected)
    of_dataset = Split.read("test", info=info, folder=folder)
    assert not np.array_equal(logits_of(classifier, of_dataset, batch_size=30).softmax(1).numpy(), expected)


@pytest.mark.slow
def test_evaluate_predict_and_the_recorded_model_agree_for_a_pretrained_network(workspace: Path) -> None:
    images = np.load(write_normalized(workspace, size=64) / "test_images.npy")
    save_file(timm.create_model("test_resnet").state_dict(), "weights.safetensors")
    values: dict[str, Any] = json.loads(json.dumps(DEFAULTS))
    chosen = {"model": SMALL, "weights": "weights.safetensors", "weights_md5": file_md5(Path("weights.safetensors"))}
    values["train"] |= {**chosen, "input_size": 48, "epochs": 1, "batch_size": 16, "learning_rate": 0.003}
    Path("params.yaml").write_text(dump_yaml(values))
    for step in ("train", "evaluate"):
        done = run_step(step)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
    folder = Path("artifacts/train")
    classifier, saved = load_model(folder)
    assert (saved.mean, saved.interpolation, saved.crop_fraction) == ((0.5,) * 3, "bilinear", 0.95)
    probabilities = class_probabilities(classifier, images, config=saved)
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    recorded = mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/model").predict(images)
    np.testing.assert_allclose(recorded.iloc[:, 1:], probabilities, atol=1e-5)
    rows = read_csv(Path("artifacts/evaluate/predictions.csv"))
    assert [row["predicted"] for row in rows] == [saved.class_names[index] for index in probabilities.argmax(1)]
    assert [float(row["probability"]) for row in rows] == pytest.approx(probabilities.max(1), abs=1e-5)
