"""Check on a GPU what the tests check on the CPU; report for each check what was found and what is allowed."""

import os
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.part import Emit, Setting
from benchmarks.gpu.toy import TWO_STEPS, toy_classifier, toy_params, toy_split
from pipeline.core.errors import UserError, first_line
from pipeline.params import TrainParams
from pipeline.training.checkpoints import Checkpoint
from pipeline.training.device import choose_device, prepare_torch
from pipeline.training.loop import TrainingResult, train
from pipeline.training.memory import explain_memory_errors
from pipeline.training.non_finite import NonFiniteGuard
from pipeline.training.state import TrainingState

CPU = torch.device("cpu")
# By network and optimizer, the largest allowed relative difference between the updates on two devices. An H100 had a
# tenth of it or less. On the CPU alone, weights that differ by 6e-8 of their size cause such differences too.
UPDATE_TOLERANCES = {
    ("lenet", "sgd"): 1e-4,
    ("lenet", "adamw"): 1e-4,
    ("lenet", "rmsprop"): 1e-4,
    ("lenet", "muon"): 2e-2,
    ("airbench", "sgd"): 3e-3,
    ("resnet18", "sgd"): 2e-1,
}
# between the last losses in mixed precision and in float32; an H100 had up to 0.09 (resnet18, sgd, float16)
LOSS_TOLERANCE = 0.3
REPEATED_TRAININGS = (("lenet", "sgd"), ("lenet", "adamw"), ("lenet", "muon"), ("airbench", "sgd"), ("resnet18", "sgd"))
DRY_REPEATED_TRAININGS = (("lenet", "adamw"), ("airbench", "sgd"))
PRECISIONS = ("none", "bfloat16", "float16")
Check = Callable[[], tuple[bool, str]]  # returns whether the check passed, and what was found


def check_correctness(setting: Setting, emit: Emit) -> None:
    """Run all checks and emit their results; a check that raises has failed, for that reason."""
    device = choose_device("cpu" if setting.dry else "cuda", field="--dry")
    # `prepare_torch` sets it too, but perhaps too late here
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    prepare_torch(toy_params("lenet", "sgd"))  # before the first operation of PyTorch
    for (model, optimizer), tolerance in UPDATE_TOLERANCES.items():
        if not setting.dry or model == "lenet":
            check = _updates_agree(model, optimizer, device=device, tolerance=tolerance)
            _emit(emit, check, check="two steps as on the CPU, relative difference", case=f"{model} {optimizer}")
    for model, optimizer in DRY_REPEATED_TRAININGS if setting.dry else REPEATED_TRAININGS:
        losses: dict[str, float] = {}
        for precision in PRECISIONS[: 1 if setting.dry and model != "lenet" else None]:
            case = f"{model} {optimizer} {precision}"
            params = _deterministic(model, optimizer, precision, device=device, dry=setting.dry)
            check = _same_bits(params, device=device, losses=losses)
            _emit(emit, check, check="same bits in a second and in a resumed training", case=case)
            if precision != "none" and {"none", precision} <= losses.keys():
                check = _losses_agree(losses, precision)
                _emit(emit, check, check="last loss in mixed precision minus that in float32", case=case)
    torch.use_deterministic_algorithms(False)
    for optimizer in ("sgd", "adamw", "muon"):
        for precision in ("none", "float16"):
            for kind, factor in (("nan", float("nan")), ("inf", float("inf")), ("inf, finite gradients", None)):
                check = _weights_stay(optimizer, precision, factor, device=device)
                case = f"lenet {optimizer} {precision}, loss {kind}"
                _emit(emit, check, check="a non-finite loss changes no weight", case=case)
    _emit(emit, _memory_is_explained(device), check="out of memory is one line", case="resnet18")


def _emit(emit: Emit, run: Check, **row: Any) -> None:
    """Run a check, and emit its result and its time."""
    start = time.perf_counter()
    try:
        is_ok, found = run()
    except Exception as error:  # the other checks still run
        traceback.print_exc()
        is_ok, found = False, f"{type(error).__name__}: {first_line(error)}"[:300]
    emit(**row, ok=is_ok, found=found, seconds=round(time.perf_counter() - start, 3))


def _updates_agree(model: str, optimizer: str, *, device: torch.device, tolerance: float) -> Check:
    """Return the check that two steps change the weights as they do on the CPU."""

    def check() -> tuple[bool, str]:
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False  # PyTorch uses TF32 for convolutions, which is less exact
        try:
            params = toy_params(model, optimizer, mixed_precision="none", **TWO_STEPS)
            difference = relative_difference(update(params, device=device), update(params, device=CPU))
        finally:
            torch.backends.cudnn.allow_tf32 = before
        return difference <= tolerance, f"{difference:.1e}, allowed {tolerance:.0e}"

    return check


