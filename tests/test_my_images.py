"""The recipe my_images learns from photographs, with the weights that come with the packages and without a network."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from pipeline.artifacts import read_json
from pipeline.core.yaml import dump_yaml
from pipeline.recipes import compose
from tests.conftest import PROJECT
from tests.raw_folders import encoded

CLASSES = ["china", "flower"]  # the two photographs of scikit-learn, (427, 640, 3) uint8
CROPS_PER_CLASS = 30
# Python imports sitecustomize at its start; connections that do not leave the machine's file system are allowed.
NO_NETWORK = """
import sys
def refuse(event, arguments):
    if event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(arguments[1], tuple)):
        with open("connections.txt", "a") as file:
            print(event, arguments, file=file)
        raise OSError("the network is off")
sys.addaudithook(refuse)
"""


def write_crops(folder: Path) -> None:
    """Write square crops of 120 to 300 pixels at random places of the two photographs, one folder for each."""
    random = np.random.default_rng(0)
    for name in CLASSES:
        photograph = load_sample_image(f"{name}.jpg")
        (folder / name).mkdir(parents=True)
        for number in range(CROPS_PER_CLASS):
            side = random.integers(120, 301)
            top, left = (random.integers(0, length - side + 1) for length in photograph.shape[:2])
            crop = np.ascontiguousarray(photograph[top : top + side, left : left + side])
            (folder / name / f"{number}.jpg").write_bytes(encoded(crop, "JPEG", quality=95))


def run_without_network(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments in the current folder, in which each attempt of a connection is recorded."""
    Path("no_network").mkdir(exist_ok=True)
    Path("no_network/sitecustomize.py").write_text(NO_NETWORK)
    environment = os.environ | {"PYTHONPATH": f"{Path('no_network').resolve()}{os.pathsep}{PROJECT}"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


def succeed(*arguments: str) -> str:
    done = run_without_network(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_my_images_are_learned_without_a_network(workspace: Path, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("my images")
    write_crops(folder)
    values = compose("my_images", {"download.folder": str(folder)})
    (workspace / "params.yaml").write_text(dump_yaml(values), encoding="utf-8")
    output = "".join(succeed("-m", f"pipeline.{step}") for step in ("download", "normalize", "train", "evaluate"))
    assert "weights from DEFAULT; newly drawn: classifier.weight, classifier.bias" in output
    assert "features of train: computed for" in output
    assert read_json(Path("artifacts/evaluate/metrics.json"))["accuracy"] > 0.9
    for name in CLASSES:
        (workspace / f"{name}.jpg").write_bytes(encoded(load_sample_image(f"{name}.jpg"), "JPEG"))
    predicted = succeed("-m", "pipeline.predict", "china.jpg", "flower.jpg").splitlines()
    assert [line.split()[:2] for line in predicted] == [[f"{name}.jpg:", name] for name in CLASSES]
    assert not Path("connections.txt").exists()
    # that file would show a connection
    refused = run_without_network("-c", "import socket; socket.create_connection(('127.0.0.1', 9))")
    assert "the network is off" in refused.stderr
    assert Path("connections.txt").exists()
