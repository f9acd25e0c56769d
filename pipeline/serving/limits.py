"""Bound what requests may cost: bytes, images, pixels, seconds, and the number of requests that wait."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from starlette.requests import Request

from pipeline.core.processes import num_cores

# An image with more pixels than QUICK_PIXELS is decoded alone, as decoding takes up to 30 bytes for each pixel.
QUICK_PIXELS = 2**24
MAX_PIXELS = 2**26  # 67 megapixels; a PNG file of 0.2 MB can have as many
MAX_BUFFERED_BYTES = 2**28  # of the bodies of all requests together
RETRY_AFTER_SECONDS = 1
T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """The limits that the user chooses.

    `max_bytes` and `max_images` are those of one request. The body of a request may take `timeout_seconds` to arrive,
    and the answer as long again to be computed. `max_waiting` complete requests may wait for a thread.
    """

    max_bytes: int = 20_000_000
    max_images: int = 256
    timeout_seconds: float = 30.0
    max_waiting: int = 64


class RequestError(Exception):
    """The error for a request that is not answered; the text is one line for the client, `status` that of HTTP."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Bodies:
    """The bodies of requests that are in memory, with a limit for each and one for all of them together."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._num_bytes = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Read the body of a request; it counts as in memory until the end of the block.

        Raises RequestError where it is too large, as soon as that is known, where it arrives too slowly, where the
        bodies of other requests fill the memory, or where it is compressed.
        """
        _check_encoding(request)
        self._check_size(int(request.headers.get("content-length") or 0))
        chunks, size = list[bytes](), 0
        try:
            try:
                async with asyncio.timeout(self._limits.timeout_seconds):
                    async for chunk in request.stream():
                        size += len(chunk)
                        self._num_bytes += len(chunk)
                        self._check_size(size)
                        self._check_memory()
                        chunks.append(chunk)
            except TimeoutError:
                raise RequestError(
                    408,
                    f"the body did not arrive within {self._limits.timeout_seconds:g} seconds; {size:,} bytes did; "
                    "send a smaller image, or start the server with a larger --timeout-seconds",
                ) from None
            body = b"".join(chunks)
            chunks.clear()
            yield body
        finally:
            self._num_bytes -= size

    def _check_size(self, size: int) -> None:
        if size > self._limits.max_bytes:
            raise RequestError(
                413,
                f"the body has more than {self._limits.max_bytes:,} bytes; allowed: {self._limits.max_bytes:,}; send "
                "fewer or smaller images",
            )

    def _check_memory(self) -> None:
        if self._num_bytes > max(MAX_BUFFERED_BYTES, self._limits.max_bytes):
            raise RequestError(503, "the requests that wait fill the memory of the server; try again later")


def _check_encoding(request: Request) -> None:
    """Raise RequestError where the body is compressed: its size would not bound what it takes."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise RequestError(415, f"Content-Encoding is {json.dumps(encoding)}; allowed: an uncompressed body")


class Workers:
    """The threads that decode and classify, one for each core, each of which computes by itself.

    A thread of PyTorch's own for each of these threads would compete for the same cores.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._num_threads = num_cores()
        self._pool = ThreadPoolExecutor(self._num_threads, initializer=torch.set_num_threads, initargs=(1,))
        self._futures = set[Future[Any]]()

    def check_room(self) -> None:
        """Raise RequestError where as many requests wait as may wait."""
        if len(self._futures) >= self._num_threads + self._limits.max_waiting:
            raise RequestError(503, f"{self._limits.max_waiting} requests wait already; try again later")

    async def run(self, work: Callable[[], T]) -> T:
        """Call `work` in a thread and return its result; it counts as waiting until a thread has finished it.

        Raises RequestError where there is no room, or where the result is not there in time. A call that has begun
        is not interrupted, so its thread remains busy until it looks at the time itself.
        """
        self.check_room()
        future = self._pool.submit(work)
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        try:
            async with asyncio.timeout(self._limits.timeout_seconds):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise RequestError(
                503,
                f"no answer within {self._limits.timeout_seconds:g} seconds; try again later, or send fewer images",
            ) from None

    def stop(self) -> None:
        """Wait for the calls that have begun; those that wait are not begun any more."""
        self._pool.shutdown(cancel_futures=True)
