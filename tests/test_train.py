import itertools
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.arrays import Split
from pipeline.core.errors import UserError
from pipeline.core.yaml import dump_yaml
from pipeline.models.build import build
from pipeline.models.losses import loss_function
from pipeline.params import TrainParams
from pipeline.train import main
from pipeline.training import device, non_finite
from pipeline.training import state as state_module
from pipeline.training.lookahead import Lookahead
from pipeline.training.loop import TrainingResult, train, validate_before_training
from pipeline.training.optimizer import make_optimizers, set_learning_rate
from pipeline.training.schedule import learning_rate
from pipeline.training.state import TrainingState, copy_weights
from tests.conftest import DEFAULTS, colored_images, read_until, run_step, start_step, train_params, write_normalized
from tests.test_model import config

OPTIMIZERS = {
    "sgd": {"optimizer": "sgd", "momentum": 0.0, "nesterov": False},
    "momentum": {"optimizer": "sgd", "momentum": 0.9, "nesterov": False},
    "nesterov": {"optimizer": "sgd", "momentum": 0.9, "nesterov": True},
    "adam": {"optimizer": "adam", "learning_rate": 0.002, "momentum": 0.0, "nesterov": False},
    "adamw": {"optimizer": "adamw", "learning_rate": 0.002, "momentum": 0.0, "nesterov": False},
    "rmsprop": {"optimizer": "rmsprop", "learning_rate": 0.001, "momentum": 0.0, "nesterov": False},
    "muon": {"optimizer": "muon", "learning_rate": 0.02, "momentum": 0.9, "nesterov": True},
}
QUICK = {"epochs": 2, "batch_size": 16, "schedule": "constant", "warmup_fraction": 0.0}


def split_of(number: int, *, seed: int) -> Split:
    images, labels = colored_images(number, seed=seed)
    return Split.of(images, labels, mean=[0.4] * 3, std=[0.25] * 3, device=torch.device("cpu"))


def run(params: TrainParams, *, images: int = 48) -> TrainingResult:
    torch.manual_seed(params.seed)
    classifier = build(config(params.model, classes=3))
    return train(classifier, params=params, train_split=split_of(images, seed=1), validation_split=split_of(24, seed=2))


DEEP = [("cross_entropy", "nesterov"), ("mse", "adamw")]


@pytest.mark.parametrize(
    ("model", "loss", "optimizer"),
    [
        *itertools.product(["lenet"], ["cross_entropy", "mse"], OPTIMIZERS),
        *(pytest.param("resnet18", *pair, marks=pytest.mark.slow) for pair in DEEP),
        *(("mobilenet_v3_small", *pair) for pair in DEEP),
    ],
)
def test_every_model_loss_and_optimizer_trains(model: str, loss: str, optimizer: str) -> None:
    params = train_params(model=model, loss=loss, **QUICK, **{"learning_rate": 0.005} | OPTIMIZERS[optimizer])
    trained = run(params)
    torch.manual_seed(params.seed)
    before = build(config(model, classes=3)).state_dict()
    assert all(np.isfinite(vars(epoch)["train_loss"]) for epoch in trained.history)
    assert any(not torch.equal(trained.last[name], before[name]) for name in before)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_lenet_learns_with_every_optimizer(optimizer: str) -> None:
    rate = {} if "learning_rate" in OPTIMIZERS[optimizer] else {"learning_rate": 0.1 if optimizer == "sgd" else 0.01}
    trained = run(train_params(**QUICK | {"epochs": 12}, **OPTIMIZERS[optimizer] | rate), images=240)
    assert trained.history[-1].train_loss < 0.5 * trained.history[0].train_loss
    assert trained.history[-1].validation_accuracy > 0.9


def test_two_runs_are_bit_identical() -> None:
    params = train_params(**QUICK, flip=True, crop_padding=3, cutout_size=8)
    first, second = run(params), run(params)
    assert first.history == second.history
    assert all(torch.equal(first.last[name], second.last[name]) for name in first.last)


