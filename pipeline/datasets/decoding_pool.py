"""Decode chunks of image files in parallel, in one process for each core."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from pipeline.core.errors import UserError
from pipeline.core.processes import num_cores

SIGNALS = (signal.SIGINT, signal.SIGTERM)
Chunk = TypeVar("Chunk")
Decoded = TypeVar("Decoded")


def decode_in_processes(
    decode: Callable[[Chunk], Decoded], chunks: Iterable[Chunk], *, first_name: Callable[[Chunk], str]
) -> Iterator[Decoded]:
    """Decode chunks in parallel and yield their results in the same order, with a bounded number in memory.

    `decode` and the chunks must be picklable; `first_name` returns the name of the first file of a chunk. Raises
    UserError where a process dies.

    Processes are started by `spawn`: forked ones would inherit locks that threads of numpy and tqdm hold, and no thread
    in them would release these.
    """
    workers = num_cores()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    pending: deque[tuple[Chunk, Future[Decoded]]] = deque()
    try:
        for chunk in chunks:
            with _signals_delayed():
                pending.append((chunk, pool.submit(decode, chunk)))
            if len(pending) > workers + 1:
                yield pending[0][1].result()
                pending.popleft()
        for _, future in pending:
            yield future.result()
    except BrokenProcessPool:
        raise UserError(
            "a process that decodes images was killed (out of memory, or a file crashes the decoder), at or soon after "
            f"{first_name(pending[0][0]) if pending else 'the start'}; free memory or remove the file"
        ) from None
    finally:
        with _signals_delayed():
            pool.shutdown(cancel_futures=True)


@contextmanager
def _signals_delayed() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM to the end of the block; processes that are started in it never get Ctrl-C.

    An exception in the code of the pool would leave processes that wait for their next chunk forever, and this process
    would wait for them at its end.
    """
    if threading.current_thread() is not threading.main_thread():  # others get no exception from a signal
        yield
        return
    received: list[int] = []
    # the mask is for the new processes, which inherit it; another thread of this process may still get the signal
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    handlers = {number: signal.signal(number, lambda number, _: received.append(number)) for number in SIGNALS}
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for delayed in received:
            signal.raise_signal(delayed)


def _start_worker() -> None:
    """Prepare a worker process: it ignores Ctrl-C, which reaches every process, and exits with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Exit when the parent has ended, even if it was killed: without this, a worker would wait forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
