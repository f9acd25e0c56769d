"""What the benchmarks print: a header that says what was measured on what, and tables of medians and ratios."""

import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.core.git import UNKNOWN, git
from pipeline.core.processes import cpu_name, num_cores

PACKAGES = ("torch", "torchvision", "pytorch-lightning", "numpy", "pillow", "dvc", "mlflow", "prefect")


def medians(
    seconds: Mapping[str, Sequence[float]],
    *,
    base: str | None = None,
    digits: int = 1,
    more: Mapping[str, Mapping[str, str]] | None = None,
) -> str:
    """A row for each way: median and single values, `more` columns by heading and way, and the ratio to `base`."""
    more = more or {}
    rounds = max(map(len, seconds.values()))
    rows = [["way", f"median of {rounds} (s)", "each (s)", *more, *([f"ratio to {base}"] if base else [])]]
    for way, found in seconds.items():
        each = ", ".join(_shown(value, digits) for value in found)
        row = [way, _shown(statistics.median(found), digits), each, *(column.get(way, "") for column in more.values())]
        rows.append([*row, *([_shown_ratio(median_ratio(found, seconds[base]))] if base else [])])
    return table(rows)


def median_ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """The median over the rounds of the ratio within a round: what slows the machine down slows down both."""
    return statistics.median(one / other for one, other in zip(seconds, base, strict=True))


def table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the heading."""
    heading, *others = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([heading, f"|{' --- |' * len(rows[0])}", *others])


def header(*, seeds: str) -> str:
    """Date, commit, hardware, versions and what the seeds are."""
    commit, changes = (_git(*question) for question in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain")))
    changed = {None: " with changes unknown", "": ""}.get(changes, " with uncommitted changes")
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, commit {commit or UNKNOWN}{changed}\n"
        f"{num_cores()} cores of {cpu_name()}\n"
        f"Python {platform.python_version()}, {versions}\n"
        f"seeds: {seeds}\n"
    )


def _git(*arguments: str) -> str | None:
    try:
        return git(Path.cwd(), *arguments)
    except UserError:
        return None


def mean_and_deviation(values: Sequence[float], form: str) -> str:
    """`93.98% ± 0.12%` for the form `.2%`; the deviation is that of a sample."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} ± {deviation:{form}}"


def _shown(value: float, digits: int) -> str:
    """Infinity stands for what did not come to its end."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "not reached"


def _shown_ratio(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "–"  # noqa: RUF001  # a dash: there is no ratio
