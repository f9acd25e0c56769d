"""Start two trainings at once on one GPU, and check that the second waits for the first and reports that."""

import contextlib
import io
import multiprocessing
import time
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from benchmarks.gpu.correctness import CPU, update
from benchmarks.gpu.part import Emit, Setting
from benchmarks.gpu.toy import toy_params
from pipeline.training import gpu_lock
from pipeline.training.device import choose_device, gpu_uuids, prepare_torch

MAX_SECONDS = 120  # for both trainings
MAX_HOLD_SECONDS = 15  # how long the first training waits until the second is waiting for the lock


class Output(io.StringIO):
    """A text buffer that sets an event when anything is printed, as only the training that waits does."""

    def __init__(self, event: Event) -> None:
        super().__init__()
        self._event = event

    def write(self, text: str) -> int:
        self._event.set()
        return super().write(text)


def check_lock(setting: Setting, emit: Emit) -> None:
    """Emit whether the second training started after the end of the first, and what the second one printed."""
    context = multiprocessing.get_context("fork")
    other_waits, found = context.Event(), context.Queue()
    processes = [context.Process(target=_train, args=(setting, other_waits, found)) for _ in range(2)]
    for process in processes:
        process.start()
    (_, first_end, first_output), (start, _, output) = sorted(found.get(timeout=MAX_SECONDS) for _ in processes)
    for process in processes:
        process.join()
    waited = "waiting for GPU" in output and not first_output
    emit(
        check="of two trainings at once, the second waits",
        case="lenet",
        ok=first_end <= start and waited,
        found=output.strip() or "the second printed nothing",
    )


def _train(setting: Setting, other_waits: Event, found: "Queue[Any]") -> None:
    """Train with the lock held, as the step train does; put start, end and what the lock printed into `found`."""
    device = CPU if setting.dry else choose_device("cuda", field="--dry")
    params = toy_params("lenet", "sgd")
    prepare_torch(params)
    uuids = gpu_uuids(device, processes=1)
    if setting.dry:  # use the lock of a GPU that does not exist
        gpu_lock.LOCK_FOLDER, uuids = Path(setting.arrays).parent, ["dry"]
    printed = Output(other_waits)
    with contextlib.redirect_stdout(printed), gpu_lock.exclusive_gpus(uuids):
        start = time.monotonic()
        other_waits.wait(MAX_HOLD_SECONDS)
        update(params, device=device)
        end = time.monotonic()
    found.put((start, end, printed.getvalue()))