def test_another_seed_gives_another_model() -> None:
    first, second = run(train_params(**QUICK)), run(train_params(**QUICK, seed=1))
    assert not torch.equal(first.last["network.0.weight"], second.last["network.0.weight"])


def test_dropout_depends_only_on_the_seed() -> None:
    params = train_params(**QUICK | {"epochs": 1}, model="mobilenet_v3_small")
    assert run(params).history == run(params).history


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("mobilenet_v3_small", {}),  # with batch normalization and dropout
        ("lenet", {"ema_decay": 0.9, "mixed_precision": "bfloat16"}),
        ("airbench", {"average_every_steps": 2}),
    ],
)
def test_a_validation_before_the_training_changes_no_bit_of_it(model: str, changes: dict[str, Any]) -> None:
    params, validation_split = train_params(**QUICK, model=model, **changes), split_of(24, seed=2)
    results = []
    for with_validation in (False, True):
        torch.manual_seed(params.seed)
        classifier = build(config(model, classes=3))
        weights, random_state = copy_weights(classifier), torch.get_rng_state()
        if with_validation:
            assert 0 < validate_before_training(classifier, validation_split, params=params).loss < 10
        assert torch.equal(torch.get_rng_state(), random_state)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in classifier.state_dict().items())
        train_split = split_of(48, seed=1)
        results.append(train(classifier, params=params, train_split=train_split, validation_split=validation_split))
    assert results[0].history == results[1].history
    assert all(torch.equal(results[0].last[name], results[1].last[name]) for name in results[0].last)


def test_losses_equal_the_recorded_ones() -> None:
    trained = run(train_params(**QUICK | {"epochs": 3}))
    losses = [epoch.train_loss for epoch in trained.history]
    assert losses == pytest.approx([1.0922, 1.0054, 0.5302], rel=0.02)


def test_sgd_without_momentum_follows_the_bare_update_rule() -> None:
    network = nn.Linear(3, 1, bias=False)
    network.weight.data = torch.tensor([[1.0, -2.0, 3.0]])
    weight = network.weight
    params = train_params(optimizer="sgd", momentum=0.0, nesterov=False, weight_decay=0.0, learning_rate=0.1)
    [optimizer] = make_optimizers(network, params=params)
    (weight**2).sum().backward()  # type: ignore[no-untyped-call]
    expected = weight.detach() - 0.1 * weight.grad  # type: ignore[operator]
    optimizer.step()
    assert torch.equal(weight.detach(), expected)


def test_mse_compares_with_one_hot_targets_of_the_shape_of_the_output() -> None:
    logits, labels = torch.tensor([[0.5, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])
    assert loss_function("mse")(logits, labels).item() == pytest.approx((0.25 + 0 + 0 + 1) / 4)


def test_label_smoothing_equals_that_of_pytorch() -> None:
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    ours = loss_function("cross_entropy", label_smoothing=0.1)(logits, labels)
    assert torch.equal(ours, nn.functional.cross_entropy(logits, labels, label_smoothing=0.1))


def rates(params: TrainParams, steps_per_epoch: int = 10) -> list[float]:
    steps = range(params.epochs * steps_per_epoch)
    return [learning_rate(step, steps_per_epoch=steps_per_epoch, params=params) for step in steps]


def pytorch_rates(scheduler_of: object, params: TrainParams, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=params.learning_rate)
    scheduler = scheduler_of(optimizer)  # type: ignore[operator]
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_the_one_cycle_schedule_equals_that_of_pytorch() -> None:
    params = train_params(schedule="one_cycle", epochs=10, warmup_fraction=0.3)
    schedulers = torch.optim.lr_scheduler
    reference = pytorch_rates(
        lambda o: schedulers.OneCycleLR(o, params.learning_rate, total_steps=100, pct_start=0.3), params, 100
    )
    assert rates(params) == pytest.approx(reference)


def test_the_cosine_schedule_equals_that_of_pytorch() -> None:
    params = train_params(schedule="cosine", epochs=10, warmup_fraction=0.0)
    reference = pytorch_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 100), params, 100)
    assert rates(params) == pytest.approx(reference)


