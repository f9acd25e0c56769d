"""One training at a time on one GPU: a slot of a global concurrency limit of Prefect, taken where a GPU is used.

A limit of the work pool or of a deployment would hold back runs on the CPU too, would not know of `make run`, and would
count one for all machines. This limit is named after host and GPU. Who holds the slot renews it, so that a killed run's
slot is free again after LEASE_SECONDS.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pynvml
from prefect import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

LEASE_SECONDS = 60.0


def visible_gpu() -> str | None:
    """The GPU that a training here would use: the first of CUDA_VISIBLE_DEVICES, else "0"; None if there is none."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if wanted in {"", "-1"}:
        return None
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        try:
            return wanted if pynvml.nvmlDeviceGetCount() else None
        finally:
            pynvml.nvmlShutdown()
    return None


@contextmanager
def gpu_slot(device: str) -> Iterator[None]:
    """Wait until no other flow run trains on our GPU; at once where `device` (train.device) does not mean one."""
    gpu = visible_gpu() if device in {"auto", "cuda"} else None
    if gpu is None:
        yield
        return
    name = f"gpu-{socket.gethostname()}-{gpu}"
    _see_to_limit(name)
    with concurrency(name, lease_duration=LEASE_SECONDS, strict=True, raise_on_lease_renewal_failure=False):
        yield


def _see_to_limit(name: str) -> None:
    """Make the limit unless it is there: whoever changed it (`prefect gcl update`) had a reason."""
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            with suppress(ObjectAlreadyExists):  # of two runs at once, one makes it
                client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
