"""The log of a flow run, in the terminal and on Prefect's page: lines of the stages, without noise and tracebacks."""

import logging
import re

from prefect import get_run_logger
from prefect.logging.configuration import setup_logging

from flows.dvc_client import StepError
from pipeline.core.errors import TemporaryError, UserError

# what Prefect logs besides the outcome that the summary, the line of the error or the state of the task reports
_NOISE = re.compile(
    r"Finished in state (Completed|Cached|Cancelled|Running|Promoted|Refused|Unchanged|Dry run|Rolled back)\("
    r"|Crash detected! Execution was aborted by (an interrupt|a termination) signal"
)
_INTERRUPTION = re.compile(r"Finished in state Crashed\('Execution was aborted by (an interrupt|a termination) signal")
# what the terminal of `make run` leaves out too, since the last lines there report the error
_FAILURE = re.compile(r"error: |Finished in state Failed\(")
_SIGNALS = {"an interrupt": "interrupted with Ctrl-C", "a termination": "ended by SIGTERM"}


class _Filter(logging.Filter):
    """A log filter that drops noise, and the traceback of an error whose message is a complete line."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, (StepError, UserError, TemporaryError)):
            record.msg, record.args, record.exc_info = f"error: {error}", (), None
        if interruption := _INTERRUPTION.match(record.getMessage()):
            record.msg, record.args = _SIGNALS[interruption[1]], ()
        return not _NOISE.match(record.getMessage())


def shorten_logs() -> None:
    """Let Prefect's loggers of flow runs and task runs use the filter."""
    for name in ("prefect.task_runs", "prefect.flow_runs"):
        logging.getLogger(name).addFilter(_Filter())


def leave_failure_to_caller() -> None:
    """Leave the error with which a flow run fails out of the terminal, since the caller prints it; Prefect keeps it."""
    setup_logging()
    for handler in logging.getLogger().handlers:
        handler.addFilter(lambda record: not _FAILURE.match(record.getMessage()))


def log(line: str) -> None:
    """Log a line of a stage or of DVC in Prefect's current flow run or task run."""
    get_run_logger().info(line)


def warn(line: str) -> None:
    """Log a warning in Prefect's current flow run or task run."""
    get_run_logger().warning("%s", line)
