"""Errors that a user can act on: one line and an exit status, never a traceback.

The text of an error is written where it is raised; the texts about parameter values are in `core/validation.py`.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from pipeline.core.project import temporary_folder_owner
from pipeline.core.settings import get_settings

EXIT_USER = 2  # a mistake that only the user can fix: a retry does not help
EXIT_PARTIAL = 3  # some of many items failed, each reported with its reason; all others were processed
EXIT_TEMPORARY = 75  # a failure that may pass, such as of the network: retry (EX_TEMPFAIL of sysexits.h)
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_PIPE = 128 + signal.SIGPIPE
EXIT_TERMINATED = 128 + signal.SIGTERM
STARTS_AGAIN = "the same command starts again"  # the remedy for an interrupted step, unless the exception has its own


class UserError(ValueError):
    """A mistake in the input, as one line: which field or file, what was found, what is allowed, what to do."""


class TemporaryError(RuntimeError):
    """A failure outside the program, such as of the network, as one line; a later try may succeed."""


class PartialError(RuntimeError):
    """A result without some of its items: each failed item was reported with its reason, all others were processed."""


class Terminated(KeyboardInterrupt):
    """The exception that SIGTERM raises in the main thread while `report_errors` is active."""


def escape_control_chars(text: str) -> str:
    """Return the text with control characters, terminal codes and direction marks escaped, as in `\\x1b`."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def first_line(error: object) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return escape_control_chars(next(iter(str(error).strip().splitlines()), type(error).__name__))


def shorten(text: str, length: int) -> str:
    """Return the text, or the first `length` characters of a longer one, followed by "…"."""
    return text if len(text) <= length else f"{text[:length]}…"


def redact_url(url: str) -> str:
    """Return a URL or path without what may be secret in it: user, password and query."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme.partition("+")[0] == "sqlite":  # a file, whose name may have a # in it
        return url
    host, slash, path = rest.partition("/")
    # user and password are removed before the query, as a password may have a # or ? in it
    address = host.rpartition("@")[2] + slash + path
    return scheme + separator + address.partition("#")[0].partition("?")[0]


@contextmanager
def report_errors() -> Iterator[None]:
    """Turn errors that a user can act on, and SIGTERM, into one line on stderr and an exit status.

    Any other exception is a defect of ours and keeps its traceback.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        _exit(str(error), EXIT_USER)
    except TemporaryError as error:
        _exit(str(error), EXIT_TEMPORARY)
    except PartialError as error:
        _exit(str(error), EXIT_PARTIAL)
    except Terminated as error:
        _exit(f"terminated by SIGTERM; {error.args[0] if error.args else STARTS_AGAIN}", EXIT_TERMINATED)
    except KeyboardInterrupt as error:
        _exit(f"interrupted; {error.args[0] if error.args else STARTS_AGAIN}", EXIT_INTERRUPTED)
    except MemoryError:
        _exit("the memory is full; end other programs, or lower the batch size", EXIT_USER)
    except BrokenPipeError:  # the reader of our output has ended, as in `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_PIPE)
    except OSError as error:
        if error.filename is None:
            raise
        denied = isinstance(error, PermissionError)
        remedy = (
            "check who may read and write it"
            if denied
            else "check that the disk has room and the folder can be written"
        )
        _exit(f"{error.filename}: {error.strerror}; {remedy}", EXIT_USER)


def _terminate(_signum: int, _frame: Any) -> NoReturn:
    raise Terminated


def _exit(message: str, status: int) -> NoReturn:
    """Print the message as one line on stderr, and exit with the status."""
    # DVC removes a stage's outputs before it runs the stage, but its cache still has them
    settings = get_settings()
    in_checkout = not settings.in_flow_clone and temporary_folder_owner() is None
    if settings.in_dvc_stage and in_checkout:
        message += "; `dvc checkout` restores the last good outputs"
        if settings.in_dvc_experiment:  # `dvc exp run -S` has written its values into the file
            message += ", and `git checkout params.yaml` the committed parameters"
    print(f"error: {escape_control_chars(' '.join(message.split()))}", file=sys.stderr, flush=True)
    sys.exit(status)
