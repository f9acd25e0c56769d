"""A small project for promotions: a git repository, DVC's cache, an MLflow store, and models with planted accuracies.

The models are real, small LeNets with random weights. Their predictions are written as `evaluate` would write them,
with as many errors as a test asks for.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from ruamel.yaml import YAML

from flows.promotion import promote_version
from pipeline.artifacts import bytes_md5
from pipeline.core.git import git
from pipeline.evaluation.predictions import Predictions, split_md5, write_predictions
from pipeline.models.build import build
from pipeline.models.config import ModelConfig
from pipeline.models.files import save_config, save_weights
from pipeline.parquet import write_files
from pipeline.tracking.registry import Version, register_version
from pipeline.tracking.store import connect
from tests.conftest import PROJECT, params, start_repository

NAME = "digits"
SIZES = {"train": 20, "validation": 400, "test": 2000}
CLASSES = ("circle", "square")


def add_model(
    project: Path,
    title: str,
    *,
    errors: int,
    seed: int,
    validation_errors: int | None = None,
    first_image: int = 0,
    leaked: int = 0,
    image_size: int = 16,
    name: str = NAME,
    evaluate: Mapping[str, str] | None = None,
    evaluated_md5: str = "",
) -> Version:
    """Add a model as a DVC experiment, an MLflow run and a registered version, and return that version.

    Of 2,000 test images it gets the first `errors` wrong, of 400 validation images by default a fifth as many. The
    images have the content hashes from `first_image` on. The first `leaked` test images are near-duplicates of images
    in train. `evaluate` has parameters of that stage. `evaluated_md5` is by default that of the weights.
    """
    data, hashes = _normalize(project, first_image=first_image, leaked=leaked, image_size=image_size)
    weights = _train(project, seed=seed, image_size=image_size)
    md5 = bytes_md5((weights / "best.safetensors").read_bytes())
    wrong = {"validation": errors // 5 if validation_errors is None else validation_errors, "test": errors}
    evaluated = _evaluate(project, hashes, errors=wrong, weights_md5=evaluated_md5 or md5)
    test = evaluated["test"]
    files = {
        "artifacts/evaluate/predictions.parquet": project / "predictions.parquet",
        "artifacts/evaluate/validation_predictions.parquet": project / "validation_predictions.parquet",
    }
    outs = {"artifacts/normalize": _cache_folder(project, data), "artifacts/train": _cache_folder(project, weights)}
    outs |= {path: _cache(project, file.read_bytes()) for path, file in files.items()}
    for file in files.values():
        file.unlink()
    _save_experiment(project, title, outs, evaluate=evaluate or {})
    return _register(title, model_md5=md5, test=test, name=name)


def _normalize(project: Path, *, first_image: int, leaked: int, image_size: int) -> tuple[Path, dict[str, list[int]]]:
    """Write what `normalize` makes; returns its folder, and the content hashes of each split."""
    folder = project / "normalize"
    folder.mkdir()
    hashes, start = {}, first_image
    for split, number in SIZES.items():
        generator = np.random.default_rng(start)
        np.save(
            folder / f"{split}_images.npy", generator.integers(0, 256, (number, image_size, image_size, 1), np.uint8)
        )
        np.save(folder / f"{split}_labels.npy", np.arange(number, dtype=np.int64) % len(CLASSES))
        hashes[split] = list(range(start, start + number))
        write_files(folder / f"{split}_files.parquet", [([f"{each}.png" for each in hashes[split]], hashes[split])])
        start += number
    counts = {split: dict.fromkeys(CLASSES, number // len(CLASSES)) for split, number in SIZES.items()}
    info = {"dataset": NAME, "class_names": CLASSES, "image_size": image_size, "channels": 1, "resize": "crop"}
    info |= {"mean": [0.5], "std": [0.25], "counts": counts, "test_duplicates": list(range(leaked))}
    (folder / "dataset.json").write_text(json.dumps(info))
    return folder, hashes


def _train(project: Path, *, seed: int, image_size: int) -> Path:
    """Write a model with random weights, and return its folder."""
    folder = project / "train"
    folder.mkdir()
    config = ModelConfig(
        model="lenet",
        weights=None,
        loss="cross_entropy",
        class_names=CLASSES,
        image_size=image_size,
        input_size=None,
        channels=1,
        resize="crop",
        mean=(0.5,),
        std=(0.25,),
    )
    torch.manual_seed(seed)
    save_weights(build(config), folder / "best.safetensors")
    save_config(config, folder)
    return folder


def _evaluate(
    project: Path, hashes: Mapping[str, Sequence[int]], *, errors: Mapping[str, int], weights_md5: str
) -> dict[str, Predictions]:
    """Write the predictions for validation and test, and return them."""
    found = {}
    for split, wrong in errors.items():
        actual = np.arange(SIZES[split], dtype=np.int64) % len(CLASSES)
        predicted = np.where(np.arange(len(actual)) < wrong, 1 - actual, actual)
        probabilities = np.full((len(actual), len(CLASSES)), 0.08, np.float32)
        probabilities[np.arange(len(actual)), predicted] = 0.92
        found[split] = Predictions(
            class_names=CLASSES,
            names=[f"{each}.png" for each in hashes[split]],
            content_hashes=[f"{each:016x}" for each in hashes[split]],
            actual=actual,
            predicted=predicted,
            probabilities=probabilities,
            calibrated_probabilities=None,
            weights_md5=weights_md5,
        )
        path = project / ("predictions.parquet" if split == "test" else f"{split}_predictions.parquet")
        write_predictions(path, found[split])
    return found


def _cache(project: Path, content: bytes, *, suffix: str = "") -> str:
    """Put a file into DVC's cache, and return its hash."""
    md5 = bytes_md5(content) + suffix
    path = project / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return md5


