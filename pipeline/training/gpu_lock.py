"""Let one training at a time use a GPU: each GPU has a lock file, which the training itself locks.

The lock files are in a folder that all users of the machine share. The kernel releases a lock when its process ends,
also after SIGKILL, so no stale lock can remain. The text in a lock file names the holder; no decision depends on
it.
"""

import errno
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pipeline.core.errors import escape_control_chars, first_line
from pipeline.core.project import project_folder

LOCK_FOLDER = Path("/tmp")  # noqa: S108  # shared on purpose: TMPDIR may name a folder of this user alone
# Every user may lock the file. The sticky bit stops systemd-tmpfiles from deleting it while it is locked.
LOCK_FILE_MODE = 0o1666
MAX_HOLDER_BYTES = 1000  # of the text that names the holder


@contextmanager
def exclusive_gpus(uuids: Sequence[str]) -> Iterator[None]:
    """Hold the lock of each GPU during the block; wait, with one log line, while another training holds it.

    All trainings take their locks in the same order, so no two of them can wait for each other. A signal handler that
    raises ends the wait. Where a lock file cannot be used, the block runs without this lock, after a warning.
    """
    with ExitStack() as locks:
        for uuid in sorted(set(uuids)):
            try:
                locks.enter_context(_locked(uuid))
            except OSError as error:
                print(
                    f"warning: the lock file {lock_file(uuid)} of a GPU cannot be used ({error.strerror}): another "
                    "training may use this GPU at the same time; remove the file, or ask its owner to",
                    flush=True,
                )
        yield


def describe_holder(uuids: Sequence[str], text: str) -> None:
    """Append `text`, such as the id of the holder's MLflow run, to the lock files of these GPUs."""
    for uuid in uuids:
        with suppress(OSError), os.fdopen(_open(lock_file(uuid)), "ab") as file:
            file.write(f", {escape_control_chars(text)}".encode())


def lock_file(uuid: str) -> Path:
    """Return the path of the lock file of a GPU."""
    return LOCK_FOLDER / f"pipeline-gpu-{uuid}.lock"


@contextmanager
def _locked(uuid: str) -> Iterator[None]:
    """Hold the lock of one GPU during the block, with this process named in the lock file."""
    descriptor = _lock(uuid)
    try:
        with suppress(OSError):  # a full disk
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, escape_control_chars(f"process {os.getpid()} in {project_folder()}").encode(), 0)
        yield
    finally:
        with suppress(OSError):
            os.ftruncate(descriptor, 0)
        os.close(descriptor)


def _lock(uuid: str) -> int:
    """Return an open descriptor of the lock file of a GPU, once it is locked."""
    while True:
        descriptor = _open(lock_file(uuid))
        try:
            _wait_for_lock(descriptor, uuid=uuid)
            if os.fstat(descriptor).st_nlink > 0:
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # deleted during the wait: later trainings lock another file


def _wait_for_lock(descriptor: int, *, uuid: str) -> None:
    """Lock the file; where another process holds the lock, log which one, and wait until it has ended."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for GPU {uuid}, held by {_holder(descriptor)}", flush=True)
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _holder(descriptor: int) -> str:
    """Return the text in a lock file as one line without control characters, since any user may have written it."""
    text = os.pread(descriptor, MAX_HOLDER_BYTES, 0).decode(errors="replace")
    return first_line(text) if text.strip() else "another process"


def _open(path: Path) -> int:
    """Return a descriptor of the lock file, which is created where it is missing.

    Raises OSError for a link and for anything but a regular file: another user could have put it there to make us
    overwrite the file behind it.
    """
    while True:
        try:
            # without O_CREAT: in a sticky folder, Linux then refuses files of other users (fs.protected_regular)
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            break
        except FileNotFoundError:
            with suppress(FileExistsError):  # another process has just created it
                _create(path)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_nlink <= 1:
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a regular file with one name", str(path))


def _create(path: Path) -> None:
    """Create a lock file that every user may lock."""
    mask = os.umask(0)  # so that the file never exists without its full mode
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, LOCK_FILE_MODE))
    finally:
        os.umask(mask)
