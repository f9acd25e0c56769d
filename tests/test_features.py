"""Training on kept features has the same bits, also when it resumes and in several processes."""

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.arrays import Split
from pipeline.artifacts import file_md5, read_split
from pipeline.models.files import load_model
from pipeline.models.inference import class_probabilities
from pipeline.training import batches, features
from pipeline.training.batches import epoch_batches
from pipeline.training.features import find_separable_head, kept_features, select_trained, with_features
from tests.conftest import PROJECT, read_until, start_step, train_params, write_normalized
from tests.frozen import (
    FLIPPED,
    FROZEN,
    UNTIL,
    WEIGHTS,
    as_features,
    divided,
    fit,
    splits,
    timm_classifier,
    write_weights,
)
from tests.test_resume import EVERY_STEP, Project, one_thread  # noqa: F401  # a fixture
from tests.test_train import QUICK, split_of

KILLS = [signal.SIGTERM, signal.SIGKILL]
ALL_LAYERS = {"weights": WEIGHTS, "crop_padding": 0, "ema_decay": 0.9}
RESUMED: dict[str, dict[str, Any]] = {
    "features": FROZEN,
    "flip": FLIPPED,
    "until": UNTIL,
    "average": ALL_LAYERS,
    "all layers": {
        **ALL_LAYERS,
        "layer_decay": 0.8,
        "random_resized_crop": 0.5,
        "color_jitter": 0.2,
        "mixup_alpha": 0.2,
        "cutmix_alpha": 1.0,
    },
}


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


def test_features_larger_than_the_window_are_read_from_their_file_even_if_it_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "BLOCK_BYTES", 16 * 5 * 4)  # 16 images
    split = replace(split_of(40, seed=1), window_bytes=2 * 16 * 5 * 4)
    rows = np.arange(0.25, 40, dtype=np.float32)[:, None].repeat(5, 1)
    np.save(tmp_path / "rows.npy", rows)
    kept = with_features(split, np.load(tmp_path / "rows.npy", mmap_mode="c"))
    (tmp_path / "rows.npy").unlink()
    assert kept.file is not None
    found = [batch for _ in range(2) for batch in epoch_batches(kept, params=train_params(**QUICK, **FROZEN), epoch=1)]
    assert [tuple(rows.shape) for rows, _ in found] == [(16, 5)] * 4
    assert torch.equal(torch.cat([rows for rows, _ in found[:2]]), torch.cat([rows for rows, _ in found[2:]]))
    for rows_found, labels in found:
        assert torch.equal(split.labels[rows_found[:, 0].long()], labels)
        assert torch.all(rows_found % 1 == 0.25)


# the command


@pytest.fixture
def frozen(workspace: Path) -> Callable[..., Project]:
    """Return a function that makes a project whose pretrained LeNet is frozen as in its arguments."""
    return lambda **changes: Project(workspace, weights_md5=write_weights(workspace), **changes)


def outputs() -> dict[str, str]:
    """Return the MD5 of each file that the step wrote, by name."""
    return {path.name: file_md5(path) for path in Path("artifacts/train").iterdir()}


def feature_files() -> list[Path]:
    return sorted(Path(".cache/features").iterdir())


def check_thresholds() -> None:
    """Check the coverages with the whole network, whose logits differ from those of the head by rounding."""
    classifier, config = load_model(Path("artifacts/train"))
    probabilities = class_probabilities(classifier, read_split("validation")[0], config=config).max(1)
    assert config.thresholds
    for coverage, threshold in config.thresholds.items():
        assert (probabilities >= threshold).mean() >= coverage


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
    check_thresholds()

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
    project = frozen(**FROZEN, epochs=1)
    project.finish()
    kept = set(feature_files())
    # the train split alone has other images
    write_normalized(project.folder, train=304)
    output = project.finish()
    assert "features of train: computed for 304 images" in output
    assert "features of validation: read from" in output
    weights = load_file(WEIGHTS)
    weights["0.weight"][0, 0, 0, 0] += 1
    save_file(weights, WEIGHTS)
    md5 = file_md5(Path(WEIGHTS))
    # LeNet has the same weights for images of 32 and 34 pixels
    for changes in ({"weights_md5": md5}, {"weights_md5": md5, "input_size": 34}):
        project.set(**FROZEN, epochs=1, **changes)
        output = project.finish()
        assert "features of train: computed for 304 images" in output
        assert "features of validation: computed for 24 images" in output
    assert kept < set(feature_files())
    assert len(feature_files()) == 7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sent"),
    [*itertools.product(["features", "flip", "until", "all layers"], KILLS), ("average", signal.SIGKILL)],
)
def test_a_training_with_pretrained_weights_resumes_with_the_same_bits(
    frozen: Callable[..., Project], name: str, sent: signal.Signals
) -> None:
    project = frozen(**RESUMED[name], **EVERY_STEP)
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