def _cache_folder(project: Path, folder: Path) -> str:
    """Move a folder into DVC's cache, and return its hash."""
    entries = []
    for path in sorted(folder.iterdir()):
        entries.append({"md5": _cache(project, path.read_bytes()), "relpath": path.name})
        path.unlink()
    folder.rmdir()
    return _cache(project, json.dumps(entries).encode(), suffix=".dir")


def _save_experiment(project: Path, title: str, outs: Mapping[str, str], *, evaluate: Mapping[str, str]) -> None:
    """Save a DVC experiment whose `dvc.lock` has these outputs and parameters; the checkout stays as it is."""
    lock = project / "dvc.lock"
    outputs = [{"path": path, "hash": "md5", "md5": md5} for path, md5 in outs.items()]
    values = {"params.yaml": {"evaluate": dict(evaluate)}}
    YAML().dump({"schema": "2.0", "stages": {"all": {"cmd": "true", "params": values, "outs": outputs}}}, lock)
    git(project, "add", "dvc.lock")
    tree, head = git(project, "write-tree"), git(project, "rev-parse", "HEAD")
    commit = git(project, "commit-tree", tree, "-p", head, "-m", title)
    git(project, "update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{title}", commit)
    git(project, "rm", "-q", "--cached", "dvc.lock")
    lock.unlink()


def _register(title: str, *, model_md5: str, test: Predictions, name: str) -> Version:
    """Record an MLflow run with a model, and register that; its files do not exist."""
    client = MlflowClient()
    tags = {"dvc.experiment": title, "model.md5": model_md5}
    run = client.create_run("0", run_name=title, tags=tags)
    model = client.create_logged_model("0", name="model", source_run_id=run.info.run_id)
    client.finalize_logged_model(model.model_id, "READY")
    client.set_terminated(run.info.run_id)
    return register_version(
        name=name, run_id=run.info.run_id, model_md5=model_md5, test_md5=split_md5(test), tags={"title": title}
    )


def make_contest(folder: Path, mlflow_store: Path) -> Path:
    """Make the folder `project` with a good, a better and a similar model, of which the first is the champion."""
    project = folder / "project"
    (project / ".dvc").mkdir(parents=True)
    (project / ".dvc/config").touch()
    (project / ".gitignore").write_text("mlflow.db*\n.dvc/cache\n.dvc/tmp\n")
    shutil.copy(PROJECT / "params.yaml", project)
    shutil.copy(mlflow_store / "mlflow.db", project)
    start_repository(project)
    for name in ("user.name", "user.email"):
        git(project, "config", name, "t")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/mlflow.db")
        connect()
        good = add_model(project, "good", errors=200, seed=0)
        promote_version(project, good, params=params(), is_dry_run=False, log=print)
        add_model(project, "better", errors=60, seed=1)
        add_model(project, "similar", errors=195, seed=2)
    return project
