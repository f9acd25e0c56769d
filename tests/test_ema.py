"""With train.ema_decay, the moving average of the weights is what is validated and saved."""

import pytest
import torch

from pipeline.models.build import Classifier, build
from pipeline.training.checkpoints import Checkpoint
from pipeline.training.ema import WeightAverage
from pipeline.training.loop import TrainingResult, train, validate
from pipeline.training.non_finite import NonFiniteGuard
from pipeline.training.state import TrainingState, copy_weights
from tests.conftest import train_params
from tests.test_model import config
from tests.test_resume import assert_same, one_thread, run, stopped  # noqa: F401  # a fixture
from tests.test_train import QUICK, SyncCounter, as_on_a_gpu, split_of  # noqa: F401  # a fixture

AVERAGED = QUICK | {"batch_size": 8, "log_every_steps": 1, "ema_decay": 0.9}


def train_classifier(model: str, **changes: object) -> tuple[Classifier, TrainingResult]:
    """Train for two epochs of four steps; return the trained classifier, and the result."""
    params = train_params(**AVERAGED | changes, model=model)
    torch.manual_seed(0)
    classifier = build(config(model, classes=3))
    train_split, validation_split = split_of(32, seed=1), split_of(24, seed=2)
    return classifier, train(classifier, params=params, train_split=train_split, validation_split=validation_split)


def test_each_step_adds_the_weights_to_the_average() -> None:
    trained = build(config("lenet", classes=3))
    expected = copy_weights(trained)
    average = WeightAverage(trained, decay=0.25)
    for number, decay in [(1, 2 / 11), (2, 0.25), (3, 0.25)]:  # with (1 + n) / (10 + n) in the first steps
        for parameter in trained.parameters():
            parameter.data += number
        average.step(number)
        for name, tensor in trained.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor
    for name, tensor in average.classifier.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])


def test_the_average_includes_the_running_statistics_of_batch_normalization() -> None:
    trained = build(config("airbench", classes=3))
    average = WeightAverage(trained, decay=0.5)
    name, statistic = next((name, buffer) for name, buffer in trained.named_buffers() if "running_mean" in name)
    statistic += 11
    average.step(1)
    torch.testing.assert_close(average.classifier.state_dict()[name], torch.full_like(statistic, 11 * 9 / 11))


def test_the_averaged_weights_are_validated_and_returned() -> None:
    classifier, result = train_classifier("lenet", learning_rate=0.01)
    assert not any(torch.equal(result.last[name], parameter) for name, parameter in classifier.named_parameters())
    for weights, number in [(result.last, 2), (result.best, result.selected.epoch)]:
        classifier.load_state_dict(weights)
        epoch = result.history[number - 1]
        found = validate(classifier, split_of(24, seed=2), loss="cross_entropy")
        assert (found.loss, found.accuracy) == (epoch.validation_loss, epoch.validation_accuracy)


def test_the_average_does_not_change_the_training() -> None:
    averaged, _ = train_classifier("lenet")
    plain, _ = train_classifier("lenet", ema_decay=None)
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in averaged.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "changes"), [("lenet", {}), ("airbench", {"average_every_steps": 3, "schedule": "linear"})]
)
def test_a_stopped_training_resumes_with_the_same_average(model: str, changes: dict[str, object]) -> None:
    params = train_params(**AVERAGED | {"learning_rate": 0.02} | changes, model=model)
    assert_same(stopped(params, 3, 5), run(params))


def test_a_checkpoint_holds_the_average() -> None:
    found = run(train_params(**AVERAGED), stop_after=3)
    assert isinstance(found, Checkpoint)
    names = {name.removeprefix("ema.") for name in found.tensors if name.startswith("ema.")}
    assert names == set(build(config("lenet", classes=3)).state_dict())
    assert not torch.equal(found.tensors["ema.network.0.weight"], found.tensors["model.network.0.weight"])


def test_a_step_of_the_average_waits_for_no_device() -> None:
    average = WeightAverage(build(config("airbench", classes=3)), decay=0.9)
    with SyncCounter() as counter:
        average.step(1)
    assert counter.number == 0


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_step_without_an_update_leaves_the_average_finite() -> None:
    params, classifier = train_params(**AVERAGED), build(config("lenet", classes=3))
    state = TrainingState(classifier, params=params)
    guard = NonFiniteGuard(state, params=params, steps_per_epoch=4)
    for number, factor in enumerate([1e-6, torch.nan], start=1):
        loss = classifier(torch.ones(2, 3, 32, 32)).square().mean() * factor
        classifier.zero_grad()
        guard.watch(loss, mean_over_ranks=loss.detach()).backward()  # type: ignore[no-untyped-call]
        for optimizer in state.optimizers:
            optimizer.step()
        assert state.ema is not None
        state.ema.step(number)
    assert all(tensor.isfinite().all() for tensor in state.averaged.state_dict().values())
