"""Find a free port on loopback, and prove that the server that answers there is the process that we started.

Another process may bind a port between our check that it is free and the start of our server. If that process is a
server of the same kind, it answers the same requests, so an answer proves nothing; the owner of the listening socket
does. Where the system hides the owner, our Prefect server is recognized by a token; MLflow's server can show no token.
"""

import os
import random
import socket
from collections.abc import Callable
from contextlib import closing, suppress
from typing import TypeVar

import psutil

from pipeline.core.errors import UserError

MAX_PORTS_TRIED = 100
T = TypeVar("T")


class PortTakenError(UserError):
    """The error for a port on which our server was to listen, but which another process uses."""


def is_free(port: int) -> bool:
    """Return whether a server could listen on the loopback port."""
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """Return a port of loopback that nothing listens on, below those that the system uses for outgoing connections.

    It is drawn at random, so that parallel processes get different ones.
    """
    port = random.SystemRandom().randrange(10_000, 32_000)
    return port if is_free(port) else free_port()


def port_variable(name: str, default: int) -> int:
    """Return the port number in an environment variable, else `default`; raises UserError where it is not a port."""
    text = os.environ.get(name, "") or str(default)
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= 65535:
        raise UserError(f"{name}: found {text!r}; allowed: a port number, 1 to 65535; change or unset it")
    return int(text)


def taken(port: int, *, variable: str) -> PortTakenError:
    """Return the error for a port in use; `variable` is the environment variable that chooses another one."""
    return PortTakenError(
        f"port {port} is in use; allowed: a free one; stop what uses it, or choose one with {variable}=…"
    )


def start_on_port(start: Callable[[int], T], *, named: int | None, default: int, variable: str) -> T:
    """Call `start` with a free port and return its result: with `named`, else with the first free from `default` on.

    `start` raises PortTakenError where another process has bound the port meanwhile; then the next one is tried. If the
    user named a port, no other is tried. Raises UserError where no port is left.
    """
    if named is not None:
        if not is_free(named):
            raise taken(named, variable=variable)
        return start(named)
    for port in filter(is_free, range(default, default + MAX_PORTS_TRIED)):
        with suppress(PortTakenError):
            return start(port)
    raise UserError(
        f"ports {default} to {default + MAX_PORTS_TRIED - 1} are in use; allowed: a free one; set {variable} to one"
    )


def listens(pid: int, port: int) -> bool | None:
    """Return whether the process, or a descendant of it, listens on the loopback port.

    Returns None where the system does not report it, as in a container that hides the sockets of its processes.
    """
    answers: list[bool | None] = []
    try:
        process = psutil.Process(pid)
        answers = [_owns(process, port)]
        if not answers[0]:  # listing the descendants reads the records of all processes
            answers += [_owns(child, port) for child in process.children(recursive=True)]
    except psutil.NoSuchProcess:
        pass  # it has ended, or the system hides it
    except (psutil.Error, OSError):
        answers.append(None)
    if True in answers:
        return True
    return None if None in answers or not _sockets_are_visible() else False


def _owns(process: psutil.Process, port: int) -> bool | None:
    """Return whether this process itself listens on the port, or None where the system does not report it."""
    try:
        connections = process.net_connections(kind="tcp")
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, OSError):
        return None
    return any(one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == port for one in connections)


def _sockets_are_visible() -> bool:
    """Return whether the system shows sockets, by a test with one that this process opens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        try:
            return _owns(psutil.Process(), probe.getsockname()[1]) is True
        except psutil.Error:
            return False
