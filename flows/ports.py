"""Ports on loopback: which is free, and the proof that the server that answers at one is the process that we started.

A port that was free a moment ago may be bound by somebody else before our server binds it. The other server answers the
same requests, so an answer proves nothing; the owner of the listening socket does. Where the system hides that one, a
Prefect server of ours is known by a token that it was started with; MLflow's has nothing alike to show.
"""

import os
import socket
from collections.abc import Callable
from contextlib import closing, suppress
from typing import TypeVar

import psutil

from pipeline.core.errors import UserError

PORTS_TRIED = 100
T = TypeVar("T")


class PortTakenError(UserError):
    """Another process has the port that our server was to listen on."""


def is_free(port: int) -> bool:
    """Whether a server could listen on the loopback port."""
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def port_variable(name: str, default: int) -> int:
    """A port number from the environment; raises UserError where it is none."""
    text = os.environ.get(name, "") or str(default)
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= 65535:
        raise UserError(f"{name}: found {text!r}; allowed: a port number, 1 to 65535")
    return int(text)


def taken(port: int, *, variable: str) -> PortTakenError:
    return PortTakenError(
        f"port {port} is in use; allowed: a free one; stop what uses it, or choose one with {variable}=…"
    )


def start_on_port(start: Callable[[int], T], *, named: int | None, default: int, variable: str) -> T:
    """Call `start` with a free port: `named`, or else the first from `default` on that it does not lose to others.

    `start` raises PortTakenError where another process was faster. A port that the user named is the only one that is
    tried. Raises UserError where no port is left.
    """
    if named is not None:
        if not is_free(named):
            raise taken(named, variable=variable)
        return start(named)
    for port in filter(is_free, range(default, default + PORTS_TRIED)):
        with suppress(PortTakenError):
            return start(port)
    raise UserError(
        f"ports {default} to {default + PORTS_TRIED - 1} are in use; allowed: a free one; choose one with {variable}=…"
    )


def listens(pid: int, port: int) -> bool | None:
    """Whether the process, or one below it, is the one that listens on the loopback port.

    None where the system does not say, as in a container that hides its processes' sockets: then nothing is proven.
    """
    answers: list[bool | None] = []
    try:
        process = psutil.Process(pid)
        answers = [_owns(process, port)]
        if not answers[0]:  # to list its children takes a look at all processes
            answers += [_owns(child, port) for child in process.children(recursive=True)]
    except psutil.NoSuchProcess:
        pass  # it has ended, or it is hidden
    except (psutil.Error, OSError):
        answers.append(None)
    if True in answers:
        return True
    return None if None in answers or not _sockets_are_visible() else False


def _owns(process: psutil.Process, port: int) -> bool | None:
    try:
        found = process.net_connections(kind="tcp")
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, OSError):
        return None
    return any(one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == port for one in found)


def _sockets_are_visible() -> bool:
    """Whether the system shows a socket that certainly is there: one of this process."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        try:
            return _owns(psutil.Process(), probe.getsockname()[1]) is True
        except psutil.Error:
            return False
