"""Serve a model over HTTP until Ctrl-C: `make serve`, or `python -m pipeline.serve`.

`curl --data-binary @photo.jpg http://127.0.0.1:8080/predict` then gives class and probability. Without --model, the
champion is served, and a new champion takes over while requests are answered; docs/serve.md describes the interface.
"""

import argparse
import errno
import logging
import signal
import socket
import sys
import warnings
from contextlib import closing

import uvicorn
from PIL import Image

from pipeline.core.errors import UserError, escape_control_chars, report_errors
from pipeline.core.network import LOOPBACK
from pipeline.serving.app import App
from pipeline.serving.connection import Connection, logger
from pipeline.serving.current import CurrentModel, ServedNow, open_model
from pipeline.serving.limits import MAX_PIXELS, Limits
from pipeline.training.thresholds import COVERAGES

PORT = 8080
SIGNALS = (signal.SIGINT, signal.SIGTERM)
KEEP_ALIVE_SECONDS = 60  # of a connection without requests, after an answer
DEFAULTS = Limits()


def parse_arguments() -> argparse.Namespace:
    """Return the arguments; raises UserError for a number that is not allowed."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.serve", description="Serve a model over HTTP.")
    add = parser.add_argument
    add("--model", metavar="M", help="as for pipeline.predict (default: the champion, else artifacts/train)")
    add("--host", default=LOOPBACK[0], help="the address to listen at; there is no login (default: %(default)s)")
    add("--port", type=int, default=PORT, help="0 is any free one (default: %(default)s)")
    help_text = f"report images as unknown, unless a request has another one: {', '.join(map(str, COVERAGES))}"
    add("--coverage", type=float, metavar="C", help=help_text)
    add("--max-megabytes", type=float, default=DEFAULTS.max_bytes / 1e6, help="of a request (default: %(default)g)")
    add("--max-images", type=int, default=DEFAULTS.max_images, help="of a request (default: %(default)s)")
    help_text = "for the body to arrive, and as long again to compute the answer (default: %(default)g)"
    add("--timeout-seconds", type=float, default=DEFAULTS.timeout_seconds, help=help_text)
    help_text = "how many requests may wait for a core (default: %(default)s)"
    add("--max-waiting", type=int, default=DEFAULTS.max_waiting, help=help_text)
    add("--poll-seconds", type=float, default=2.0, help="how often to look for a new champion (default: %(default)g)")
    arguments = parser.parse_args()
    if not 0 <= arguments.port <= 65535:
        raise UserError(f"--port (PORT): found {arguments.port}; allowed: 0 to 65535; choose another one")
    for name, least in (("max_images", 1), ("max_waiting", 0)):
        if getattr(arguments, name) < least:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option}: found {getattr(arguments, name)}; allowed: {least} or more; raise it")
    for name in ("max_megabytes", "timeout_seconds", "poll_seconds"):
        if not 0 < getattr(arguments, name) < 1e6:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option}: found {getattr(arguments, name)}; allowed: above 0, below 1,000,000; change it")
    return arguments


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to the port but does not listen; raises UserError where that is not possible."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except socket.gaierror as error:
        raise UserError(f"--host: found {host}, {error.strerror}; allowed: an address of this machine") from None
    except OSError as error:
        raise _listen_error(error, host=host, port=port) from None
    return bound


def _listen_error(error: OSError, *, host: str, port: int) -> UserError:
    if error.errno == errno.EADDRINUSE:
        return UserError(
            f"port {port} is in use; allowed: a free one; stop what uses it, or choose one, as by `make serve "
            f"PORT={port + 1 if port < 65535 else PORT}`"
        )
    return UserError(f"--host {host} --port {port}: {error.strerror}; allowed: an address and a free port of yours")


def serve(current: CurrentModel, *, bound: socket.socket, host: str, limits: Limits, coverage: float | None) -> None:
    """Answer requests until a signal; then answer those in flight, and raise SystemExit(0)."""
    app = App(current, limits=limits, coverage=coverage, hosts=LOOPBACK if host in LOOPBACK else None)
    config = uvicorn.Config(
        Connection(app),
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        # a request that has begun may take this long in all
        timeout_graceful_shutdown=int(2 * limits.timeout_seconds) + 1,
    )
    for number in SIGNALS:
        signal.signal(number, _leave)  # uvicorn raises the signal again at its end
    try:
        uvicorn.Server(config).run(sockets=[bound])
    finally:
        app.workers.stop()


def _leave(_number: int, _frame: object) -> None:
    """Exit through the open `with` blocks; a second signal must not interrupt them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise SystemExit(0)


def _print_start(served: ServedNow, *, address: str, host: str) -> None:
    """Print what is served where, and the command to try."""
    name = served.name if served.version is None else f"{served.name} version {served.version}"
    print(
        escape_control_chars(f"serving {name} at {address}; Ctrl-C stops it"),
        f"curl --data-binary @photo.jpg {address}/predict",
        sep="\n",
        flush=True,
    )
    if host not in LOOPBACK:
        print(f"warning: --host {host}: there is no login; who reaches the port can use the model", file=sys.stderr)


def _log_requests() -> None:
    """Log requests to stdout: stderr is discarded while a TIFF file is decoded."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    warnings.filterwarnings("ignore", module="PIL")  # `decode` ignores them too, but that is not exact with threads


def main() -> None:
    """Load the model, print the address, and answer requests until Ctrl-C."""
    with report_errors():
        arguments = parse_arguments()
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow's limit is twice this, also for an image inside an ICO file
        limits = Limits(
            max_bytes=int(arguments.max_megabytes * 1e6),
            max_images=arguments.max_images,
            timeout_seconds=arguments.timeout_seconds,
            max_waiting=arguments.max_waiting,
        )
        host, coverage = arguments.host, arguments.coverage
        with (
            closing(bind(host, arguments.port)) as bound,  # before the model is loaded, which takes seconds
            open_model(arguments.model, poll_seconds=arguments.poll_seconds, coverage=coverage) as current,
        ):
            port = bound.getsockname()[1]
            try:
                bound.listen()
            except OSError as error:  # another process listens since then
                raise _listen_error(error, host=host, port=port) from None
            url_host = f"[{host}]" if ":" in host else host
            _log_requests()
            _print_start(current.get(), address=f"http://{url_host}:{port}", host=host)
            serve(current, bound=bound, host=host, limits=limits, coverage=coverage)


if __name__ == "__main__":
    main()
