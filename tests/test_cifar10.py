"""The whole pipeline runs on the real CIFAR-10 images if their archive lies beside the checkout."""

import functools
import hashlib
import http.server
import json
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.cifar10 import official_files, write_archive
from pipeline.core.yaml import dump_yaml
from pipeline.recipes import compose
from tests.conftest import PROJECT, run_step

IMAGES = PROJECT.parent / "shared" / "data" / "cifar10-jpeg.tar.gz"
pytestmark = pytest.mark.skipif(not IMAGES.exists(), reason=f"{IMAGES} is missing")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the images, and return their folder: `<split>/<class>/0000.jpg`."""
    folder = tmp_path_factory.mktemp("cifar10") / "images"
    with tarfile.open(IMAGES) as archive:
        # Python 3.11.3 and earlier have no filters
        archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, _path: member)
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def official_archive(tree: Path) -> Path:
    """Write a fifth of the images of each class in the layout of the official archive, and return its path."""
    fifth = tree.parent / "fifth"
    for image in tree.rglob("*[05].jpg"):
        link = fifth / image.relative_to(tree)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(image)
    path = tree.parent / "served" / "cifar-10-python.tar.gz"
    path.parent.mkdir()
    write_archive(path, official_files(fifth))
    return path


@pytest.fixture
def server(official_archive: Path) -> Iterator[str]:
    """Serve the archive on loopback, and yield its URL."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(official_archive.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}/{official_archive.name}"
        serving.shutdown()


def run(recipe: str, overrides: dict[str, object], *steps: str) -> None:
    """Run these steps in the current folder with a recipe and overrides."""
    Path("params.yaml").write_text(dump_yaml(compose(recipe, overrides)))
    for step in steps:
        done = run_step(step)
        assert done.returncode == 0, done.stderr


def test_the_whole_pipeline_runs_on_a_folder_of_real_images(workspace: Path, tree: Path) -> None:
    overrides = {"download.dataset": "imagefolder", "download.folder": str(tree), "train.epochs": 1}
    run("cifar10_lenet", overrides, "download", "normalize", "train", "evaluate")
    metrics = json.loads(Path("artifacts/evaluate/metrics.json").read_text())
    info = json.loads(Path("artifacts/normalize/dataset.json").read_text())
    assert metrics["accuracy"] > 0.4
    assert info["mean"] == pytest.approx([0.4913, 0.4821, 0.4465], abs=2e-3)
    assert info["std"] == pytest.approx([0.2452, 0.2428, 0.2606], abs=2e-3)
    train, validation, test = (sum(info["counts"][split].values()) for split in ("train", "validation", "test"))
    assert (train + validation, test) == (50_000, 10_000)
    assert 4_700 < validation < 5_300
    assert info["groups"]["largest"] > 50  # one photograph of a car, many times
    assert 150 < metrics["test_duplicates"] < 400


def test_the_official_layout_over_http_gives_the_same_images(
    workspace: Path, server: str, official_archive: Path
) -> None:
    md5 = hashlib.md5(official_archive.read_bytes(), usedforsecurity=False).hexdigest()
    run("cifar10_lenet", {"download.urls": [server], "download.md5": md5}, "download", "normalize")
    info = json.loads(Path("artifacts/normalize/dataset.json").read_text())
    assert info["class_names"][0] == "airplane"
    train, validation, test = (sum(info["counts"][split].values()) for split in ("train", "validation", "test"))
    assert (train + validation, test) == (10_000, 2_000)
    assert 850 < validation < 1_150
    assert info["mean"] == pytest.approx([0.4913, 0.4821, 0.4465], abs=4e-3)
