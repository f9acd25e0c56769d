"""Checkpoints, from which an interrupted training resumes: `.cache/checkpoints/<fingerprint>/`, outside DVC's outputs.

What a checkpoint holds is in `state.py`, when it is written in `saving.py`. It is one safetensors file: tensors, and
the rest of the state as JSON; nothing is ever unpickled. Its name holds the step and the MD5 of its content, so that
one rename makes it valid, and damage is detected. The fingerprint is a hash of all that determines the training:
another training never sees the file.
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

KEPT = 2  # the newest, and the one before it in case the newest is damaged
_NAME = re.compile(r"step-(\d+)-([0-9a-f]{32})\.safetensors")
_STATE = "state"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training after `step` steps: `tensors` of any type, and `state`, which JSON can hold."""

    step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return the file's content; the same state gives the same bytes."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        content = {"step": self.step, **self.state}
        return safetensors.torch.save(tensors, {_STATE: json.dumps(content, sort_keys=True)})

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Return the checkpoint in a file's content; raises ValueError where there is none."""
        try:
            length = int.from_bytes(content[:8], "little")
            state = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][_STATE])
            return cls(state.pop("step"), safetensors.torch.load(content), state)
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a checkpoint ({error})") from None


class Checkpoints:
    """The checkpoints of one training, in a folder that only this process uses."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def newest(self) -> Checkpoint | None:
        """Return the newest checkpoint whose content has its MD5; prints a warning for each that has not."""
        for path in self._files():
            try:
                content = path.read_bytes()
                if bytes_md5(content) != _NAME.fullmatch(path.name)[2]:  # type: ignore[index]
                    raise ValueError("its MD5 is not the one in its name")
                return Checkpoint.from_bytes(content)
            except (OSError, ValueError) as error:
                print(f"warning: {path}: damaged ({error}); the checkpoint before it is used, if any", flush=True)
                path.unlink(missing_ok=True)
        return None

    def write(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint whole or not at all, then remove those no longer needed; raises OSError."""
        content = checkpoint.to_bytes()
        step = f"step-{checkpoint.step:010}-"
        newest = self._folder / f"{step}{bytes_md5(content)}.safetensors"
        write_bytes(newest, content)
        # one before the validation that followed the same step is no longer needed
        older = [path for path in self._files() if not path.name.startswith(step)]
        kept = {newest, *older[: KEPT - 1]}
        for path in set(self._folder.iterdir()) - kept:  # also what a killed process was writing
            path.unlink()

    def remove(self) -> None:
        """Remove all checkpoints at once: a killed process leaves all or none."""
        if self._folder.exists():
            gone = self._folder.with_suffix(".gone")
            shutil.rmtree(gone, ignore_errors=True)
            self._folder.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)

    def _files(self) -> list[Path]:
        """Return the checkpoint files, the newest first."""
        return sorted((path for path in self._folder.glob("step-*") if _NAME.fullmatch(path.name)), reverse=True)


def checkpoint_folder() -> Path:
    """Return the folder with the checkpoints of all trainings of the project."""
    return cache_folder("checkpoints")


def fingerprint(**determines: Any) -> str:
    """Return one hash of everything that determines a training."""
    return bytes_md5(json.dumps(determines, sort_keys=True, default=str).encode())


@contextmanager
def checkpoints_of(training: str) -> Iterator[Checkpoints]:
    """Give one process at a time the checkpoints of the training with this fingerprint; others wait.

    The checkpoints are removed when the block is done, and stay where it raises. Raises TemporaryError in a process
    that waited for another one which finished the training: DVC has its result now.
    """
    lock_path = checkpoint_folder() / f"{training}.lock"
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    with lock_path.open("a") as lock:
        _wait_for(lock.fileno())
        if not _is(lock_path, lock.fileno()):
            raise TemporaryError(
                "another process has just finished this training; run the same command again: DVC has its result"
            )
        found = Checkpoints(checkpoint_folder() / training)
        yield found
        found.remove()
        lock_path.unlink()


def _wait_for(lock: int) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("another process runs this training: waiting until it ends", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)


def _is(path: Path, descriptor: int) -> bool:
    """Return whether the open file still has this path."""
    return path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor))
