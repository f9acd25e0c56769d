"""Several processes for one training: torchrun starts them, gloo (CPU) or NCCL (GPU) joins them.

Each process has a copy of the network and its share of every batch; gradients are averaged, so that together they take
the steps that one process would take with the whole batch. The first process tells and writes for all.
"""

import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from pipeline.core.errors import EXIT_TEMPORARY, TemporaryError, UserError, first_line

MEETING = "PIPELINE_MEETING_FILE"
"""Names the file by which the processes of one machine meet; without it they meet as torchrun has it."""
GRACE_SECONDS = 5
"""So long the other processes outlive SIGTERM, in which the first one writes its checkpoint."""
LAG_SECONDS = 10
"""So long a process that fails waits for rank 0 to fail too; they do so at the same place, after the same batch."""
REPORT_SECONDS = 60
"""So long the others leave it to rank 0 to report what failed in it too; to end its MLflow run may take seconds."""
_FAILED = "failed"
"""Key of the processes' store that is set when rank 0 fails; `failed/others` is set when another one fails alone."""
_store: Any = None
"""By which the processes met."""


def is_launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first_on_its_machine() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def launch(module: str, *, processes: int, device: torch.device) -> None:
    """Run `python -m module` in so many processes on this machine by torchrun; leaves as the first to fail does.

    Raises UserError where the machine has fewer devices of the kind, TemporaryError where a process was killed.
    """
    most = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device.type, processes)
    if processes > most:
        raise UserError(
            f"train.processes is {processes}, but this machine has {most} of {device.type}; allowed: up to {most}"
        )
    # half a second to import, which one process alone need not spend
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: PLC0415  # see above

    logging.disable(logging.ERROR)  # of what the processes tell themselves
    with tempfile.TemporaryDirectory() as folder:
        # they meet by files and talk on loopback: torchrun's default listens on all interfaces, and unpickles
        os.environ |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", MEETING: f"{folder}/processes"}
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        os.environ |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=module,
            rdzv_backend="c10d",
            rdzv_endpoint=f"{folder}/machines",
            rdzv_configs={"store_type": "file"},
            local_addr="localhost",
            max_restarts=0,  # the same command, or Prefect, tries again
            monitor_interval=0.1,
        )
        _run(elastic_launch(config, sys.executable), module)


def _run(launched: Any, module: str) -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException  # noqa: PLC0415  # see launch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: PLC0415  # see launch

    try:
        launched("-m", module)
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise TemporaryError(f"process {number} was ended by {name}; the same command goes on") from None
        sys.exit(failure.exitcode)
    except SignalException as error:
        sys.exit(128 + error.sigval)


@contextmanager
def joined(device: torch.device, *, processes: int) -> Iterator[None]:
    """Be one of the processes that torchrun started, if it did.

    Raises UserError where it started another number than `processes`, TemporaryError in the first process where
    another one is gone. What fails in all of them is reported by rank 0: the other ranks give it time for that. What
    fails in another rank alone is reported by that rank, and rank 0 ends silently.
    """
    global _store  # one group a process, as PyTorch has it
    if not is_launched():
        yield
        return
    found = int(os.environ["WORLD_SIZE"])
    if found != processes:
        raise UserError(f"train.processes is {processes}, but torchrun started {found}; set it to {found}")
    threading.Thread(target=_leave_with_launcher, args=(os.getppid(),), daemon=True).start()
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    place = f"file://{os.environ[MEETING]}" if MEETING in os.environ else "env://"
    _store, number, _ = next(rendezvous(place, int(os.environ["RANK"]), found))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=_store, rank=number, world_size=found)
    if rank() > 0:
        _follow()
    try:
        with announced():
            yield
    except (UserError, TemporaryError):
        _let_the_first_tell()
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "peer" not in str(error):
            raise
        _let_the_first_tell()
        if rank() > 0:
            sys.exit(EXIT_TEMPORARY)
        raise TemporaryError(f"another process is gone ({first_line(error)}); the same command goes on") from None
    finally:
        dist.destroy_process_group()


@contextmanager
def announced() -> Iterator[None]:
    """Let the other processes know at once where the block fails in the first one, which then is to report that.

    Where another one has failed alone and reports, the first one leaves in silence.
    """
    try:
        yield
    except Exception:
        if _another_tells():
            _leave_when_ended()
        if rank() == 0 and _store is not None:
            with suppress(dist.DistError):  # torchrun, which may keep the store, has ended
                _store.set(_FAILED, "")
        raise
    except KeyboardInterrupt:  # by the launcher, it may be, since another one has failed
        if _another_tells():
            sys.exit(EXIT_TEMPORARY)
        raise


def _another_tells() -> bool:
    """Whether this is the first process, and another one has failed alone."""
    with suppress(dist.DistError):
        return rank() == 0 and _store is not None and bool(_store.check([f"{_FAILED}/others"]))
    return False


def _leave_when_ended() -> None:
    """Leave in silence when the launcher ends this process, which it does when the rank that reports has ended."""
    with suppress(KeyboardInterrupt):  # which SIGTERM is here
        time.sleep(REPORT_SECONDS)
    sys.exit(EXIT_TEMPORARY)


def _follow() -> None:
    """Say nothing, and leave it to the first process when to stop."""
    sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115  # for the life of the process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_SECONDS))


def _leave_with_launcher(launcher: int) -> None:
    """End when the process that started this one is gone, even if it was killed."""
    while os.getppid() == launcher:
        time.sleep(1)
    os._exit(EXIT_TEMPORARY)


def _let_the_first_tell() -> None:
    """The launcher ends all processes as soon as one has failed; where the first has not, this one alone has."""
    if rank() == 0 or _store is None:
        return
    signal.signal(signal.SIGTERM, lambda *_: os._exit(EXIT_TEMPORARY))
    deadline = time.monotonic() + LAG_SECONDS
    try:
        while not _store.check([_FAILED]):
            if time.monotonic() > deadline:
                _store.set(f"{_FAILED}/others", "")
                return
            time.sleep(0.1)
    except dist.DistError:  # the store went with the first process
        pass
    time.sleep(REPORT_SECONDS)


def averaged(network: nn.Module) -> Any:
    """The network; its gradients become the means over all processes."""
    if world_size() == 1:
        return network
    # googlenet and inception_v3 have heads whose output is not used
    return nn.parallel.DistributedDataParallel(network, find_unused_parameters=hasattr(network.network, "aux_logits"))


def total(values: Tensor) -> Tensor:
    """The sum over all processes, the same bits in each of them: all select and stop alike."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def share_buffers(network: nn.Module) -> None:
    """Give all processes the running statistics of the first one, which are those that are kept."""
    if world_size() > 1:
        for buffer in network.buffers():
            dist.broadcast(buffer, src=0)


def from_first(content: bytes = b"") -> bytes:
    """The bytes that the first process gives, in each of them."""
    if world_size() == 1:
        return content
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    length = torch.tensor(len(content), device=device)
    dist.broadcast(length, src=0)
    values = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if content:
        values.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    if len(values):
        dist.broadcast(values, src=0)
    return bytes(values.cpu().numpy())
