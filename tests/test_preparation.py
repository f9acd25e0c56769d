"""The input is prepared as pretrained weights expect it, by evaluate, predict and the recorded model alike."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from pipeline.arrays import DatasetInfo, Split
from pipeline.artifacts import file_md5, read_csv, read_json
from pipeline.core.yaml import dump_yaml
from pipeline.models.build import build
from pipeline.models.files import load_model, save_config, save_weights
from pipeline.models.inference import class_probabilities, logits_of
from pipeline.models.packaged import PACKAGED_NETWORK
from pipeline.models.preparation import fit_to_size
from tests.conftest import DEFAULTS, run_step, write_normalized
from tests.pretrained import SMALL, configured, dataset
from tests.test_model import config

NEW_FIELDS = ("interpolation", "crop_fraction", "temperature", "thresholds")


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


def test_a_model_file_from_before_these_fields_has_no_crop_and_no_temperature(tmp_path: Path) -> None:
    save_config(config(), tmp_path)
    values = read_json(tmp_path / "model.json")
    old: Mapping[str, Any] = {k: v for k, v in values.items() if k not in NEW_FIELDS}
    (tmp_path / "model.json").write_text(json.dumps(old))
    save_weights(build(config()), tmp_path / "best.safetensors")
    read = load_model(tmp_path)[1]
    assert (read.interpolation, read.crop_fraction, read.temperature) == ("bilinear", 1.0, None)


def test_a_split_for_evaluation_is_normalized_as_predict_does_it(tmp_path: Path) -> None:
    folder = write_normalized(tmp_path, size=64)
    info = DatasetInfo.read(folder)
    chosen = configured(SMALL, weights="x.pth", info=info, input_size=32)
    classifier = build(chosen).eval()
    split = Split.read("test", info=info, mean=chosen.mean, std=chosen.std, folder=folder)
    expected = logits_of(classifier, split, batch_size=30).double().softmax(1).numpy()
    assert np.array_equal(class_probabilities(classifier, split.images.numpy(), config=chosen), expected)
    of_dataset = Split.read("test", info=info, folder=folder)
    assert not np.array_equal(logits_of(classifier, of_dataset, batch_size=30).double().softmax(1).numpy(), expected)


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
    assert saved.temperature is not None
    probabilities = class_probabilities(classifier, images, config=saved)
    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])  # another test may have set another one
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    recorded = mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/model").predict(images)
    np.testing.assert_allclose(recorded.iloc[:, 1:], probabilities, atol=1e-5)
    rows = read_csv(Path("artifacts/evaluate/predictions.csv"))
    assert [row["predicted"] for row in rows] == [saved.class_names[index] for index in probabilities.argmax(1)]
    assert [float(row["probability"]) for row in rows] == pytest.approx(probabilities.max(1), abs=1e-5)
