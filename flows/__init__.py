"""Prefect flows over the DVC stages. Importing this package sets what must be set before Prefect is imported."""

import os
import warnings
from pathlib import Path

import pipeline  # noqa: F401  # it gives a home to a user who has none

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
    **({"PREFECT_PROFILES_PATH": str(_USER_PROFILES)} if _USER_PROFILES.exists() else {}),
    "PREFECT_SERVER_API_HOST": "127.0.0.1",
    "PREFECT_CLI_PROMPT": "false",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_FLOW_RUN_FMT": "%(asctime)s | %(flow_run_name)s | %(message)s",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_TASK_RUN_FMT": "%(asctime)s | %(task_run_name)-9s | %(message)s",
}
"""Environment variables and the value each has unless the user set it."""


def _set_defaults() -> None:
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    for name in ("NO_PROXY", "no_proxy"):  # servers on loopback are not to be sought through a proxy
        hosts = os.environ.get(name, "")
        if "127.0.0.1" not in hosts:
            os.environ[name] = ",".join(filter(None, [hosts, "127.0.0.1", "localhost"]))


_set_defaults()
# of a folder that cannot be written, what needs it tells in one line
warnings.filterwarnings("ignore", message="Failed to create the Prefect home directory")