def update(params: TrainParams, *, device: torch.device) -> Tensor:
    """Train, and return by how much that changes the parameters: one float64 vector on the CPU."""
    classifier = toy_classifier(params, device=device)
    before = _parameters(classifier)
    train(
        classifier,
        params=params,
        train_split=toy_split(2 * params.batch_size, seed=1, device=device),
        validation_split=toy_split(6, seed=2, device=device),
    )
    return _parameters(classifier) - before


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return |found - expected| / |expected|."""
    return float((found - expected).norm() / expected.norm())


def _parameters(classifier: torch.nn.Module) -> Tensor:
    """Return all parameters as one float64 vector on the CPU."""
    return torch.cat([value.detach().double().cpu().flatten() for value in classifier.parameters()])


def _deterministic(model: str, optimizer: str, precision: str, *, device: torch.device, dry: bool) -> TrainParams:
    """Return the parameters of a training with deterministic algorithms."""
    tiny = {"batch_size": 4, "epochs": 2} if dry else {}
    return toy_params(model, optimizer, mixed_precision=precision, deterministic=True, device=device.type, **tiny)


def _same_bits(params: TrainParams, *, device: torch.device, losses: dict[str, float]) -> Check:
    """Return the check that a second training, and one resumed within an epoch, end with the same weights.

    The check adds the last loss to `losses`, by precision.
    """

    def run(start: Checkpoint | None = None, saved: list[bytes] | None = None) -> TrainingResult:
        """Train, from `start` if given; add the checkpoint in the middle of the second epoch to `saved`."""
        steps_per_epoch = 4

        def save(checkpoint: Checkpoint) -> None:
            if saved is not None and checkpoint.step == steps_per_epoch + 2:
                saved.append(checkpoint.to_bytes())

        return train(
            toy_classifier(params, device=device),
            params=params,
            train_split=toy_split(steps_per_epoch * params.batch_size, seed=1, device=device),
            validation_split=toy_split(6, seed=2, device=device),
            start=start,
            save=save,
        )

    def check() -> tuple[bool, str]:
        prepare_torch(params)
        saved: list[bytes] = []
        whole = run(saved=saved)
        losses[params.mixed_precision] = whole.history[-1].train_loss
        others = {"twice": run(), "resumed": run(start=Checkpoint.from_bytes(saved[0]))}
        differ = [
            name
            for name, other in others.items()
            if not all(torch.equal(whole.last[key], other.last[key]) for key in whole.last)
        ]
        return not differ, f"differ: {', '.join(differ)}" if differ else "the same"

    return check


def _losses_agree(losses: dict[str, float], precision: str) -> Check:
    """Return the check that the last loss in mixed precision is close to that in float32."""
    difference = losses[precision] - losses["none"]
    return lambda: (abs(difference) <= LOSS_TOLERANCE, f"{difference:+.3f}, allowed ±{LOSS_TOLERANCE}")


def _weights_stay(optimizer: str, precision: str, factor: float | None, *, device: torch.device) -> Check:
    """Return the check that a non-finite loss, and the step after it, change no weight.

    The loss is multiplied by `factor`; None adds infinity to it, which leaves the gradients finite.
    """

    def check() -> tuple[bool, str]:
        params = toy_params("lenet", optimizer, mixed_precision=precision)
        classifier = toy_classifier(params, device=device)
        state = TrainingState(classifier, params=params)
        guard = NonFiniteGuard(state, params=params, steps_per_epoch=4)
        images = torch.ones(2, 3, 32, 32, device=device)

        def step(loss_factor: float | None) -> None:
            """Do forward pass, backward pass and update as the training loop does, with a changed loss."""
            loss = classifier(images).square().mean()
            loss = loss + float("inf") if loss_factor is None else loss * loss_factor
            classifier.zero_grad()
            watched = guard.watch(loss, mean_over_ranks=loss.detach())
            state.scaler.scale(watched).backward()  # type: ignore[no-untyped-call]
            for each_optimizer in state.optimizers:
                state.scaler.step(each_optimizer)
            state.scaler.update()

        initial = _parameters(classifier)
        step(1e-3)
        before_bad_loss = _parameters(classifier)
        if torch.equal(initial, before_bad_loss):
            return False, "the step with a finite loss changed no weight"
        for loss_factor in (factor, 1e-3):  # after the bad loss, a step with a finite loss must change nothing either
            with suppress(UserError):  # on the CPU the guard raises in the step
                step(loss_factor)
        if not torch.equal(_parameters(classifier), before_bad_loss):
            return False, "a weight changed"
        try:
            guard.raise_if_non_finite()
        except UserError as error:
            return True, first_line(error)
        return False, "no weight changed, but no error was raised"

    return check


def _memory_is_explained(device: torch.device) -> Check:
    """Return the check that running out of memory is reported in one line that names the batch size."""

    def check() -> tuple[bool, str]:
        params = toy_params("resnet18", "sgd", batch_size=4096, epochs=1)
        try:
            with explain_memory_errors(params):
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.set_per_process_memory_fraction(0.02)
                    update(params, device=device)
                else:
                    torch.empty(2**60, dtype=torch.uint8)
        except UserError as error:
            text = str(error)
            return "\n" not in text and "train.batch_size is 4096" in text, text
        finally:
            if device.type == "cuda":
                torch.cuda.set_per_process_memory_fraction(1.0)
        return False, "no error was raised"

    return check
