"""A small project with DVC experiments that hold only what a comparison reads: `dvc.lock` and files in DVC's cache."""

import hashlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.evaluation.predictions import Predictions, write_predictions
from pipeline.parquet import write_files
from tests.conftest import start_repository

CLASSES = ("cat", "dog")
NUM_IMAGES = 400


def start_project(folder: Path) -> Path:
    """Make a repository in the folder with one commit, whose `dvc.lock` has no model."""
    (folder / ".dvc").mkdir()
    (folder / ".dvc" / "config").touch()
    (folder / ".gitignore").write_text("/.dvc/cache\n/artifacts\n")
    (folder / "params.yaml").write_text("train: {seed: 0}\n")
    (folder / "dvc.lock").write_text("schema: '2.0'\n")
    start_repository(folder)
    return folder


def right_on(first: int, last: int) -> npt.NDArray[np.bool_]:
    """Return which images (NUM_IMAGES,) a model gets right: those from `first` to before `last`."""
    return (np.arange(NUM_IMAGES) >= first) & (np.arange(NUM_IMAGES) < last)


def plant(
    project: Path,
    name: str,
    right: npt.NDArray[np.bool_],
    *,
    params: Mapping[str, Any] = {},
    hashes: Sequence[str] | None = None,
    leaked: Sequence[int] = (),
    trained_on: Sequence[str] = (),
    class_names: Sequence[str] = CLASSES,
    validation_accuracy: float = 0.9,
    validation_loss: float = 0.3,
    code: str = "1" * 32,
    leave_out: Sequence[str] = (),
) -> str:
    """Save a DVC experiment with a model that gets these test images right; return the experiment's commit."""
    cache = _Cache(project)
    predictions = _predictions(right, hashes=hashes, class_names=class_names)
    dataset = {"dataset": "digits", "test_duplicates": list(leaked)}
    history = f"epoch,validation_loss,validation_accuracy,selected\n1,{validation_loss},{validation_accuracy},highest\n"
    arrays = {
        f"{split}_{kind}.npy": b"array" for split in ("train", "validation", "test") for kind in ("images", "labels")
    }
    folders = {
        "artifacts/normalize": {
            "dataset.json": json.dumps(dataset).encode(),
            "train_files.parquet": cache.parquet(lambda path: write_files(path, [_rows(trained_on)])),
            "validation_files.parquet": cache.parquet(lambda path: write_files(path, [_rows(())])),
            **arrays,
        },
        "artifacts/train": {"best.safetensors": name.encode(), "history.csv": history.encode()},
    }
    outs = {path: cache.add_folder(files) for path, files in folders.items()}
    for file in ("predictions.parquet", "validation_predictions.parquet"):
        if file not in leave_out:
            content = cache.parquet(lambda path: write_predictions(path, predictions))
            outs[f"artifacts/evaluate/{file}"] = cache.add(content)
    sections = {"download": {"dataset": "digits", "folder": "x"}, "train": {"seed": 0, **params}}
    stage = {
        "deps": [{"path": "pipeline/train.py", "md5": code}],
        "params": {"params.yaml": sections},
        "outs": [{"path": path, "md5": md5} for path, md5 in outs.items()],
    }
    return _save(project, name, json.dumps({"schema": "2.0", "stages": {"train": stage}}))


def _predictions(
    right: npt.NDArray[np.bool_], *, hashes: Sequence[str] | None, class_names: Sequence[str]
) -> Predictions:
    actual = np.arange(len(right)) % len(class_names)
    predicted = np.where(right, actual, (actual + 1) % len(class_names))
    probabilities = np.full((len(right), len(class_names)), 0.2 / (len(class_names) - 1), np.float32)
    probabilities[np.arange(len(right)), predicted] = 0.8
    hashes = hashes or [f"{index:016x}" for index in range(len(right))]
    names = [f"test/{each}" for each in hashes]
    return Predictions(tuple(class_names), names, hashes, actual, predicted, probabilities, None)


def _rows(hashes: Sequence[str]) -> tuple[list[str], list[int]]:
    return [f"train/{each}" for each in hashes], [int(each, 16) for each in hashes]


class _Cache:
    def __init__(self, project: Path) -> None:
        self._folder, self._scratch = project / ".dvc" / "cache" / "files" / "md5", project / ".dvc" / "tmp"

    def parquet(self, write: Any) -> bytes:
        self._scratch.mkdir(exist_ok=True)
        write(self._scratch / "x.parquet")
        return (self._scratch / "x.parquet").read_bytes()

    def add(self, content: bytes, *, end: str = "") -> str:
        md5 = hashlib.md5(content).hexdigest() + end
        path = self._folder / md5[:2] / md5[2:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return md5

    def add_folder(self, files: Mapping[str, bytes]) -> str:
        listing = [{"md5": self.add(content), "relpath": name} for name, content in files.items()]
        return self.add(json.dumps(listing).encode(), end=".dir")


def _save(project: Path, name: str, lock: str) -> str:
    """Commit the text as `dvc.lock` on top of the current commit, as a DVC experiment; the checkout stays as it is."""

    def git(*arguments: str, content: str | None = None) -> str:
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
        return subprocess.run(
            command, cwd=project, input=content, check=True, capture_output=True, text=True
        ).stdout.strip()

    blob = git("hash-object", "-w", "--stdin", content=lock)
    entries = [line for line in git("ls-tree", "HEAD").splitlines() if not line.endswith("\tdvc.lock")]
    tree = git("mktree", content="\n".join([*entries, f"100644 blob {blob}\tdvc.lock"]) + "\n")
    head = git("rev-parse", "HEAD")
    commit = git("commit-tree", tree, "-p", head, "-m", name)
    git("update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{name}", commit)
    return commit
