"""Write and read the checkpoints from which an interrupted training resumes.

They are in `.cache/checkpoints/<fingerprint>/`, outside DVC's outputs. The fingerprint is a hash of all that determines
the training, so no other training uses them. A checkpoint is one safetensors file: tensors, and the rest of the state
as JSON; nothing is ever unpickled. Its name holds the step and the MD5 of its content, so that one rename makes it
valid, and damage is detected. `state.py` decides what a checkpoint holds, `saving.py` when it is written.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline.artifacts import bytes_md5, cache_folder, write_bytes
from pipeline.core.errors import TemporaryError

MAX_CHECKPOINTS = 2  # of one training: the newest, and the one before it in case the newest is damaged
_FILE_NAME = re.compile(r"step-(\d+)-([0-9a-f]{32})\.safetensors")
_STATE_KEY = "state"  # of the JSON in the metadata of the safetensors file


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training after `step` steps: `tensors` of any dtype, and `state`, which must fit into JSON."""

    step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return the content of the checkpoint's file; the same state gives the same bytes."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        content = {"step": self.step, **self.state}
        return safetensors.torch.save(tensors, {_STATE_KEY: json.dumps(content, sort_keys=True)})

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Return the checkpoint that a file with this content holds; raise ValueError where it holds none."""
        try:
            length = int.from_bytes(content[:8], "little")
            state = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][_STATE_KEY])
            return cls(state.pop("step"), safetensors.torch.load(content), state)
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a checkpoint ({error})") from None


class Checkpoints:
    """The checkpoints of one training, in a folder that only this process uses."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def newest(self) -> Checkpoint | None:
        """Return the newest undamaged checkpoint, or None; print a warning for each damaged one, and delete it."""
        for path in self._files():
            try:
                content = path.read_bytes()
                if bytes_md5(content) != _FILE_NAME.fullmatch(path.name)[2]:  # type: ignore[index]
                    raise ValueError("its MD5 is not the one in its name")
                return Checkpoint.from_bytes(content)
            except (OSError, ValueError) as error:
                print(f"warning: {path}: damaged ({error}); the checkpoint before it is used, if any", flush=True)
                path.unlink(missing_ok=True)
        return None

    def write(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, whole or not at all, then remove those no longer needed; raise OSError on failure."""
        content = checkpoint.to_bytes()
        step = f"step-{checkpoint.step:010}-"
        newest = self._folder / f"{step}{bytes_md5(content)}.safetensors"
        write_bytes(newest, content)
        # another checkpoint of the same step is from before the validation that follows it: no longer needed
        older = [path for path in self._files() if not path.name.startswith(step)]
        needed = {newest, *older[: MAX_CHECKPOINTS - 1]}
        for path in set(self._folder.iterdir()) - needed:  # includes what a killed process was writing
            path.unlink()

    def remove(self) -> None:
        """Remove all checkpoints at once, so that a process killed here leaves all of them or none."""
        if self._folder.exists():
            gone = self._folder.with_suffix(".gone")
            shutil.rmtree(gone, ignore_errors=True)
            self._folder.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)

    def _files(self) -> list[Path]:
        """Return the checkpoint files, the newest first."""
        return sorted((path for path in self._folder.glob("step-*") if _FILE_NAME.fullmatch(path.name)), reverse=True)


def checkpoint_folder() -> Path:
    """Return the folder with the checkpoints of all trainings of the project."""
    return cache_folder("checkpoints")


def fingerprint(**determinants: Any) -> str:
    """Return one hash of everything that determines a training; values that JSON lacks count as their text."""
    return bytes_md5(json.dumps(determinants, sort_keys=True, default=str).encode())


@contextmanager
def checkpoints_of(training: str) -> Iterator[Checkpoints]:
    """Yield the checkpoints of the training with this fingerprint, to one process at a time; the others wait.

    The checkpoints are removed when the block ends, and stay where it raises. Raises TemporaryError where this process
    waited for another one, which has finished the training: DVC has its result now.
    """
    lock_path = checkpoint_folder() / f"{training}.lock"
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    with lock_path.open("a") as lock:
        _wait_for_lock(lock.fileno())
        if not _is_still_at(lock_path, lock.fileno()):
            raise TemporaryError(
                "another process has just finished this training; run the same command again: DVC has its result"
            )
        checkpoints = Checkpoints(checkpoint_folder() / training)
        yield checkpoints
        checkpoints.remove()
        lock_path.unlink()


def _wait_for_lock(lock: int) -> None:
    """Lock the open file; where another process holds the lock, report that and wait."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("another process runs this training: waiting until it ends", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)


def _is_still_at(path: Path, descriptor: int) -> bool:
    """Return whether this path still names the open file, which another process may have deleted."""
    return path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor))
