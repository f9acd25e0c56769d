"""What belongs to one training: the experiments, flow runs and files of a trace."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.tracking.search import Run


@dataclass(frozen=True)
class Experiment:
    """A DVC experiment; `commit` is None where this repository no longer has it."""

    name: str
    commit: str | None
    baseline: str | None = None


@dataclass(frozen=True)
class FlowRun:
    """A Prefect flow run; without a Prefect server, only its id and usually its name are known."""

    run_id: str
    name: str | None = None
    state: str | None = None
    link: str | None = None
    experiment: str | None = None


@dataclass(frozen=True)
class File:
    """An output of the run with its MD5; `cached` is its path in DVC's cache, None where the cache does not have it."""

    path: str
    md5: str
    cached: str | None


@dataclass(frozen=True)
class Trace:
    """All that belongs to one training; what is not known is None or empty."""

    commit: str | None = None
    dirty: bool | None = None  # whether code has uncommitted changes; parameters are no code
    uncommitted: tuple[str, ...] = ()  # files, parameters included
    data_set: str | None = None
    data_md5: str | None = None
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)  # parameter: (committed value, value here)
    run: Run | None = None
    run_link: str | None = None
    run_link_served: bool = False  # whether a server is running there
    reproductions: tuple[tuple[str, str], ...] = ()  # MLflow run and result of each
    experiments: tuple[Experiment, ...] = ()
    flow_runs: tuple[FlowRun, ...] = ()
    model_md5: str | None = None
    files: tuple[File, ...] = ()
