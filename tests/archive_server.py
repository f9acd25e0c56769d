"""An HTTP server that serves an archive, and can interrupt, redirect or refuse the requests for it."""

import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler


@dataclass
class Site:
    """The content and the behavior of a server, and what the requests to it contained."""

    content: bytes
    ranges: bool = True
    status: int | None = None
    # for the first requests in turn: bytes of the body after which the connection is closed
    cut_after_bytes: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    chunked: bool = False
    # a server that answers with another range than was requested
    range_offset_bytes: int = 0
    # where a body is cut, the connection stays open until this event is set
    silence: threading.Event | None = None
    delay_seconds: float = 0.0
    requested_ranges: list[str | None] = field(default_factory=list)
    accepted_encodings: list[str | None] = field(default_factory=list)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, site: Site, *arguments: object) -> None:
        self.site = site
        super().__init__(*arguments)  # type: ignore[arg-type]

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        site, requested_range = self.site, self.headers.get("Range")
        site.requested_ranges.append(requested_range)
        site.accepted_encodings.append(self.headers.get("Accept-Encoding"))
        if self.path == "/moved":
            self._start(302, {"Location": site.url, "Content-Length": "0"})
        elif site.status:
            self._start(site.status, {"Content-Length": "0"})
        elif requested_range and site.ranges:
            self._send_range(int(requested_range.removeprefix("bytes=").removesuffix("-")) + site.range_offset_bytes)
        else:
            self._send(200, site.content, {})

    def _send_range(self, start: int) -> None:
        total = len(self.site.content)
        if start >= total:
            self._start(416, {"Content-Range": f"bytes */{total}", "Content-Length": "0"})
        else:
            self._send(206, self.site.content[start:], {"Content-Range": f"bytes {start}-{total - 1}/{total}"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        time.sleep(self.site.delay_seconds)
        cut = self.site.cut_after_bytes.pop(0) if self.site.cut_after_bytes else len(body)
        framing = {"Transfer-Encoding": "chunked"} if self.site.chunked else {"Content-Length": str(len(body))}
        self._start(status, headers | framing | self.site.headers)
        sent = body[:cut]
        self.wfile.write(in_chunks(sent, ended=cut == len(body)) if self.site.chunked else sent)
        if cut < len(body):
            self.wfile.flush()
            if self.site.silence:
                self.site.silence.wait()
        self.close_connection = True

    def _start(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def in_chunks(body: bytes, *, ended: bool) -> bytes:
    """Return the body in HTTP's chunked transfer coding, with the end mark only if `ended`."""
    pieces = (body[start : start + 10_000] for start in range(0, len(body), 10_000))
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + (b"0\r\n\r\n" if ended else b"")
