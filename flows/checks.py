"""What a flow run needs, checked before any server is started: the network, the file of weights, the GPU, the images.

Only what costs little is checked: the stages, which check everything, have the same messages.
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

MAX_ENTRIES = 10_000
"""A folder of images with more files and folders is not scanned here: the step download scans it anyway."""
OTHER_GPUS = (Path("/dev/kfd"), Path("/dev/nvhost-gpu"), Path("/dev/dxg"))
"""Devices that PyTorch may use as `cuda`, though NVIDIA's management library does not list them: AMD, Jetson, WSL."""


def check_inputs(params: Mapping[str, Any]) -> None:
    """Raise UserError where the parameters name a network, weights, a GPU or images that do not exist.

    `params` are complete and valid; relative paths in them start at the current folder.
    """
    train, download = params["train"], params["download"]
    check_network_name(train["model"])
    if train["weights"] not in (None, "DEFAULT"):
        check_weights(Path(train["weights"]), train["weights_md5"])
    for section in ("train", "evaluate"):
        check_device(params[section]["device"], field=f"{section}.device")
    if download["dataset"] == "imagefolder" and _is_small(expand(download["folder"])):
        from pipeline.datasets.folder_scan import scan  # noqa: PLC0415  # its libraries of image formats take 0.2 s to import

        scan(expand(download["folder"]))


def check_device(device: str, *, field: str) -> None:
    """Raise UserError where this machine certainly has no such device; to ask PyTorch would take seconds."""
    has_none = device == "mps" and sys.platform != "darwin"
    if device == "cuda":
        has_none = not any(path.exists() for path in OTHER_GPUS) and not _may_have_nvidia_gpu()
    if has_none:
        raise UserError(f"{field} is {device}, but this machine has none; allowed: auto, cpu; correct it")


def _may_have_nvidia_gpu() -> bool:
    """Whether NVIDIA's driver lists a GPU that CUDA_VISIBLE_DEVICES does not hide, or does not say."""
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
    """Whether the folder holds no more than MAX_ENTRIES; looks at no more than that."""
    number, waiting = 0, [str(folder)]
    while waiting:
        with os.scandir(waiting.pop()) as found:
            for entry in found:
                number += 1
                if number > MAX_ENTRIES:
                    return False
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
    return True
