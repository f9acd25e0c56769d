"""Several processes for one training: torchrun starts them, gloo (CPU) or NCCL (GPU) joins them.

Each process has a copy of the network and its slice of every batch; gradients are averaged, so that together they take
the steps that one process would take with the whole batch. Rank 0 logs and writes for all.
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

# names the file for the rendezvous of the processes of one machine; without it torchrun's own rendezvous is used
RENDEZVOUS_VARIABLE = "PIPELINE_RENDEZVOUS_FILE"
GRACE_SECONDS = 5  # other ranks outlive SIGTERM by this, while rank 0 writes its checkpoint
LAG_SECONDS = 10  # a rank that fails waits this long for rank 0 to fail too, at the same place after the same batch
REPORT_SECONDS = (
    60  # the other ranks leave the report of a common failure to rank 0; ending its MLflow run takes seconds
)
_RANK_0_FAILED = "failed"  # key of the store that is set when rank 0 fails
_OTHER_RANK_FAILED = "failed/others"  # key that is set when another rank fails alone
_store: Any = None  # the key-value store of the process group, of which PyTorch has one a process


def is_launched() -> bool:
    """Return whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes of this training."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_local_rank_0() -> bool:
    """Return whether this is the first of the processes on this machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def num_local_processes(processes: int) -> int:
    """Return how many of the processes of a training run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", processes))


def acts_for_its_machine() -> bool:
    """Return whether this process acts for all ranks of this machine before they form the process group.

    That is their launcher, or local rank 0 where the user's own torchrun started them.
    """
    return not is_launched() or (RENDEZVOUS_VARIABLE not in os.environ and is_local_rank_0())


def check_num_devices(processes: int, *, device: torch.device) -> None:
    """Raise UserError where this machine has fewer devices of this kind than processes are to run here."""
    most = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device.type, processes)
    if processes > most:
        raise UserError(
            f"train.processes is {processes}, but this machine has {most} of {device.type}; allowed: up to {most}"
        )


def launch(module: str, *, processes: int) -> None:
    """Run `python -m module` in this many processes on this machine by torchrun; exits as the first one that fails.

    Raises TemporaryError where a process was killed.
    """
    # half a second to import, which one process alone need not spend
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: PLC0415  # see above

    logging.disable(logging.ERROR)  # of what the processes report themselves
    with tempfile.TemporaryDirectory() as folder:
        # rendezvous by files, traffic on loopback: torchrun's default listens on all interfaces, and unpickles
        os.environ |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", RENDEZVOUS_VARIABLE: f"{folder}/processes"}
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
            raise TemporaryError(f"process {number} was ended by {name}; the same command resumes") from None
        sys.exit(failure.exitcode)
    except SignalException as error:
        sys.exit(128 + error.sigval)


@contextmanager
def process_group(device: torch.device, *, processes: int) -> Iterator[None]:
    """Join the process group within the block, if torchrun started this process.

    Raises UserError where it started another number than `processes`, TemporaryError in rank 0 where another rank is
    gone. What fails in all ranks is reported by rank 0: the others give it time for that. What fails in another rank
    alone is reported by that rank, and rank 0 ends silently.
    """
    global _store
    if not is_launched():
        yield
        return
    found = int(os.environ["WORLD_SIZE"])
    if found != processes:
        raise UserError(f"train.processes is {processes}, but torchrun started {found}; set it to {found}")
    threading.Thread(target=_exit_with_launcher, args=(os.getppid(),), daemon=True).start()
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    url = f"file://{os.environ[RENDEZVOUS_VARIABLE]}" if RENDEZVOUS_VARIABLE in os.environ else "env://"
    _store, number, _ = next(rendezvous(url, int(os.environ["RANK"]), found))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=_store, rank=number, world_size=found)
    if rank() > 0:
        _leave_output_and_signals_to_rank_0()
    try:
        with failure_announced():
            yield
    except (UserError, TemporaryError):
        _let_rank_0_report()
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "peer" not in str(error):
            raise
        _let_rank_0_report()
        if rank() > 0:
            sys.exit(EXIT_TEMPORARY)
        raise TemporaryError(f"another rank is gone ({first_line(error)}); the same command resumes") from None
    finally:
        dist.destroy_process_group()


@contextmanager
def failure_announced() -> Iterator[None]:
    """Announce a failure of the block in rank 0 to the other ranks at once, so that they leave the report to it.

    Where another rank has failed alone and reports that, rank 0 exits silently.
    """
    try:
        yield
    except Exception:
        if _another_rank_reports():
            _wait_for_launcher_and_exit()
        if rank() == 0 and _store is not None:
            with suppress(dist.DistError):  # torchrun, which may keep the store, has ended
                _store.set(_RANK_0_FAILED, "")
        raise
    except KeyboardInterrupt:  # may come from the launcher, because another rank has failed
        if _another_rank_reports():
            sys.exit(EXIT_TEMPORARY)
        raise


def _another_rank_reports() -> bool:
    """Return whether this is rank 0, and another rank has failed alone."""
    with suppress(dist.DistError):
        return rank() == 0 and _store is not None and bool(_store.check([_OTHER_RANK_FAILED]))
    return False


def _wait_for_launcher_and_exit() -> None:
    """Exit silently when the launcher ends this process, which it does once the rank that reports has ended."""
    with suppress(KeyboardInterrupt):  # which SIGTERM is here
        time.sleep(REPORT_SECONDS)
    sys.exit(EXIT_TEMPORARY)


def _leave_output_and_signals_to_rank_0() -> None:
    """Print nothing, and let rank 0 decide when to stop."""
    sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115  # for the life of the process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_SECONDS))


def _exit_with_launcher(launcher: int) -> None:
    """Exit once the process that started this one is gone, even if it was killed."""
    while os.getppid() == launcher:
        time.sleep(1)
    os._exit(EXIT_TEMPORARY)


def _let_rank_0_report() -> None:
    """Wait until rank 0 has reported the failure; where rank 0 has not failed, report it here.

    The launcher ends all processes as soon as one has exited.
    """
    if rank() == 0 or _store is None:
        return
    signal.signal(signal.SIGTERM, lambda *_: os._exit(EXIT_TEMPORARY))
    deadline = time.monotonic() + LAG_SECONDS
    try:
        while not _store.check([_RANK_0_FAILED]):
            if time.monotonic() > deadline:
                _store.set(_OTHER_RANK_FAILED, "")
                return
            time.sleep(0.1)
    except dist.DistError:  # the store went with rank 0
        pass
    time.sleep(REPORT_SECONDS)


def average_gradients(network: nn.Module) -> Any:
    """Return the network, wrapped so that its gradients become the means over all processes where there are several."""
    if world_size() == 1:
        return network
    # googlenet and inception_v3 have heads whose output is not used
    return nn.parallel.DistributedDataParallel(network, find_unused_parameters=hasattr(network.network, "aux_logits"))


def sum_over_ranks(values: Tensor) -> Tensor:
    """Replace the values by their sum over all ranks, the same bits in each of them, and return them."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def broadcast_buffers(network: nn.Module) -> None:
    """Give all ranks the buffers (running statistics) of rank 0, which are the ones that are kept."""
    if world_size() > 1:
        for buffer in network.buffers():
            dist.broadcast(buffer, src=0)


def broadcast_bytes(content: bytes = b"") -> bytes:
    """Return, in each rank, the bytes that rank 0 passed."""
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
