"""Log each request as one line, and let a client read the answer that it gets before it has sent its whole body."""

import asyncio
import logging
import time
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.core.errors import escape_control_chars

LINGER_SECONDS = 2  # for which the rest of a body is read and discarded
MAX_LOGGED_PATH = 100  # characters
logger = logging.getLogger(__name__)


class Connection:
    """An ASGI application around another one, which answers the requests.

    Where the answer comes before the end of the body, the rest of the body is discarded for up to LINGER_SECONDS, and
    the connection is closed: the system resets a connection that is closed before all was read, and the client would
    lose the answer.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, and log it: method, path, status, milliseconds."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, exchange = time.monotonic(), _Exchange(scope, receive, send)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        finally:
            path = escape_control_chars(scope["path"])[:MAX_LOGGED_PATH]
            logger.info("%s %s %s %.0f ms", scope["method"], path, exchange.status, (time.monotonic() - start) * 1000)


class _Exchange:
    """One request and its answer; `status` is that of the answer, "-" where there is none."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        self._receive, self._send = receive, send
        self._is_received = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
        self.status = "-"

    async def receive(self) -> Message:
        """Return the next part of the body, or that the client has gone."""
        message = await self._receive()
        self._is_received |= not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Send a part of the answer, the last one after the rest of the body was discarded."""
        if message["type"] == "http.response.start":
            self.status = str(message["status"])
            if not self._is_received:
                MutableHeaders(scope=message)["connection"] = "close"
        elif not (self._is_received or message.get("more_body", False)):
            await self._send({**message, "more_body": True})
            await self._discard()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)

    async def _discard(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while not self._is_received:
                    await self.receive()
