"""The parts of the report: baseline, words, commands, names of images, pictures."""

import base64
import io
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.evaluation.intervals import wilson_interval
from pipeline.reporting.baseline import compare, find_baseline
from pipeline.reporting.commands import commands, run_command
from pipeline.reporting.data import shown_names
from pipeline.reporting.facts import RunFacts
from pipeline.reporting.gallery import encode
from pipeline.reporting.text import duration, percent, reason, size
from pipeline.tracking.run_title import RunSetup

METRICS = {"accuracy": 0.9, "accuracy_low": 0.84, "accuracy_high": 0.94, "loss": 0.3, "test_images": 150}
DATA = {"test_images.npy": "1", "test_labels.npy": "2"}


def commit(folder: Path, metrics: Mapping[str, Any], data: Mapping[str, str]) -> None:
    deps = [{"path": f"artifacts/normalize/{name}", "md5": md5} for name, md5 in data.items()]
    (folder / "artifacts/evaluate").mkdir(parents=True)
    (folder / "artifacts/evaluate/metrics.json").write_text(json.dumps(metrics))
    (folder / "dvc.lock").write_text(json.dumps({"stages": {"evaluate": {"deps": deps}}}))
    start = ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "Start"]
    for command in (["init", "-q"], ["add", "."], start):
        subprocess.run(["git", *command], cwd=folder, check=True)


def test_numbers_are_not_rounded_to_certainty() -> None:
    assert [percent(value).replace("\u00a0", " ") for value in (0.0, 0.00001, 0.5, 0.99999, 1.0)] == [
        "0.0 %",
        "< 0.1 %",
        "50.0 %",
        "> 99.9 %",
        "100.0 %",
    ]
    assert (duration(None), size(248_123)) == ("unknown", "248\u00a0kB")


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("highest validation accuracy", "it has the highest validation accuracy"),
        ("lowest validation loss of 7 with the highest macro F1", "the lowest validation loss of the 7 epochs that ha"),
        ("latest of 2 with the lowest validation loss", "it is the last of 2 epochs that have the lowest validation "),
        ("latest of 5 in the 95% interval of the highest validation accuracy, 97.1%", "as good as the one of the high"),
        ("latest of 1 in the 95% interval of the highest validation accuracy, 97.1%", "no other epoch is as good"),
        ("of a later version", "of a later version"),
    ],
)
def test_the_reason_for_the_selected_epoch_is_a_sentence(text: str, meaning: str) -> None:
    assert meaning in reason(text)


@pytest.mark.parametrize(
    ("name", "dataset", "shown"),
    [
        ("train/ants/17.jpg", {"dataset": "imagefolder", "groups": {"drawn_splits": ["test"]}}, "ants/17.jpg"),
        ("train/train/1.jpg", {"dataset": "imagefolder", "groups": {"drawn_splits": ["test"]}}, "train/1.jpg"),
        ("test/ants/1.jpg", {"dataset": "imagefolder", "groups": {"drawn_splits": ["validation"]}}, "test/ants/1.jpg"),
        ("train/ants/1.jpg", {"dataset": "imagefolder"}, "train/ants/1.jpg"),
        ("digits/01573", {"dataset": "digits"}, "image 1573"),
        ("digits/00000", {"dataset": "digits"}, "image 0"),
        ("test_batch/00012", {"dataset": "cifar10"}, "image 12 of test_batch"),
    ],
)
def test_the_name_of_an_image_is_its_path_in_the_folder_or_its_number(
    name: str, dataset: dict[str, Any], shown: str
) -> None:
    assert shown_names([name], dataset=dataset) == [shown]


@pytest.mark.parametrize(
    ("setup", "command"),
    [
        (("digits", "", {}), "make run RECIPE=digits"),
        (
            ("digits", "", {"train.epochs": (20, 3), "train.seed": (0, 1)}),
            'RECIPE=digits SET="train.epochs=3 train.seed=1"',
        ),
        (("my_images", "a b", {"download.folder": ("data", "/a b")}), 'make run IMAGES="/a b"'),
        (("my_images", "$x", {"download.folder": ("data", "/$x")}), "make run IMAGES='/$x'"),
        (
            ("digits", "", {"train.weights": (None, "a $b")}),
            "--recipe digits --set 'train.weights=a $b'",
        ),
    ],
)
def test_the_command_for_a_new_experiment_has_what_differs(setup: tuple[Any, ...], command: str) -> None:
    assert run_command(RunSetup(*setup)).endswith(command)


def test_the_page_of_an_experiment_says_how_to_copy_its_files_first() -> None:
    output = Path("artifacts/reports/e-1.html")
    found = [command for _, command in commands(RunFacts(experiment="e-1"), output=output)]
    assert found == [
        ".venv/bin/dvc exp apply e-1",
        ".venv/bin/dvc repro",
        ".venv/bin/python -m pipeline.report --output artifacts/reports/e-1.html",
    ]


def test_pictures_are_encoded_without_metadata(tmp_path: Path) -> None:
    for pixels, kind in ((32, "PNG"), (300, "WEBP")):
        uri = encode(np.random.default_rng(0).integers(0, 255, (pixels, pixels, 3), dtype=np.uint8), max_size=112)
        picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        assert (picture.format, max(picture.size)) == (kind, min(pixels, 112))
        assert not picture.getexif()
        assert not {"exif", "xmp", "icc_profile"} & set(picture.info)


def test_the_interval_of_the_difference_is_that_of_newcombe() -> None:
    """Newcombe 1998 (the paper on differences), table II, method 10: 56/70 and 48/80."""
    low, high = wilson_interval(56, 70)
    metrics = {"accuracy": 56 / 70, "accuracy_low": low, "accuracy_high": high}
    found = compare(metrics, accuracy=48 / 80, number=80, commit="c")
    assert (found.difference_low, found.difference_high) == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_the_baseline_is_the_committed_accuracy_on_the_same_images(tmp_path: Path) -> None:
    commit(tmp_path, {**METRICS, "accuracy": 0.5, "loss": 0.9}, DATA)
    found = find_baseline(METRICS, data_md5=DATA, folder=tmp_path).comparison
    assert found
    assert (found.accuracy, found.is_significant) == (0.5, True)
    assert found.difference == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("metrics", "data", "reason"),
    [
        (METRICS, DATA, "these are the results in the commit"),
        ({**METRICS, "loss": 1}, {**DATA, "test_images.npy": "3"}, "are of other test images"),
        ({"accuracy": "x"}, DATA, "cannot be read"),
    ],
)
def test_without_a_baseline_the_reason_is_stated(
    metrics: dict[str, Any], data: dict[str, str], reason: str, tmp_path: Path
) -> None:
    commit(tmp_path, metrics, data)
    found = find_baseline(METRICS, data_md5=DATA, folder=tmp_path)
    assert found.comparison is None
    assert reason in found.reason
