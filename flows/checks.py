"""Check a flow run's inputs before any server is started: network, file of weights, GPU, images.

Only checks that are quick are made here. The stages check everything, with the same messages.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pynvml

from pipeline.artifacts import check_weights, expand
from pipeline.core.errors import UserError
from pipeline.models.names import check_network_name

# a folder of images with more files and folders is not checked here, which would take long: `download` checks it
MAX_ENTRIES = 10_000
# AMD, Jetson, WSL: PyTorch may use these as `cuda`, though NVIDIA's management library does not list them
OTHER_GPUS = (Path("/dev/kfd"), Path("/dev/nvhost-gpu"), Path("/dev/dxg"))


def check_inputs(params: Mapping[str, Any]) -> None:
    """Raise UserError where the parameters name a network, weights, a GPU or images that do not exist.

    `params` are complete and valid; their relative paths are relative to the current folder.
    """
    train, download = params["train"], params["download"]
    check_network_name(train["model"])
    if train["weights"] not in (None, "DEFAULT"):
        check_weights(Path(train["weights"]), train["weights_md5"])
    for section in ("train", "evaluate"):
        check_device(params[section]["device"], field=f"{section}.device")
    if download["dataset"] == "imagefolder" and _is_small(expand(download["folder"])):
        from pipeline.datasets.labeled_images import find_images  # noqa: PLC0415  # its libraries of image formats take 0.2 s to import

        find_images(expand(download["folder"]), labels=download["labels"])


def check_device(device: str, *, field: str) -> None:
    """Raise UserError where this machine certainly does not have the device, without importing PyTorch (seconds)."""
    has_none = device == "mps" and sys.platform != "darwin"
    if device == "cuda":
        has_none = not any(path.exists() for path in OTHER_GPUS) and not _may_have_nvidia_gpu()
    if has_none:
        raise UserError(f"{field} is {device}, but this machine has none; allowed: auto, cpu; change the parameter")


def _may_have_nvidia_gpu() -> bool:
    """Return False where NVIDIA's driver lists no GPU or CUDA_VISIBLE_DEVICES hides all; True where that is unknown."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    if not visible or visible.startswith("-"):
        return False
    try:
        pynvml.nvmlInit()
        try:
            return bool(pynvml.nvmlDeviceGetCount() > 0)
        finally:
            pynvml.nvmlShutdown()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return False
    except pynvml.NVMLError:
        return True


def _is_small(folder: Path) -> bool:
    """Return whether the folder has at most MAX_ENTRIES files and folders, counting no further than that."""
    num_entries, pending = 0, [str(folder)]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                num_entries += 1
                if num_entries > MAX_ENTRIES:
                    return False
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
    return True
