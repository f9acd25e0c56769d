"""A step reports its progress in a file, from which the flow run displays it."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from pipeline.core import step_progress
from pipeline.core.progress import format_time_left, progress
from pipeline.core.step_progress import PROGRESS_FILE, EpochProgress, Pace, StepProgress, read_progress, reporter
from pipeline.tracking.training_progress import announce_epoch, announce_training
from pipeline.train import report_epoch
from pipeline.training.checkpoints import Checkpoint
from pipeline.training.state import Epoch
from tests.conftest import train_params
from tests.test_resume import Project
from tests.test_train import QUICK


class Clock:
    """A clock that the test sets, in seconds."""

    seconds = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(step_progress, "time", SimpleNamespace(monotonic=lambda: clock.seconds))
    return clock


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the path of the progress file of a step that has not begun."""
    reporter.cache_clear()
    monkeypatch.setenv(PROGRESS_FILE, str(tmp_path / "progress.json"))
    yield tmp_path / "progress.json"
    reporter.cache_clear()


def read(file: Path) -> StepProgress:
    found = read_progress(file)
    assert found
    return found


def epoch(number: int, accuracy: float) -> Epoch:
    return Epoch(number, 0.1, 0.5, 0.8, 0.6, accuracy, 0.7)


def test_a_bar_is_written_at_most_once_a_second_and_at_its_end(file: Path, clock: Clock) -> None:
    with progress("normalize", total=50_000, unit="images") as advance:
        for clock.seconds in (0.5, 0.9):
            advance(4_000)
        assert read(file).done == 0
        clock.seconds = 1.0
        advance(4_000)
        assert read(file).done == 12_000
        advance(1)
    written = read(file)
    assert (written.title, written.done, written.total, written.unit) == ("normalize", 12_001, 50_000, "images")
    assert [path.name for path in file.parent.iterdir()] == ["progress.json"]


@pytest.mark.parametrize("rank", [None, "1"])
def test_nothing_is_written_without_the_variable_or_by_another_rank(
    file: Path, monkeypatch: pytest.MonkeyPatch, rank: str | None
) -> None:
    if rank:
        monkeypatch.setenv("RANK", rank)
    else:
        monkeypatch.delenv(PROGRESS_FILE)
    monkeypatch.chdir(file.parent)
    with progress("normalize", total=5, unit="images") as advance:
        advance(5)
    assert list(file.parent.iterdir()) == []


def test_a_file_that_cannot_be_written_does_not_stop_the_step(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROGRESS_FILE, str(file.parent / "missing" / "progress.json"))
    with progress("normalize", total=5, unit="images") as advance:
        advance(5)


@pytest.mark.parametrize("text", [None, "", '{"title": "norm', "[]", "{}", '{"title": 7}'])
def test_a_missing_or_damaged_file_is_no_progress(file: Path, text: str | None) -> None:
    if text is not None:
        file.write_text(text)
    assert read_progress(file) is None


def test_the_time_left_is_estimated_from_measured_units_without_the_first(clock: Clock) -> None:
    pace = Pace(done=0, total=100)
    clock.seconds = 60.0  # a slow first step
    pace.advance(1)
    assert pace.seconds_left() is None
    clock.seconds = 61.0
    pace.advance(1)
    assert pace.seconds_left() is None  # too short to measure
    clock.seconds = 78.0
    pace.advance(8)
    assert pace.seconds_left() == pytest.approx(90 * 18 / 9)


@pytest.mark.parametrize(("early_stopping_epochs", "may_end_early"), [(None, False), (3, True)])
def test_a_resumed_training_measures_only_its_own_steps(
    file: Path, clock: Clock, early_stopping_epochs: int | None, may_end_early: bool
) -> None:
    params = train_params(**QUICK | {"epochs": 5, "early_stopping_epochs": early_stopping_epochs})
    start = Checkpoint(24, {}, {"history": [vars(epoch(1, 0.9)), vars(epoch(2, 0.8))]})  # 4 of 10 steps of epoch 3
    clock.seconds = 1000.0
    announce_training(start, params=params, num_train_images=165)
    with progress("epoch 3", total=10, done=4, unit="steps") as advance:
        for clock.seconds in (1002.0, 1004.0, 1006.0):
            advance(1)
    written = read(file)
    assert (written.done, written.fraction, written.seconds_elapsed, written.seconds_left) == (7, 27 / 50, 6.0, 46.0)
    assert written.training
    assert written.training.may_end_early == may_end_early
    assert (written.training.epochs_done, written.training.best) == (2, EpochProgress(1, 0.5, 0.8, 0.6, 0.9))


def test_the_end_of_an_epoch_is_written_at_once_with_the_best_accuracy_so_far(file: Path, clock: Clock) -> None:
    announce_training(None, params=train_params(**QUICK), num_train_images=160)
    for number, accuracy in ((1, 0.9), (2, 0.8)):
        with progress(f"epoch {number}", total=10, unit="steps") as advance:
            advance(10)
        announce_epoch(epoch(number, accuracy), 123.0)
        training = read(file).training
        assert training
        assert training.last == EpochProgress(number, 0.5, 0.8, 0.6, accuracy, 123.0)
        assert training.best == EpochProgress(1, 0.5, 0.8, 0.6, 0.9, 123.0)
    assert (read(file).fraction, read(file).title, read(file).done) == (1.0, "epoch 2", 10)
    assert clock.seconds == 0.0


@pytest.mark.parametrize(
    ("seconds", "text"), [(45.4, "45 s"), (59.6, "1 min"), (5940, "99 min"), (5990, "1.7 h"), (90_000, "25.0 h")]
)
def test_the_time_left_has_one_unit(seconds: float, text: str) -> None:
    assert format_time_left(seconds) == text


def test_the_line_of_an_epoch_has_the_time_left_and_fits_a_terminal_of_80_columns(
    file: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    params = train_params(**QUICK | {"epochs": 40, "early_stopping_epochs": 3})
    announce_training(None, params=params, num_train_images=160)
    for clock.seconds in (0.0, 18.0):
        reporter().advance(10)
    report_epoch(epoch(2, 0.5), 123.0, params=params, run=MagicMock())
    line = capsys.readouterr().out.rstrip()
    assert line == "epoch  2/40 loss 0.500 | val loss 0.600 acc 50.0% | ≤11 min left"
    assert len(f"13:34:05 train: {line}") <= 80


@pytest.mark.slow
def test_a_training_reports_its_epochs_also_after_it_resumed(workspace: Path, file: Path) -> None:
    project = Project(workspace, epochs=3)
    stopped = project.start_until("epoch 1/3")
    first = read(file)
    stopped.terminate()
    stopped.communicate()
    assert "resumes from its checkpoint" in project.finish()
    last = read(file)
    assert first.training
    assert last.training
    assert (first.training.epochs, first.training.epochs_done) == (3, 1)
    assert (last.training.epochs_done, last.fraction) == (3, 1.0)
    rows = (workspace / "artifacts/train/history.csv").read_text().splitlines()
    row = dict(zip(rows[0].split(","), rows[-1].split(","), strict=True))
    assert last.training.last
    assert last.training.last.validation_accuracy == float(row["validation_accuracy"])
    assert last.training.step_loss is not None
