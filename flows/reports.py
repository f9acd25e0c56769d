"""The report of an experiment: a page in `artifacts/reports/` of the project, which git ignores.

`pipeline.report` renders it in the clone of a flow run. It is removed with its experiment (`flows.cleanup`). Backups
leave it out, since MLflow has the page too.
"""

import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

from pipeline.artifacts import ARTIFACTS
from pipeline.core.errors import UserError, escape_control_chars

REPORTS = ARTIFACTS / "reports"
COMPARISON = "compare-"  # the beginning of the name of a page that belongs to a comparison, not to an experiment
MAX_SECONDS = 600  # a page takes seconds; a flow run must not wait forever for a store that does not answer


def report_path(project: Path, experiment: str) -> Path:
    """Return the path of the experiment's report."""
    return project / REPORTS / f"{experiment}.html"


def reports_without(project: Path, experiments: Collection[str]) -> list[Path]:
    """Return the reports of all experiments but these, also of those that `dvc exp remove` has removed."""
    pages = [path for path in sorted((project / REPORTS).glob("*.html")) if not path.name.startswith(COMPARISON)]
    return [path for path in pages if path.stem not in experiments]


def render(clone: Path, target: Path, *, environment: Mapping[str, str], seconds: Mapping[str, float]) -> list[str]:
    """Render the report of the files in `clone` to `target`, and return the warnings that this printed.

    `seconds` has the duration of each stage that ran. Raises UserError where the page cannot be made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    durations = [part for stage, value in seconds.items() for part in ("--seconds", f"{stage}={value:.3f}")]
    command = [sys.executable, "-m", "pipeline.report", "--output", str(target), *durations]
    try:
        done = subprocess.run(
            command,
            cwd=clone,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=MAX_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"it took more than {MAX_SECONDS} s") from None
    lines = [escape_control_chars(line) for line in done.stderr.splitlines() if line.strip()]
    if done.returncode:
        reason = lines[-1].removeprefix("error: ") if lines else f"exit status {done.returncode}"
        raise UserError(reason)
    return [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]
