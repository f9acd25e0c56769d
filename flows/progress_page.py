"""The Markdown text of the live progress of a flow run: a bar, the last epoch, and the state of each step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.core.progress import format_bytes
from pipeline.core.step_progress import StepProgress, TrainingProgress

BAR_LENGTH = 30
WAITING = "waiting"
DONE, RESTORED, UP_TO_DATE = "done", "restored from DVC's cache", "up to date"

RunState = Literal["running", "finished", "failed", "interrupted"]


@dataclass(frozen=True)
class StageState:
    """A stage of a flow run: its state as text, such as `waiting` or `running`, and its seconds once it has ended."""

    name: str
    state: str = WAITING
    seconds: float | None = None


@dataclass(frozen=True)
class Page:
    """What the page of a flow run's progress displays.

    `progress` is that of the stage that runs or ran last, `training` that of the training, also after it. `reason` is
    the error of a flow run that failed, `seconds` the time that an ended flow run took.
    """

    state: RunState
    stages: Sequence[StageState]
    progress: StepProgress | None = None
    training: TrainingProgress | None = None
    reason: str = ""
    seconds: float | None = None


def as_markdown(page: Page, *, updated: str) -> str:
    """Return the page as Markdown; `updated` is the time of the update as text."""
    parts = [f"## {_headline(page)}"]
    if page.reason:
        parts.append(f"```text\n{page.reason.replace('`', chr(39))}\n```")
    if page.state == "running" and page.progress:
        parts.append(_bar(page.progress))
    if page.training:
        parts.append(_training_table(page.training))
    parts += [_stage_table(page.stages), f"Last update: {updated}"]
    return "\n\n".join(parts) + "\n"


def _headline(page: Page) -> str:
    """Return the state of the run in one line."""
    stage = next((stage for stage in page.stages if stage.state not in (DONE, RESTORED, UP_TO_DATE)), None)
    where = _where(stage.name, page) if stage else "save the experiment"
    took = f" after {format_seconds(page.seconds)}" if page.seconds is not None else ""
    if page.state == "running":
        return f"Running: {where}"
    return f"Finished{took}" if page.state == "finished" else f"{page.state.capitalize()}{took}, in {where}"


def _where(stage: str, page: Page) -> str:
    """Return what the stage does at the moment."""
    progress = page.progress
    if progress and (training := progress.training):
        return f"{stage}, epoch {min(training.epochs_done + 1, training.epochs)} of {training.epochs}"
    if progress and progress.title not in ("", stage):
        return f"{stage}, {progress.title}"
    return stage


def _bar(progress: StepProgress) -> str:
    """Return a text bar with percentage, count and time left; without a known total, only the count."""
    count = _count(progress.done, progress.unit)
    if progress.total is None:
        return f"{progress.title}: {count}"
    fraction = _fraction(progress)
    full = int(BAR_LENGTH * fraction)
    bar = f"`{'█' * full}{'░' * (BAR_LENGTH - full)}` **{int(100 * fraction)}%**"
    of_total = f"{progress.title}: {count} of {_count(progress.total, progress.unit)}"
    return f"{bar} · {_time_left(progress)}\n\n{of_total} · {format_seconds(progress.seconds_elapsed)} so far"


def _fraction(progress: StepProgress) -> float:
    """Return the finished fraction of the bar or, in a training, of all its epochs."""
    done = min(1.0, progress.done / max(1, progress.total or 0))
    if training := progress.training:
        # the bar of a finished epoch stays until the next one begins
        is_counted = progress.title == f"epoch {training.epochs_done}"
        return min(1.0, (training.epochs_done + (0.0 if is_counted else done)) / training.epochs)
    return done


def _time_left(progress: StepProgress) -> str:
    """Return the estimated time left as text."""
    if progress.seconds_left is None:
        return "time left: not known yet"
    at_most = "at most " if progress.training and progress.training.may_end_early else "about "
    return f"{at_most}{format_seconds(progress.seconds_left)} left"


def _count(count: int, unit: str) -> str:
    """Return a count with its unit."""
    return format_bytes(count) if unit == "B" else f"{count:,} {unit}"


def _training_table(training: TrainingProgress) -> str:
    """Return a table of the last finished epoch; before that, of the last logged loss."""
    last = training.last
    if last is None:
        loss = "not known yet" if training.step_loss is None else f"{training.step_loss:.4f}"
        return _table(["training", "loss", "accuracy"], [("last logged step", loss, "after the first epoch")])
    best = training.best_validation_accuracy
    rows = [
        (f"train, epoch {last.epoch}", f"{last.train_loss:.4f}", f"{last.train_accuracy:.2%}"),
        (f"validation, epoch {last.epoch}", f"{last.validation_loss:.4f}", f"**{last.validation_accuracy:.2%}**"),
        ("best validation so far", "", f"{best:.2%}" if best is not None else ""),
    ]
    table = _table(["training", "loss", "accuracy"], rows)
    return table if last.images_per_second is None else f"{table}\n\nSpeed: {last.images_per_second:,.0f} images/s"


def _stage_table(stages: Sequence[StageState]) -> str:
    """Return a table of the stages with state and time."""
    rows = [
        (stage.name, stage.state, "" if stage.seconds is None else format_seconds(stage.seconds)) for stage in stages
    ]
    return _table(["step", "state", "time"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the cells must be free of `|`."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def format_seconds(seconds: float) -> str:
    """Return a duration as text with at most two units, such as `45 s`, `2 min 10 s` or `3 h 5 min`."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    return f"{total // 3600} h {total % 3600 // 60} min"
