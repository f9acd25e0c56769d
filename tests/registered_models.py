"""Register small models with random weights in MLflow, whose files are complete: they can be fetched and loaded."""

from pathlib import Path
from typing import Any

import mlflow
import torch

from pipeline.artifacts import file_md5, replace_folder
from pipeline.models.build import build
from pipeline.models.files import save_config, save_weights
from pipeline.tracking import registry
from pipeline.tracking.models import log_model
from tests.test_model import config

CLASSES = ("a", "b", "c")


def write_model(folder: Path, *, seed: int, **changes: Any) -> Path:
    """Write a LeNet with random weights for images (N, 32, 32, 3) of CLASSES, and return its folder."""
    chosen = config(**{"class_names": CLASSES, "cpu_kernels": "portable", **changes})
    torch.manual_seed(seed)
    with replace_folder(folder) as target:
        save_weights(build(chosen), target / "best.safetensors")
        save_config(chosen, target)
    return folder


def register(folder: Path, *, name: str = "digits") -> registry.Version:
    """Record the model in a new run of the connected store, and register it."""
    with mlflow.start_run(log_system_metrics=False) as run:
        log_model(folder)
    md5 = file_md5(folder / "best.safetensors")
    return registry.register_version(name=name, run_id=run.info.run_id, model_md5=md5, test_md5="b" * 32, tags={})
