"""Make the report after `evaluate`, in a process of its own, so that no failure of it is a failure of the stage."""

import subprocess
import sys

from pipeline.core.errors import first_line
from pipeline.core.git import environment
from pipeline.core.settings import get_settings

COMMAND = ("-m", "pipeline.report")
TIMEOUT_SECONDS = 300
# DVC sets it for its stages: an error of the report must not advise to restore the outputs of the stage
STAGE_VARIABLE = "DVC_STAGE"


def make_report() -> None:
    """Make `artifacts/report.html`, or print a warning with the reason and the command to try again.

    In a flow run's clone nothing is made: the flow makes the report at its end, with the times of the steps.
    """
    if get_settings().in_flow_clone:
        return
    variables = {name: value for name, value in environment().items() if name != STAGE_VARIABLE}
    try:
        done = subprocess.run(
            [sys.executable, *COMMAND],
            env=variables,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        _warn(first_line(error))
        return
    warnings = [f"{line}\n" for line in done.stderr.splitlines() if line.startswith("warning: ")]
    print(done.stdout, *warnings, sep="", end="", flush=True)
    if done.returncode:
        _warn(first_line(done.stderr.strip().rpartition("\n")[2]).removeprefix("error: "))


def _warn(reason: str) -> None:
    """Print why there is no new report, and how to try again."""
    print(
        f"warning: the report was not made: {reason}; `.venv/bin/python {' '.join(COMMAND)}` tries it again", flush=True
    )
