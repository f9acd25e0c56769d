"""Prefect flows over the DVC stages. Importing this package sets what must be set before Prefect is imported."""

import os
import sys
import traceback
import warnings
from pathlib import Path
from types import TracebackType

import pipeline  # noqa: F401  # it gives a home to a user who has none
from pipeline.core.errors import EXIT_USER, escape_control_chars
from pipeline.core.network import keep_loopback_off_proxies

PROJECT = Path(__file__).resolve().parent.parent
"""The folder with `dvc.yaml` that holds this package: the caller's checkout."""

FLOW_NAME = "train-classifier"

_USER_PROFILES = Path.home() / ".prefect" / "profiles.toml"

DEFAULTS = {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "true",
    "PREFECT_HOME": str(PROJECT / ".prefect"),
    # Prefect looks for profiles in PREFECT_HOME; the user's own, with the address of a server, still count.
    **(
        {"PREFECT_PROFILES_PATH": str(_USER_PROFILES)}
        if _USER_PROFILES.exists() and not os.environ.get("PREFECT_HOME")
        else {}
    ),
    "PREFECT_SERVER_API_HOST": "127.0.0.1",
    "PREFECT_CLI_PROMPT": "false",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_FLOW_RUN_FMT": "%(asctime)s | %(flow_run_name)s | %(message)s",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_TASK_RUN_FMT": "%(asctime)s | %(task_run_name)-9s | %(message)s",
}
"""Environment variables and the value each has unless the user set it."""


def _set_defaults() -> None:
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    keep_loopback_off_proxies()


def _report_bad_settings(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Report in one line a setting that Prefect refuses when it is imported; leave all other errors as they are."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(trace)]
    if not isinstance(error, ValueError) or not any(name.startswith("prefect.settings") for name in modules):
        sys.__excepthook__(kind, error, trace)
        return
    reason = escape_control_chars(" ".join(str(error).partition("For further information")[0].split()))
    place = os.environ.get("PREFECT_PROFILES_PATH") or Path(os.environ["PREFECT_HOME"]) / "profiles.toml"
    remedy = f"correct it in the PREFECT_… variables, .env, prefect.toml, pyproject.toml or {place}"
    print(f"error: Prefect's settings: {reason}; {remedy}", file=sys.stderr, flush=True)
    os._exit(EXIT_USER)


_set_defaults()
sys.excepthook = _report_bad_settings
# a command that needs the folder reports in one line where it cannot be written
warnings.filterwarnings("ignore", message="Failed to create the Prefect home directory")
