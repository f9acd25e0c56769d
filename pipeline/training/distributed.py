"""Train in several processes: torchrun starts them, gloo (CPU) or NCCL (GPU) connects them.

Each process has a copy of the network and its slice of every batch. The gradients are averaged, so that together the
processes take the steps that one process would take with the whole batch. Only rank 0 logs and writes files.
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

# This variable names the file by which processes of one machine find each other; without it they ask torchrun.
RENDEZVOUS_VARIABLE = "PIPELINE_RENDEZVOUS_FILE"
SIGTERM_GRACE_SECONDS = 5  # how long the other ranks live on after SIGTERM, while rank 0 writes a checkpoint
MAX_LAG_SECONDS = 10  # a rank that fails waits this long for rank 0, which may fail later for the same reason
MAX_REPORT_SECONDS = 60  # the other ranks wait this long while rank 0 reports a failure and ends its MLflow run
_RANK_0_FAILED = "failed"  # this key is set in `_store` when rank 0 fails
_OTHER_RANK_FAILED = "failed/others"  # this key is set in `_store` when another rank fails, but rank 0 does not
_store: Any = None  # the key-value store of the process group, of which a process has at most one


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
    """Return whether this is the first process of the training on this machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def num_local_processes(processes: int) -> int:
    """Return how many of the processes of a training run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", processes))


def acts_for_its_machine() -> bool:
    """Return whether this process does what one process must do for all ranks of this machine before they start.

    That process is the launcher of the ranks, or local rank 0 where the user's own torchrun started them.
    """
    return not is_launched() or (RENDEZVOUS_VARIABLE not in os.environ and is_local_rank_0())


def check_num_devices(processes: int, *, device: torch.device) -> None:
    """Raise UserError where `processes`, the number to run on this machine, exceeds its devices of this type."""
    available = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device.type, processes)
    if processes > available:
        raise UserError(
            f"train.processes is {processes}, but this machine has {available} of type {device.type}; "
            f"allowed: up to {available}; lower it"
        )


def launch(module: str, *, processes: int) -> None:
    """Run `python -m module` in `processes` processes on this machine, by torchrun.

    Exits with the status of the first process that fails. Raises TemporaryError where a process was killed.
    """
    # this import takes half a second, which a training in one process saves
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: PLC0415  # see above

    logging.disable(logging.ERROR)  # torchrun would log again what the processes report themselves
    with tempfile.TemporaryDirectory() as folder:
        # use files to find each other, and loopback: torchrun's default listens on all interfaces and unpickles data
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
        _run_and_forward_status(elastic_launch(config, sys.executable), module)


def _run_and_forward_status(launcher: Any, module: str) -> None:
    """Run the module by torchrun's `launcher`; where a process fails, exit with its status."""
    from torch.distributed.elastic.multiprocessing.api import SignalException  # noqa: PLC0415  # see launch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: PLC0415  # see launch

    try:
        launcher("-m", module)
    except ChildFailedError as error:
        failed_rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise TemporaryError(
                f"rank {failed_rank} of the training was ended by {name}; run the same command again to resume"
            ) from None
        sys.exit(failure.exitcode)
    except SignalException as error:
        sys.exit(128 + error.sigval)


@contextmanager
def process_group(device: torch.device, *, processes: int) -> Iterator[None]:
    """Join the process group during the block, if torchrun started this process.

    Raises UserError where torchrun started another number of processes than `processes`, and in rank 0 TemporaryError
    where another rank has died. An error of all ranks is reported by rank 0 alone, and the other ranks wait for that.
    An error of another rank alone is reported by that rank, and rank 0 exits silently.
    """
    global _store
    if not is_launched():
        yield
        return
    num_ranks = int(os.environ["WORLD_SIZE"])
    if num_ranks != processes:
        raise UserError(
            f"train.processes is {processes}, but torchrun started {num_ranks} in total; set train.processes "
            f"to {num_ranks}, or start torchrun with {processes} processes"
        )
    threading.Thread(target=_exit_with_launcher, args=(os.getppid(),), daemon=True).start()
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    url = f"file://{os.environ[RENDEZVOUS_VARIABLE]}" if RENDEZVOUS_VARIABLE in os.environ else "env://"
    _store, own_rank, _ = next(rendezvous(url, int(os.environ["RANK"]), num_ranks))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=_store, rank=own_rank, world_size=num_ranks)
    if rank() > 0:
        _leave_output_and_signals_to_rank_0()
    try:
        with announce_failure():
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
        raise TemporaryError(
            f"another rank of the training has died ({first_line(error)}); run the same command again to resume"
        ) from None
    finally:
        dist.destroy_process_group()