def test_the_step_schedule_equals_that_of_pytorch() -> None:
    params = train_params(schedule="step", epochs=10, warmup_fraction=0.0, step_epochs=3, step_factor=0.5)
    reference = pytorch_rates(lambda o: torch.optim.lr_scheduler.StepLR(o, 30, 0.5), params, 100)
    assert rates(params) == pytest.approx(reference)


@pytest.mark.parametrize("schedule", ["constant", "step", "linear", "cosine", "one_cycle"])
def test_every_schedule_rises_to_its_peak_during_the_warm_up(schedule: str) -> None:
    found = rates(train_params(schedule=schedule, epochs=10, warmup_fraction=0.2, step_epochs=4))
    assert found[:20] == sorted(found[:20])
    assert max(found) == pytest.approx(0.05)
    assert all(rate <= 0.05 for rate in found)


@pytest.mark.parametrize("warmup_fraction", [0.0, 0.01, 0.99])
def test_the_one_cycle_schedule_accepts_extreme_warm_ups(warmup_fraction: float) -> None:
    found = rates(train_params(schedule="one_cycle", epochs=2, warmup_fraction=warmup_fraction))
    assert all(0 < rate <= 0.05 for rate in found)


def test_the_linear_schedule_rises_from_a_fifth_and_falls_to_seven_hundredths() -> None:
    found = rates(train_params(schedule="linear", epochs=10, warmup_fraction=0.2))
    assert found[0] == pytest.approx(0.01)
    assert found[20] == max(found) == pytest.approx(0.05)
    assert found[60] == pytest.approx(0.05 * (1 - 0.93 / 2))
    assert found[-1] == pytest.approx(0.05 * 0.07, rel=0.2)


@pytest.mark.parametrize("total", [5, 6])
def test_lookahead_follows_its_rule_and_ends_with_the_slow_weights(total: int) -> None:
    network = nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(1.0)
    lookahead = Lookahead(network, every=2)
    slow = 1.0
    for step in range(1, total + 1):
        network.weight.data += 1
        fast = network.weight.item()
        lookahead.step(step, total=total)
        if step % 2 == 0:
            kept = 0.95**2 * (step / total) ** 3
            slow = kept * slow + (1 - kept) * fast
            assert network.weight.item() == pytest.approx(slow)
    assert network.weight.item() == pytest.approx(slow)


def test_the_biases_of_batch_normalization_can_have_their_own_learning_rate() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    [optimizer] = make_optimizers(network, params=train_params(bias_learning_rate_factor=4.0, weight_decay=0.1))
    set_learning_rate([optimizer], 0.5)
    rest, biases = optimizer.param_groups
    assert (rest["lr"], rest["weight_decay"], len(rest["params"])) == (0.5, 0.1, 3)
    assert (biases["lr"], biases["weight_decay"], biases["params"]) == (2.0, 0.025, [network[1].bias])


class SyncCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own class is untyped
    """A counter of the values that the host reads from a device, each of which waits for a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **kwargs or {})


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a training on the CPU check for non-finite losses as on a GPU, only when it logs."""
    monkeypatch.setattr(non_finite, "can_raise_at_once", lambda state: False)


def count_syncs(*, images: int, log_every_steps: int = 1000) -> int:
    """Return how many values the host reads from the device in one epoch of `images / 16` steps."""
    params = train_params(**QUICK | {"epochs": 1}, log_every_steps=log_every_steps, flip=True, gradient_clip_norm=1.0)
    with SyncCounter() as counter:
        run(params, images=images)
    return int(counter.number)


def test_no_step_reads_a_value_from_the_device(as_on_a_gpu: None) -> None:
    assert count_syncs(images=96) == count_syncs(images=192)
    assert count_syncs(images=96, log_every_steps=3) > count_syncs(images=96)


