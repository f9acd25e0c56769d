"""Send requests to an HTTP server by several clients at the same time, and record each answer."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx
import numpy as np

TIMEOUT_SECONDS = 60
MAX_SECONDS = 300  # of a load that waits for an answer


@dataclass(frozen=True)
class Reply:
    """The answer to a request: its content, or why there is none.

    `client` is the client that asked; `start` is before the first byte was sent, `end` after the last one was received,
    in seconds as `time.perf_counter` has them. `error` is empty for status 200.
    """

    client: int
    start: float
    end: float
    content: bytes
    error: str


@dataclass
class Load:
    """Requests by `clients` clients, each of which sends its next request when it has the answer to the last one.

    The bodies are sent in turn, `requests` in all. With `until`, each client sends more until this is true of the
    content of an answer to it, for MAX_SECONDS at most. With `change`, the client that receives the answer number
    `change_after` calls it before its next request. `replies` are in the order in which they arrived.
    """

    url: str
    bodies: Sequence[bytes]
    content_type: str
    requests: int
    clients: int
    until: Callable[[bytes], bool] | None = None
    change: Callable[[], None] | None = None
    change_after: int = 0
    replies: list[Reply] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _sent: int = 0

    def run(self) -> float:
        """Send all requests; return the seconds that this took."""
        start = time.perf_counter()
        with ThreadPoolExecutor(self.clients) as pool:
            list(pool.map(self._be_client, range(self.clients)))
        return time.perf_counter() - start

    def _be_client(self, client: int) -> None:
        """Send requests as one client, over one connection."""
        end, found = time.monotonic() + MAX_SECONDS, self.until is None
        # without `trust_env`, a proxy of the environment is not used
        with httpx.Client(timeout=TIMEOUT_SECONDS, trust_env=False) as connection:
            while (number := self._next()) < self.requests or (not found and time.monotonic() < end):
                reply = self._send(connection, client, body=self.bodies[number % len(self.bodies)])
                found = found or (self.until is not None and self.until(reply.content))
                with self._lock:
                    self.replies.append(reply)
                    is_time = len(self.replies) == self.change_after
                if is_time and self.change:
                    self.change()

    def _next(self) -> int:
        """Return the number of the next request."""
        with self._lock:
            self._sent += 1
            return self._sent - 1

    def _send(self, connection: httpx.Client, client: int, *, body: bytes) -> Reply:
        start = time.perf_counter()
        try:
            response = connection.post(self.url, content=body, headers={"Content-Type": self.content_type})
        except httpx.HTTPError as failure:
            return Reply(client, start, time.perf_counter(), b"", error=f"{type(failure).__name__}: {failure}")
        end = time.perf_counter()
        error = "" if response.status_code == 200 else f"status {response.status_code}: {response.text[:200]}"
        return Reply(client, start, end, response.content, error=error)


def milliseconds(replies: Sequence[Reply], percentile: float) -> float:
    """Return a percentile of the time that an answer took."""
    return 1000 * float(np.percentile([reply.end - reply.start for reply in replies], percentile))


def confused_clients(replies: Sequence[Reply], *, old: bytes, new: bytes) -> list[int]:
    """Return the clients whose replies were not first those with the text `old`, if any, and then those with `new`."""
    wrong = []
    for client in sorted({reply.client for reply in replies}):
        own = [reply.content for reply in replies if reply.client == client]
        is_new = [new in content for content in own]
        if is_new != sorted(is_new) or not is_new[-1] or any((old in each) == (new in each) for each in own):
            wrong.append(client)
    return wrong