@contextmanager
def announce_failure() -> Iterator[None]:
    """Announce a failure of rank 0 in the block to the other ranks, so that they leave the report to rank 0.

    Where another rank has failed alone and reports its failure, rank 0 exits silently.
    """
    try:
        yield
    except Exception:
        if _another_rank_reports():
            _wait_for_launcher_and_exit()
        if rank() == 0 and _store is not None:
            with suppress(dist.DistError):  # torchrun, which may hold the store, has ended
                _store.set(_RANK_0_FAILED, "")
        raise
    except KeyboardInterrupt:  # the launcher may have sent it, because another rank has failed
        if _another_rank_reports():
            sys.exit(EXIT_TEMPORARY)
        raise


def _another_rank_reports() -> bool:
    """Return whether this is rank 0, and another rank has failed alone and reports its failure."""
    with suppress(dist.DistError):
        return rank() == 0 and _store is not None and bool(_store.check([_OTHER_RANK_FAILED]))
    return False


def _wait_for_launcher_and_exit() -> None:
    """Exit silently once the launcher sends SIGTERM, which it does when the rank that reports has ended."""
    with suppress(KeyboardInterrupt):  # SIGTERM raises it here
        time.sleep(MAX_REPORT_SECONDS)
    sys.exit(EXIT_TEMPORARY)


def _leave_output_and_signals_to_rank_0() -> None:
    """Discard this rank's output, and ignore its signals: rank 0 prints, and decides when to stop.

    A rank that still runs SIGTERM_GRACE_SECONDS after SIGTERM ends then.
    """
    sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115  # open until the process ends
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SIGTERM_GRACE_SECONDS))


def _exit_with_launcher(launcher: int) -> None:
    """Exit once the process that started this one has ended, even if it was killed."""
    while os.getppid() == launcher:
        time.sleep(1)
    os._exit(EXIT_TEMPORARY)


def _let_rank_0_report() -> None:
    """Wait until rank 0 has reported the failure; return where rank 0 has not failed, so that this rank reports it.

    This rank must not exit first: the launcher ends all processes as soon as one has exited.
    """
    if rank() == 0 or _store is None:
        return
    signal.signal(signal.SIGTERM, lambda *_: os._exit(EXIT_TEMPORARY))
    deadline = time.monotonic() + MAX_LAG_SECONDS
    try:
        while not _store.check([_RANK_0_FAILED]):
            if time.monotonic() > deadline:
                _store.set(_OTHER_RANK_FAILED, "")
                return
            time.sleep(0.1)
    except dist.DistError:  # rank 0 held the store and has ended
        pass
    time.sleep(MAX_REPORT_SECONDS)


@contextmanager
def local_rank_0_first(name: str) -> Iterator[None]:
    """Run the block in local rank 0 of each machine, and only after that in the other ranks of the machine.

    `name` must be another one for each use. There is no limit of time: where local rank 0 fails, the launcher ends the
    other ranks.
    """
    key = f"{name}/{os.environ.get('GROUP_RANK')}"
    while not is_local_rank_0() and _store is not None and not _store.check([key]):
        time.sleep(0.1)
    yield
    if is_local_rank_0() and _store is not None:
        _store.set(key, "")


def average_gradients(network: nn.Module) -> Any:
    """Return the network, wrapped so that gradients are averaged over all ranks; in one process, the network itself."""
    if world_size() == 1:
        return network
    # googlenet and inception_v3 have heads whose output is not used
    has_unused = hasattr(getattr(network, "network", None), "aux_logits")
    return nn.parallel.DistributedDataParallel(network, find_unused_parameters=has_unused)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Replace the values by their sum over all ranks, and return them; each rank gets the same bits."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def broadcast_buffers(network: nn.Module) -> None:
    """Copy the buffers of rank 0 (running statistics of batch normalization), which rank 0 saves, to all ranks."""
    if world_size() > 1:
        for buffer in network.buffers():
            dist.broadcast(buffer, src=0)


def broadcast_bytes(content: bytes = b"") -> bytes:
    """Return in each rank the `content` that rank 0 passed."""
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