@pytest.mark.parametrize("precision", [None, torch.float16])
def test_a_non_finite_loss_changes_no_weight_until_it_is_checked(
    as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch, precision: torch.dtype | None
) -> None:
    monkeypatch.setattr(state_module, "autocast_dtype", lambda name, *, device: precision)
    params, classifier = train_params(**QUICK), build(config("lenet", classes=3))
    state = TrainingState(classifier, params=params)
    guard = non_finite.NonFiniteGuard(state, params=params, steps_per_epoch=4)

    def step(factor: float) -> None:
        loss = classifier(torch.ones(2, 3, 32, 32)).square().mean() * factor
        classifier.zero_grad()
        state.scaler.scale(guard.watch(loss, mean_over_ranks=loss.detach())).backward()  # type: ignore[no-untyped-call]
        for optimizer in state.optimizers:
            state.scaler.step(optimizer)
        state.scaler.update()

    step(1e-6)
    before = copy_weights(classifier)
    step(torch.nan)
    step(1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())
    with pytest.raises(UserError, match="epoch 1, step 2: the loss is nan"):
        guard.raise_if_non_finite()


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_mixed_precision_reaches_a_similar_loss(monkeypatch: pytest.MonkeyPatch, precision: torch.dtype) -> None:
    """The CPU ignores train.mixed_precision, so the test sets the precision of a GPU."""
    full = run(train_params(**QUICK))
    for module in (device, state_module):
        monkeypatch.setattr(module, "autocast_dtype", lambda name, *, device: precision)
    mixed = run(train_params(**QUICK))
    assert mixed.history[-1].train_loss == pytest.approx(full.history[-1].train_loss, rel=0.05)
    assert mixed.history[-1].train_loss != full.history[-1].train_loss


def test_a_skipped_first_step_leaves_momentum_buffers_of_zero() -> None:
    """A GradScaler skips a step whose float16 gradients overflow."""
    network = nn.Linear(2, 1)
    before = network.weight.clone()
    [optimizer] = make_optimizers(network, params=train_params(optimizer="sgd", momentum=0.9, nesterov=False))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(network(torch.tensor([[torch.inf, 1.0]])).sum()).backward()
    scaler.step(optimizer)
    assert torch.equal(network.weight, before)
    assert all((state["momentum_buffer"] == 0).all() for state in optimizer.state.values())


def test_muon_needs_a_linear_layer() -> None:
    with pytest.raises(UserError, match=r"train.optimizer is muon, but .* has no linear layers"):
        make_optimizers(nn.Conv2d(1, 2, 1), params=train_params(optimizer="muon"))


