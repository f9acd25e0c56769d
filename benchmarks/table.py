"""Format what the benchmarks print: a header with commit, hardware and versions, and tables of medians and ratios."""

import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
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
    """Return a table with a row for each way: median, single values, columns of `more`, and the ratio to `base`.

    `seconds` has the values by way. `more` has the text of further cells by heading of the column and by way.
    """
    more = more or {}
    rounds = max(map(len, seconds.values()))
    rows = [["way", f"median of {rounds} (s)", "each (s)", *more, *([f"ratio to {base}"] if base else [])]]
    for way, found in seconds.items():
        each = ", ".join(_format(value, digits) for value in found)
        row = [way, _format(statistics.median(found), digits), each, *(column.get(way, "") for column in more.values())]
        rows.append([*row, *([_format_ratio(median_ratio(found, seconds[base]))] if base else [])])
    return table(rows)


def median_ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """Return the median of the ratios within a round, in which the machine is equally fast for both."""
    return statistics.median(value / base_value for value, base_value in zip(seconds, base, strict=True))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first row is the heading."""
    heading, *others = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([heading, f"|{' --- |' * len(rows[0])}", *others])


def header(*, seeds: str) -> str:
    """Return the lines above a table: date, commit, hardware, versions and seeds.

    The commit is "unknown" without git or a repository; the version of a missing package is "not installed".
    """
    found = setting()
    return f"{found['date']}, commit {found['commit']}\n{found['CPU']}\n{found['versions']}\nseeds: {seeds}\n"


def setting() -> dict[str, str]:
    """Return date, commit, CPU and versions as text, by these names."""
    commit, changes = _git("rev-parse", "--short", "HEAD"), _git("status", "--porcelain")
    changed = {None: " with changes unknown", "": ""}.get(changes, " with uncommitted changes")
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "commit": f"{commit or UNKNOWN}{changed}",
        "CPU": f"{num_cores()} cores of {cpu_name()}",
        "versions": f"Python {platform.python_version()}, {versions}",
    }


def _git(*arguments: str) -> str | None:
    """Return the output of git in the current folder; None where there is no git, or no repository."""
    try:
        return git(Path.cwd(), *arguments)
    except UserError:
        return None


def _version(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def mean_and_deviation(values: Sequence[float], form: str) -> str:
    """Return mean and standard deviation of a sample, formatted by `form`: `93.98% ± 0.12%` for `.2%`."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} ± {deviation:{form}}"


def _format(value: float, digits: int) -> str:
    """Return a number as text; infinity means that the target was not reached."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "not reached"


def _format_ratio(value: float) -> str:
    """Return a ratio as text; a dash where one of the ways did not reach the target."""
    return f"{value:.4g}" if math.isfinite(value) else "–"  # noqa: RUF001  # the dash is meant
