"""Choose the device of a training or an evaluation, and set PyTorch's kernels, threads, determinism and seed."""

import ctypes
import os
import platform

import torch

from pipeline.core.errors import UserError
from pipeline.core.processes import num_cores
from pipeline.models.cpu_kernels import use_cpu_kernels
from pipeline.params import TrainParams


def choose_device(name: str, *, field: str) -> torch.device:
    """Return the device called `name`; "auto" is the first available one of cuda, mps and cpu.

    Raises UserError, which names the parameter `field`, where this machine does not have the device.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if name == "auto":
        return torch.device(available[0])
    if name not in available:
        raise UserError(
            f"{field} is {name}, but PyTorch finds no such device; allowed on this machine: auto, "
            f"{', '.join(available)}; set it to auto to use the fastest one"
        )
    return torch.device(name)


def prepare_torch(params: TrainParams) -> torch.device:
    """Set PyTorch's kernels on the CPU, threads, determinism and seed; return the device.

    Raises UserError where the device is not available, or PyTorch has already chosen other kernels.
    """
    device = choose_device(params.device, field="train.device")
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        _keep_freed_memory()
    use_cpu_kernels(params.cpu_kernels, field="train.cpu_kernels")
    torch.set_num_threads(params.cpu_threads or num_cores())
    # the call imports PyTorch's compiler (1.5 s), and lenet on the CPU has no operation to which the setting applies
    if params.deterministic and (device.type != "cpu" or params.model != "lenet"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it, before its first call
        torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(params.seed)
    return device


def _keep_freed_memory() -> None:
    """Let glibc keep up to 1 GB of freed memory in the process.

    Otherwise each step would return its memory to the system and request it again, page by page: a training of lenet on
    2 cores then takes 5 % longer (median of 7 runs in turn, AMD EPYC).
    """
    mmap_threshold, trim_threshold = -3, -1  # malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(mmap_threshold, 2**25)  # the largest value allowed; larger tensors are still returned to the system
    mallopt(trim_threshold, 2**30)


def gpu_uuids(device: torch.device, *, processes: int) -> list[str]:
    """Return the UUIDs of the GPUs on which this many processes of this machine train; an empty list without CUDA.

    Process n trains on the n-th GPU that is visible to PyTorch; an instance of NVIDIA's MIG counts as a GPU.
    """
    if device.type != "cuda":
        return []
    return [_gpu_uuid(number) for number in range(min(processes, torch.cuda.device_count()))]


def _gpu_uuid(number: int) -> str:
    """Return the UUID of a GPU, or its number with a warning where the driver reports no UUID."""
    uuid = str(torch.cuda.get_device_properties(number).uuid)
    if uuid.strip("0-"):
        return uuid
    print(
        f"warning: the driver reports no UUID for GPU {number}: a training that sees it under another number "
        "(CUDA_VISIBLE_DEVICES) does not wait for this one",
        flush=True,
    )
    return str(number)


def autocast_dtype(mixed_precision: str, *, device: torch.device) -> torch.dtype | None:
    """Return the dtype of `train.mixed_precision`, which applies to cuda only; None means float32."""
    if device.type != "cuda" or mixed_precision == "none":
        return None
    return torch.bfloat16 if mixed_precision == "bfloat16" else torch.float16


def autocast(mixed_precision: str, *, device: torch.device) -> torch.autocast:
    """Return a context manager in which forward passes use `train.mixed_precision`."""
    dtype = autocast_dtype(mixed_precision, device=device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
