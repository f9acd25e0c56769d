"""Collect what is known about the run that made the model; what cannot be found out is unknown, never an error."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core.errors import TemporaryError, UserError, first_line
from pipeline.core.git import CodeState, code_state
from pipeline.core.settings import get_settings
from pipeline.params import PARAMS_FILE
from pipeline.tracking.provenance_file import Provenance
from pipeline.tracking.report import find_recorded_run, link_of
from pipeline.tracking.run_title import RunSetup, read_setup


@dataclass(frozen=True)
class RunFacts:
    """What is known about the run; each field may be unknown: None or empty.

    `seconds` are those of each step, as far as they were measured. `problem` is the reason why MLflow has no answer.
    """

    recorded: Provenance | None = None
    mlflow_link: str = ""
    problem: str = ""
    setup: RunSetup | None = None
    checkout: CodeState = field(default_factory=lambda: CodeState(None, None))
    experiment: str = ""
    flow_run_name: str = ""
    flow_run_link: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Return the recipe and what differs from it in one line; empty if unknown."""
        return self.setup.title if self.setup else ""

    @property
    def train_seconds(self) -> float | None:
        """Return the duration of the training: as measured, else that of the run in MLflow."""
        return self.seconds.get("train", self.recorded.seconds if self.recorded else None)

    def gpu_hours(self, *, processes: int) -> float | None:
        """Return the GPU hours of a training by this many processes; 0 without a GPU, None if unknown."""
        gpu = self.recorded.hardware.get("gpu") if self.recorded else None
        if gpu is None or gpu == "unknown":
            return None
        if gpu == "none":
            return 0.0
        return None if self.train_seconds is None else processes * self.train_seconds / 3600


def find_facts(model_md5: str, *, seconds: Mapping[str, float]) -> RunFacts:
    """Return what is known about the run that made the model of this hash, from MLflow, git, files and settings."""
    settings, recorded, problem = get_settings(), None, ""
    try:
        recorded = find_recorded_run(model_md5)
    except (UserError, TemporaryError) as error:
        problem = first_line(error)
    return RunFacts(
        recorded=recorded,
        mlflow_link=link_of(recorded) if recorded else "",
        problem=problem,
        setup=_find_setup(),
        checkout=code_state(Path.cwd(), tracked=str(PARAMS_FILE)),
        experiment=settings.experiment or (recorded.experiment if recorded else ""),
        flow_run_name=settings.flow_run_name or (recorded.flow_run_name if recorded else ""),
        flow_run_link=settings.flow_run_link,
        seconds=seconds,
    )


def _find_setup() -> RunSetup | None:
    try:
        return read_setup()
    except (UserError, KeyError, OSError):
        return None
