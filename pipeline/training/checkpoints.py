"""Where an interrupted training goes on: checkpoints in `.cache/checkpoints/<fingerprint>/`, outside DVC's outputs.

A checkpoint is one safetensors file: tensors, and the rest of the state as JSON; nothing is ever unpickled. Its name
holds the step and the MD5 of its content, so that one rename makes it valid, and damage shows. The fingerprint is of
all that determines the training: whoever has another one never sees the file.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline.artifacts import bytes_md5, kept_folder, write_bytes
from pipeline.core.errors import TemporaryError

KEPT = 2
"""The newest, and the one before it, should the newest be damaged."""
_NAME = re.compile(r"step-(\d+)-([0-9a-f]{32})\.safetensors")
_STATE = "state"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training after `step` steps: `tensors` of any type, and `state`, which JSON can hold."""

    step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Same state, same bytes."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        content = {"step": self.step, **self.state}
        return safetensors.torch.save(tensors, {_STATE: json.dumps(content, sort_keys=True)})

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Raises ValueError where it is no checkpoint."""
        try:
            length = int.from_bytes(content[:8], "little")
            state = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][_STATE])
            return cls(state.pop("step"), safetensors.torch.load(content), state)
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a checkpoint ({error})") from None


class Checkpoints:
    """Those of one training, in a folder that this process alone uses."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def newest(self) -> Checkpoint | None:
        """The newest whose content is as it was written; a line is printed for each that is not."""
        for path in self._files():
            try:
                content = path.read_bytes()
                if bytes_md5(content) != _NAME.fullmatch(path.name)[2]:  # type: ignore[index]
                    raise ValueError("its MD5 is not that of its name")
                return Checkpoint.from_bytes(content)
            except (OSError, ValueError) as error:
                print(f"warning: {path}: damaged ({error}); the checkpoint before it is used, if any", flush=True)
                path.unlink(missing_ok=True)
        return None

    def write(self, checkpoint: Checkpoint) -> None:
        """Write it whole or not at all, then remove those that are no longer needed; raises OSError."""
        content = checkpoint.to_bytes()
        newest = self._folder / f"step-{checkpoint.step:010}-{bytes_md5(content)}.safetensors"
        write_bytes(newest, content)
        kept = {newest, *[path for path in self._files() if path != newest][: KEPT - 1]}
        for path in set(self._folder.iterdir()) - kept:  # also what a killed process was writing
            path.unlink()

    def remove(self) -> None:
        """Forget them all, at once: a killed process leaves all or none."""
        if self._folder.exists():
            gone = self._folder.with_suffix(".gone")
            shutil.rmtree(gone, ignore_errors=True)
            self._folder.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)

    def _files(self) -> list[Path]:
        """Newest first."""
        return sorted((path for path in self._folder.glob("step-*") if _NAME.fullmatch(path.name)), reverse=True)


def checkpoint_folder() -> Path:
    """Where the checkpoints of all trainings of the project lie."""
    return kept_folder("checkpoints")


def fingerprint(**determines: Any) -> str:
    """One hash of everything that determines a training."""
    return bytes_md5(json.dumps(determines, sort_keys=True, default=str).encode())


@contextmanager
def checkpoints_of(training: str) -> Iterator[Checkpoints]:
    """The checkpoints of the training of this fingerprint, for one process at a time; others wait.

    They are removed when the block is done, and stay where it raises. Raises TemporaryError in a process that waited
    for another one which finished the training: its result is to be had from DVC now.
    """
    lock_path = checkpoint_folder() / f"{training}.lock"
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    with lock_path.open("a") as lock:
        _wait_for(lock.fileno())
        if not _is(lock_path, lock.fileno()):
            raise TemporaryError(
                "another process has just finished this very training; run the same command again: DVC has its result"
            )
        found = Checkpoints(checkpoint_folder() / training)
        yield found
        found.remove()
        lock_path.unlink()


def _wait_for(lock: int) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("another process is at this very training: waiting until it ends", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)


def _is(path: Path, descriptor: int) -> bool:
    """Whether the open file still has this path."""
    return path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor))


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`<prefix>.<name>` for each name."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def unprefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose name begins with `<prefix>.`, without that."""
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """`optimizer.<its number>.<number of the parameter>.<name>`; all that our optimizers remember are tensors."""
    return {
        f"optimizer.{place}.{number}.{name}": tensor
        for place, optimizer in enumerate(optimizers)
        for number, values in optimizer.state_dict()["state"].items()
        for name, tensor in values.items()
    }


def restore_optimizers(optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor]) -> None:
    """Be as when `optimizer_tensors`, without their prefix, were these."""
    for place, optimizer in enumerate(optimizers):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in unprefixed(str(place), tensors).items():
            number, _, kind = name.partition(".")
            parameter = parameters[int(number)]
            # laid out in memory as the parameter is: sums over another layout may be rounded otherwise
            laid_out = torch.empty_like(parameter).copy_(tensor) if tensor.shape == parameter.shape else tensor
            state.setdefault(int(number), {})[kind] = laid_out
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def random_states(device: torch.device) -> dict[str, Tensor]:
    """`random.<device>`: those of PyTorch's own generators, on the CPU and on the device, uint8."""
    states = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        states["random.mps"] = torch.mps.get_rng_state()
    return states


def restore_random_states(tensors: Mapping[str, Tensor], *, device: torch.device) -> None:
    torch.set_rng_state(tensors["random.cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"], device)
    if device.type == "mps":
        torch.mps.set_rng_state(tensors["random.mps"])