def test_gradients_are_clipped() -> None:
    params = QUICK | {"epochs": 1, "optimizer": "sgd", "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    start = run(train_params(**params, learning_rate=1e-12)).last
    clipped = run(train_params(**params, learning_rate=1.0, gradient_clip_norm=1e-3)).last
    moved = torch.sqrt(sum(((clipped[name] - start[name]) ** 2).sum() for name in start))  # type: ignore[arg-type]
    assert 0 < moved <= 3 * 1e-3 * 1.01


def test_early_stopping_ends_after_epochs_without_a_better_validation() -> None:
    trained = run(train_params(**QUICK | {"epochs": 50}, early_stopping_epochs=2, learning_rate=1e-9))
    assert len(trained.history) == 3


def test_the_selected_epoch_is_returned_with_the_last() -> None:
    trained = run(train_params(**QUICK | {"epochs": 6}, learning_rate=0.1))
    best = max(trained.history, key=lambda each: (each.validation_accuracy, -each.validation_loss, each.epoch)).epoch
    shorter = run(train_params(**QUICK | {"epochs": best}, learning_rate=0.1))
    assert torch.equal(trained.best["network.0.weight"], shorter.last["network.0.weight"])


def test_a_non_finite_loss_stops_the_training_before_the_step_and_is_reported() -> None:
    with pytest.raises(UserError, match=r"epoch 1, step \d+: the loss is (nan|inf); lower train\.learning_rate"):
        run(train_params(**QUICK, optimizer="sgd", momentum=0.0, nesterov=False, learning_rate=1e30))


def test_a_model_that_is_non_finite_after_the_last_step_of_an_epoch_is_refused() -> None:
    with pytest.raises(UserError, match=r"epoch 1, validation: the loss is (nan|inf)"):
        run(train_params(**QUICK, optimizer="sgd", momentum=0.0, nesterov=False, learning_rate=1e30), images=16)


def configure(workspace: Path, **changes: object) -> None:
    values = json.loads(json.dumps(DEFAULTS))
    values["train"] |= {"epochs": 2, "batch_size": 16} | changes
    (workspace / "params.yaml").write_text(dump_yaml(values))


def runs() -> list[mlflow.entities.Run]:
    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    return client.search_runs([e.experiment_id for e in client.search_experiments()])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch_size": 500},
            "error: train.batch_size is 500, but the train split has 96 images; allowed: up to 96; "
            "set train.batch_size=96",
        ),
        (
            {"crop_padding": 32},
            "error: train.crop_padding is 32, but the images have 32 pixels a side; allowed: up to 31; "
            "set train.crop_padding=31",
        ),
        (
            {"cutout_size": 99},
            "error: train.cutout_size is 99, but the images have 32 pixels a side; allowed: up to 31; "
            "set train.cutout_size=31",
        ),
        ({"model": "lent"}, "error: train.model is 'lent'; allowed: lenet, airbench"),
        ({"weights": "gone.pth"}, "error: train.weights: no such file gone.pth"),
        pytest.param(
            {"device": "cuda"},
            "error: train.device is cuda, but PyTorch finds no such device; allowed on this machine: auto, ",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
    ],
)
def test_a_bad_parameter_is_reported_in_one_line_and_the_last_model_is_kept(
    workspace: Path, changes: dict[str, object], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    write_normalized(workspace)
    model = workspace / "artifacts" / "train" / "best.safetensors"
    model.parent.mkdir()
    model.write_text("the last good model")
    configure(workspace, **changes)
    with pytest.raises(SystemExit, match="2"):
        main()
    stderr = capfd.readouterr().err
    assert len(stderr.splitlines()) == 1, stderr
    assert stderr.startswith(message)
    assert model.read_text() == "the last good model"


@pytest.mark.slow
def test_a_failed_run_is_marked_failed_and_writes_no_model(workspace: Path) -> None:
    write_normalized(workspace)
    configure(workspace, optimizer="sgd", momentum=0.0, nesterov=False, learning_rate=1.0e30, schedule="constant")
    done = run_step("train")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "step 2: the loss is" in done.stderr
    assert [run.info.status for run in runs()] == ["FAILED"]
    assert not (workspace / "artifacts" / "train").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_run_is_marked_killed(workspace: Path, sent: signal.Signals, status: int) -> None:
    write_normalized(workspace)
    configure(workspace, epochs=100_000)
    process = start_step("train")
    read_until("epoch", process)
    process.send_signal(sent)
    _, stderr = process.communicate()
    assert process.returncode == status
    assert len(stderr.splitlines()) == 1, stderr
    assert [run.info.status for run in runs()] == ["KILLED"]


@pytest.mark.slow
def test_the_step_writes_models_history_and_curves(workspace: Path) -> None:
    write_normalized(workspace)
    configure(workspace)
    done = run_step("train")
    assert (done.returncode, done.stderr) == (0, "")
    names = sorted(path.name for path in (workspace / "artifacts" / "train").iterdir())
    assert names == ["best.safetensors", "checksums.md5", "curves.png", "history.csv", "last.safetensors", "model.json"]
    assert re.fullmatch(r"epoch 2/2 loss \d+\.\d{3} \| val loss \d+\.\d{3} acc \d+\.\d%", done.stdout.splitlines()[-1])


def test_missing_input_ends_the_step_with_status_2(workspace: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        main()
