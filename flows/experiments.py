"""Print the DVC experiments as a table as wide as the terminal: name, time, metrics, and parameters that differ.

`python -m flows.experiments [--all-commits]`, or `make experiments`. The table of `dvc exp show` is wider: it has a
column for each parameter, metric and dependency that differs in any experiment.
"""

import argparse
import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from flows import PROJECT
from pipeline.core.errors import UserError, report_errors
from pipeline.tracking.run_title import differences

METRICS = ("accuracy", "macro_f1", "loss")
HEADER = ("experiment", "created", *METRICS, "parameters that differ from its commit's")
MIN_LAST_COLUMN_WIDTH = 40  # if a terminal has no room for it, the last column is below the others
COLUMN_GAP = "  "


@dataclass(frozen=True)
class Row:
    """A row of the table: a commit, or an experiment that started from it; `metrics` is empty where it has none."""

    name: str
    created: str
    state: str
    metrics: Mapping[str, float | None]
    changed: Mapping[str, tuple[Any, Any]]

    def cells(self) -> list[str]:
        """Return the text of each column."""
        values = [_format_metric(self.metrics[name]) if name in self.metrics else "" for name in METRICS]
        if not self.metrics:
            values[0] = self.state
        changes = ", ".join(f"{name}={'null' if new is None else new}" for name, (_, new) in self.changed.items())
        return [self.name, self.created, *values, changes]


def _format_metric(value: float | None) -> str:
    return "null" if value is None else f"{value:.4f}"


def read_rows(*options: str) -> list[Row]:
    """Return the rows that `dvc exp show` lists in the current folder; raises UserError where DVC fails."""
    command = [sys.executable, "-m", "dvc", "exp", "show", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        raise UserError(f"dvc exp show: {reason.removeprefix('ERROR: ')}; fix that, and run the same command again")
    return [row for commit in json.loads(done.stdout) if commit["rev"] != "workspace" for row in _rows(commit)]


def _rows(commit: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the row of a commit, then those of its experiments."""
    baseline = commit["data"] or {}
    yield _row(commit["name"] or commit["rev"][:7], baseline, baseline=baseline, state="no metrics")
    for experiment in commit["experiments"] or []:
        newest = experiment["revs"][0]
        state = (experiment["executor"] or {}).get("state", "success")
        state = "failed" if newest["error"] else state
        name = f"- {experiment['name'] or newest['rev'][:7]}"
        yield _row(name, newest["data"] or {}, baseline=baseline, state=state)


def _row(name: str, data: Mapping[str, Any], *, baseline: Mapping[str, Any], state: str) -> Row:
    """Return a row, without metrics for what failed or has not run: DVC lists the metrics of the commit there."""
    has_own_metrics = state in ("success", "no metrics")
    metrics = [file.get("data") for file in (data.get("metrics") or {}).values()] if has_own_metrics else []
    created = data.get("timestamp")
    return Row(
        name=name,
        created=f"{datetime.fromisoformat(created):%Y-%m-%d %H:%M}" if created else "",
        state=state,
        metrics=next((values for values in metrics if values), {}),
        changed=differences(_params(baseline), _params(data)),
    )


def _params(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the parameters by section that DVC lists for a commit or an experiment."""
    return (data.get("params") or {}).get("params.yaml", {}).get("data") or {}


def as_table(rows: Sequence[Row], *, width: int) -> str:
    """Return a table with lines of at most `width` characters, unless the first columns alone need more."""
    lines = [list(HEADER), *(row.cells() for row in rows)]
    widths = [max(len(cells[column]) for cells in lines) for column in range(len(HEADER) - 1)]
    indent = sum(widths) + len(COLUMN_GAP) * len(widths)
    if width - indent < MIN_LAST_COLUMN_WIDTH:
        indent = 4
    return "\n".join(line for cells in lines for line in _wrap(cells, widths=widths, indent=indent, width=width))


def _wrap(cells: Sequence[str], *, widths: Sequence[int], indent: int, width: int) -> Iterator[str]:
    """Yield the lines of a row; the last column begins at `indent`, below the others if these are longer."""
    first = COLUMN_GAP.join(f"{cell:<{size}}" for cell, size in zip(cells[:-1], widths, strict=True))
    text = textwrap.wrap(cells[-1], width - indent, break_on_hyphens=False, break_long_words=False)
    if text and len(first) < indent:
        first = f"{first}{COLUMN_GAP}{text.pop(0)}"
    yield first.rstrip()
    yield from (" " * indent + line for line in text)


def main() -> None:
    """Print the table of experiments."""
    parser = argparse.ArgumentParser(prog="python -m flows.experiments", description=__doc__)
    parser.add_argument(
        "-A", "--all-commits", action="store_true", help="list the experiments of all commits, not only of the last one"
    )
    arguments = parser.parse_args()
    with report_errors(), chdir(PROJECT):
        rows = read_rows(*(["--all-commits"] if arguments.all_commits else []))
        print(as_table(rows, width=shutil.get_terminal_size().columns))


if __name__ == "__main__":
    main()
