"""The Prefect flow that runs the DVC stages. Importing this package sets the variables that Prefect reads at import."""

import os
import sys
import traceback
import warnings
from pathlib import Path
from types import TracebackType

import pipeline  # noqa: F401  # it sets HOME for a user id without a home folder
from pipeline.core.errors import EXIT_USER, escape_control_chars
from pipeline.core.network import keep_loopback_off_proxies

# the user's checkout: the folder that has `dvc.yaml` and this package
PROJECT = Path(__file__).resolve().parent.parent

FLOW_NAME = "train-classifier"

_USER_PROFILES = Path.home() / ".prefect" / "profiles.toml"

# environment variables and the value that each gets unless the user has set it
DEFAULTS = {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "true",
    "PREFECT_HOME": str(PROJECT / ".prefect"),
    # Prefect reads profiles from PREFECT_HOME; this keeps the user's own profiles, which may name a server, in use
    **(
        {"PREFECT_PROFILES_PATH": str(_USER_PROFILES)}
        if _USER_PROFILES.exists() and not os.environ.get("PREFECT_HOME")
        else {}
    ),
    "PREFECT_SERVER_API_HOST": "127.0.0.1",
    "PREFECT_CLI_PROMPT": "false",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_FLOW_RUN_FMT": "%(asctime)s flow: %(message)s",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_TASK_RUN_FMT": "%(asctime)s %(task_run_name)s: %(message)s",
}


def _set_defaults() -> None:
    """Set the variables of DEFAULTS that the user has not set, and exclude loopback addresses from proxies."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    keep_loopback_off_proxies()


def _report_bad_settings(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Report a setting that Prefect refuses at import in one line; print all other errors as Python does."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(trace)]
    if not isinstance(error, ValueError) or not any(name.startswith("prefect.settings") for name in modules):
        sys.__excepthook__(kind, error, trace)
        return
    reason = escape_control_chars(" ".join(str(error).partition("For further information")[0].split()))
    place = os.environ.get("PREFECT_PROFILES_PATH") or Path(os.environ["PREFECT_HOME"]) / "profiles.toml"
    remedy = f"correct it where it is set: PREFECT_… variables, .env, prefect.toml, pyproject.toml or {place}"
    print(f"error: Prefect's settings: {reason}; {remedy}", file=sys.stderr, flush=True)
    os._exit(EXIT_USER)


_set_defaults()
sys.excepthook = _report_bad_settings
# not needed: a command that writes into the folder reports in one line that it cannot be written
warnings.filterwarnings("ignore", message="Failed to create the Prefect home directory")
