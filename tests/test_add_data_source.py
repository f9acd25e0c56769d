"""Adding a data source touches six files, tests and recipe included, as one that is added to a copy shows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.artifacts import read_csv
from tests.conftest import PROJECT, copy_project

MODULE = '''"""Squares, disks and crosses of random size and place: 32x32 pixels, drawn here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artifacts import read_array, write_array
from pipeline.datasets.source import Description, Source, array_blocks, choose_channels
from pipeline.params import DownloadParams, NormalizeParams

CLASS_NAMES = ("square", "disk", "cross")
NUM_IMAGES = 300


def download(folder: Path, *, params: DownloadParams) -> Mapping[str, Any]:  # noqa: ARG001  # as in all sources
    """Write `images.npy`, (300, 32, 32) uint8, and `labels.npy`, (300,) int64."""
    draw = np.random.default_rng(0)
    labels = np.arange(NUM_IMAGES) % len(CLASS_NAMES)
    images = np.stack([_shape(label, draw) for label in labels])
    write_array(folder / "images.npy", [images], shape=images.shape, dtype=np.uint8)
    write_array(folder / "labels.npy", [labels], shape=labels.shape, dtype=np.int64)
    print(f"shapes: {NUM_IMAGES} images of 32x32 pixels")
    return {}


def _shape(label: int, draw: np.random.Generator) -> Any:
    radius, (x, y) = draw.integers(4, 9), draw.integers(10, 22, 2)
    across, down = np.abs(np.arange(32) - x)[np.newaxis], np.abs(np.arange(32) - y)[:, np.newaxis]
    inside = (
        np.maximum(across, down) <= radius,
        across**2 + down**2 <= radius**2,
        (np.minimum(across, down) <= 1) & (np.maximum(across, down) <= radius),
    )[label]
    return np.where(inside, draw.integers(150, 256), draw.integers(0, 100, (32, 32))).astype(np.uint8)


def open_shapes(folder: Path, *, description: Description, params: NormalizeParams) -> Source:
    """Return the images as they were drawn."""
    images = read_array(folder / "images.npy", dtype=np.uint8, dimensions=3)
    labels = read_array(folder / "labels.npy", dtype=np.int64, dimensions=1)
    channels = choose_channels(params, native=1)
    blocks = array_blocks(
        images, labels, split="train", prefix="shapes", image_size=params.image_size, channels=channels
    )
    return Source(description.dataset, CLASS_NAMES, channels, num_files=len(images), blocks=blocks)
'''
TEST = '''"""The shapes are drawn, and read as they were drawn."""

from pathlib import Path

from pipeline.datasets.sources import open_source
from pipeline.download import download
from tests.conftest import params


def test_shapes_are_read_as_they_were_drawn(tmp_path: Path) -> None:
    chosen = params(download__dataset="shapes")
    download(chosen.download, folder=tmp_path / "raw")
    source = open_source(tmp_path / "raw", params=chosen.normalize)
    (block,) = source.blocks
    assert source.class_names == ("square", "disk", "cross")
    assert block.images.shape == (300, 32, 32, 1)
    assert block.labels[:4].tolist() == [0, 1, 2, 0]
'''
RECIPE = """# Squares, disks and crosses, drawn here: the whole pipeline in seconds, without a download.
download:
  dataset: shapes
train:
  epochs: 1
"""
NEW_FILES = {"pipeline/datasets/shapes.py": MODULE, "recipes/shapes.yaml": RECIPE, "tests/test_shapes.py": TEST}
# The old and the new text in each file that lists the data sources.
REPLACEMENTS = {
    "pipeline/datasets/sources.py": [
        ("import cifar10, digits, imagefolder\n", "import cifar10, digits, imagefolder, shapes\n"),
        (
            "imagefolder.open_imagefolder),\n",
            'imagefolder.open_imagefolder),\n    "shapes": _DataSource(shapes.download, shapes.open_shapes),\n',
        ),
    ],
    "pipeline/params.py": [
        ('Literal["digits", "cifar10", "imagefolder"]', 'Literal["digits", "cifar10", "imagefolder", "shapes"]'),
        ("cifar10 (fetched), or imagefolder (your own images)", "cifar10 (fetched), imagefolder (your own), or shapes"),
    ],
    "params.yaml": [("# digits | cifar10 | imagefolder\n", "# digits | cifar10 | imagefolder | shapes\n")],
}


def add_shapes(project: Path) -> None:
    for name, content in NEW_FILES.items():
        (project / name).write_text(content, encoding="utf-8")
    for name, replacements in REPLACEMENTS.items():
        text = (project / name).read_text(encoding="utf-8")
        for old, new in replacements:
            assert text.count(old) == 1, f"{name}: {old!r}"
            text = text.replace(old, new)
        (project / name).write_text(text, encoding="utf-8")


def run(project: Path, *arguments: str) -> str:
    variables = {"PYTHONPATH": str(project), "MLFLOW_TRACKING_URI": f"sqlite:///{project.parent}/mlflow.db"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=project, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_adding_a_data_source_touches_six_files(tmp_path: Path, mlflow_store: Path) -> None:
    project = copy_project(tmp_path / "project")
    (tmp_path / "mlflow.db").write_bytes((mlflow_store / "mlflow.db").read_bytes())
    add_shapes(project)
    status = ["git", "status", "--porcelain", "--untracked-files=all"]
    touched = subprocess.run(status, cwd=project, capture_output=True, text=True, check=True).stdout.splitlines()
    assert {line[3:] for line in touched} == NEW_FILES.keys() | REPLACEMENTS.keys()
    assert len(touched) <= 6
    tests = ("tests/test_shapes.py", "tests/test_params.py", "tests/test_architecture.py")
    run(project, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests)
    run(project, "-m", "pipeline.recipes", "--recipe", "shapes")
    for step in ("download", "normalize", "train"):
        run(project, "-m", f"pipeline.{step}")
    info = json.loads((project / "artifacts/normalize/dataset.json").read_text())
    assert (info["dataset"], info["class_names"]) == ("shapes", ["square", "disk", "cross"])
    assert len(read_csv(project / "artifacts/train/history.csv")) == 1


def test_no_other_file_lists_the_data_sources() -> None:
    listed = [
        str(path.relative_to(PROJECT))
        for folder in ("pipeline", "flows")
        for path in (PROJECT / folder).rglob("*.py")
        if all(f'"{name}"' in path.read_text(encoding="utf-8") for name in ("digits", "cifar10", "imagefolder"))
    ]
    assert sorted(listed) == ["pipeline/datasets/sources.py", "pipeline/params.py"]
