"""The Markdown text of the live progress of a flow run: a bar, the last epoch, and the state of each step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.core.progress import format_bytes
from pipeline.core.step_progress import StepProgress, TrainingProgress

BAR_LENGTH = 30
RUNNING_HEADLINE, RELOAD_HINT = "## Running: ", "; reload the page for newer values"
WAITING, RUNNING = "waiting", "running"
DONE, RESTORED, UP_TO_DATE = "done", "restored from DVC's cache", "up to date"

RunState = Literal["running", "finished", "failed", "interrupted"]


@dataclass(frozen=True)
class StageState:
    """A stage of a flow run: its state as text, such as `waiting` or `running`, and its seconds once it has ended.

    `start` is when it began, in seconds after the start of the flow run.
    """

    name: str
    state: str = WAITING
    seconds: float | None = None
    start: float | None = None


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


def as_line(page: Page) -> str:
    """Return the page in one line, the most important first: the page of a flow run shows its first 40 characters."""
    if page.state == "failed" and page.reason:
        stage = _current_stage(page)
        return f"Failed in {stage}: {page.reason.removeprefix(f'{stage}: ')}"
    if page.state != "running":
        return _headline(page)
    if page.progress is None:
        return _current_step(page)
    left = [text.replace("at most", "≤") for text in _time_left(page.progress)]
    training = page.progress.training
    if training is None:
        return " · ".join([*left, _current_step(page), *_percentage(page.progress)])
    accuracy = [f"{training.last.validation_accuracy:.1%} validation accuracy"] if training.last else []
    epoch = f"epoch {_current_epoch(training)}/{training.epochs}"
    return " · ".join([*left, epoch, *accuracy])


def as_markdown(page: Page, *, elapsed: float) -> str:
    """Return the page as Markdown; `elapsed` is the time of the update, in seconds after the start of the flow run."""
    parts = [f"{RUNNING_HEADLINE}{_current_step(page)}" if page.state == "running" else f"## {_headline(page)}"]
    if page.reason:
        parts.append(f"```text\n{page.reason.replace('`', chr(39))}\n```")
    if page.state == "running" and page.progress:
        parts.append(_bar(page.progress))
    parts += [*_training_table(page.training), _stage_table(page.stages, elapsed=elapsed)]
    if page.state == "running":
        parts.append(f"As of {format_seconds(elapsed)} after the start{RELOAD_HINT}")
    return "\n\n".join(parts) + "\n"


def as_interrupted(text: str) -> str:
    """Return the Markdown of a running flow run as that of one that was killed; that of an ended one is unchanged."""
    if not text.startswith(RUNNING_HEADLINE):
        return text
    ended = text.replace(RUNNING_HEADLINE, "## Interrupted in ", 1).replace(f"| {RUNNING} |", "| interrupted |")
    lines = ended.removesuffix(f"{RELOAD_HINT}\n").splitlines()
    return "\n".join(line for line in lines if not line.startswith(("`█", "`░"))) + "\n"


def _headline(page: Page) -> str:
    """Return how the run ended, as text."""
    took = f" after {format_seconds(page.seconds)}" if page.seconds is not None else ""
    return (
        f"Finished{took}" if page.state == "finished" else f"{page.state.capitalize()}{took} in {_current_step(page)}"
    )


def _current_stage(page: Page) -> str:
    """Return the first step that is not done."""
    unfinished = (stage.name for stage in page.stages if stage.state not in (DONE, RESTORED, UP_TO_DATE))
    return next(unfinished, "save the experiment")


def _current_step(page: Page) -> str:
    """Return the first step that is not done and, as far as known, where in it the run is."""
    stage = _current_stage(page)
    if page.progress is None or stage not in {each.name for each in page.stages}:
        return stage
    if training := page.progress.training:
        return f"{stage}, epoch {_current_epoch(training)} of {training.epochs}"
    return stage if page.progress.title == stage else f"{stage}, {page.progress.title}"


def _current_epoch(training: TrainingProgress) -> int:
    """Return the number of the epoch that runs or, at the end, of the last one."""
    return min(training.epochs_done + 1, training.epochs)


def _bar(progress: StepProgress) -> str:
    """Return a text bar with percentage and times, and the count below it; without a known total, only the count."""
    count = _count(progress.done, progress.unit)
    if progress.total is None:
        return f"{progress.title}: {count}"
    of_total = _count(progress.total, progress.unit)
    if progress.unit != "B":
        count = f"{progress.done:,}"
    full = int(BAR_LENGTH * (progress.fraction or 0.0))
    bar = f"`{'█' * full}{'░' * (BAR_LENGTH - full)}`"
    elapsed = f"{format_seconds(progress.seconds_elapsed)} so far"
    parts = [*(f"**{text}**" for text in _percentage(progress)), *(_time_left(progress) or ["time left not known yet"])]
    speed = progress.training.last.images_per_second if progress.training and progress.training.last else None
    parts += [elapsed, *([] if speed is None else [f"{speed:,.0f} images/s"])]
    return f"{bar} {' · '.join(parts)}\n\n{progress.title}: {count} of {of_total}"


def _percentage(progress: StepProgress) -> list[str]:
    """Return the finished percentage as text, if it is known."""
    return [] if progress.fraction is None else [f"{int(100 * progress.fraction)}%"]


def _time_left(progress: StepProgress) -> list[str]:
    """Return the estimated time left as text, if it is known."""
    if progress.seconds_left is None:
        return []
    seconds = progress.seconds_left if progress.seconds_left < 60 else 10 * round(progress.seconds_left / 10)
    at_most = "at most " if progress.training and progress.training.may_end_early else ""
    return [f"{at_most}{format_seconds(seconds)} left"]


def _count(count: int, unit: str) -> str:
    """Return a count with its unit."""
    return format_bytes(count) if unit == "B" else f"{count:,} {unit}"


def _training_table(training: TrainingProgress | None) -> list[str]:
    """Return a table of the last finished epoch; before that, of the last logged loss, if there is one."""
    if training is None:
        return []
    header = ["", "loss", "accuracy"]
    last, best = training.last, training.best
    if last is None or best is None:
        loss = training.step_loss
        return (
            []
            if loss is None
            else [markdown_table(header, [("last logged step", f"{loss:.4f}", "known after epoch 1")])]
        )
    rows = [
        (f"train, epoch {last.epoch}", f"{last.train_loss:.4f}", f"{last.train_accuracy:.2%}"),
        (f"validation, epoch {last.epoch}", f"{last.validation_loss:.4f}", f"**{last.validation_accuracy:.2%}**"),
        (f"best validation, epoch {best.epoch}", f"{best.validation_loss:.4f}", f"{best.validation_accuracy:.2%}"),
    ]
    return [markdown_table(header, rows)]


def _stage_table(stages: Sequence[StageState], *, elapsed: float) -> str:
    """Return a table of the stages with state and time, of a running one the time so far."""
    rows = []
    for stage in stages:
        seconds = elapsed - stage.start if stage.state == RUNNING and stage.start is not None else stage.seconds
        rows.append((stage.name, stage.state, "" if seconds is None else format_seconds(seconds)))
    return markdown_table(["step", "state", "time"], rows)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; its cells are Markdown, without an unescaped `|`."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def format_seconds(seconds: float) -> str:
    """Return a duration as text with at most two units, such as `45 s`, `2 min 10 s` or `3 h 5 min`."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min" + (f" {total % 60} s" if total % 60 else "")
    hours, minutes = total // 3600, total % 3600 // 60
    return f"{hours} h" + (f" {minutes} min" if minutes else "")
