"""One training at a time on one GPU: a slot of a global concurrency limit of Prefect, taken where a GPU is used.

A limit of the work pool or of a deployment would hold back runs on the CPU too, would not know of `make run`, and would
count one for all machines. This limit is named after the GPU. Who holds the slot renews it, so that a killed run's slot
is free again after LEASE_SECONDS.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pynvml
from prefect import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from pipeline.core.yaml import read_yaml
from pipeline.params import PARAMS_FILE

LEASE_SECONDS = 60.0


def visible_gpu() -> str | None:
    """The UUID of the GPU that a training here would use, as `nvidia-smi -L` lists it; None if there is none.

    That is the first of CUDA_VISIBLE_DEVICES (a number, or a UUID or the beginning of one), else the machine's first.
    Where the driver does not list them, all GPUs of this host count as one, so that no two trainings share one.
    """
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    try:
        pynvml.nvmlInit()
        try:
            handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
            uuids = [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
        finally:
            pynvml.nvmlShutdown()
        if wanted.isdigit():
            return uuids[int(wanted)] if int(wanted) < len(uuids) else None
        if wanted.startswith("MIG-"):  # a part of a GPU counts as a GPU
            return wanted
        return next((uuid for uuid in uuids if wanted and uuid.startswith(wanted)), None)
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):  # no driver, so no GPU for PyTorch
        return None
    except pynvml.NVMLError as error:
        if not (wanted.isdigit() or wanted.startswith(("GPU-", "MIG-"))):  # none is to be used
            return None
        print(f"warning: NVIDIA's driver does not list its GPUs ({error}): one training at a time on this host")
        return f"of-{socket.gethostname()}"


def needed_gpu(clone: Path) -> str | None:
    """The GPU that the step `train` of this clone would use."""
    device = read_yaml(clone / PARAMS_FILE)["train"].get("device", "auto")
    return visible_gpu() if device in {"auto", "cuda"} else None


@contextmanager
def gpu_slot(clone: Path) -> Iterator[None]:
    """Wait until no other flow run trains on the GPU that the clone's step `train` would use, if it would use one."""
    if gpu := needed_gpu(clone):
        name = f"gpu-{gpu.removeprefix('GPU-')}"
        _ensure_limit(name)
        with concurrency(name, lease_duration=LEASE_SECONDS, strict=True, raise_on_lease_renewal_failure=False):
            yield
    else:
        yield


def _ensure_limit(name: str) -> None:
    """Make the limit unless it is there: whoever changed it (`prefect gcl update`) had a reason."""
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            with suppress(ObjectAlreadyExists):  # of two runs at once, one makes it
                client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
