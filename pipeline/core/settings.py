"""Read all environment variables of the pipeline in one place, into one typed object for each process.

docs/settings.md describes the variables of MLflow, Prefect and proxies. Variables that a library reads by itself, such
as `MLFLOW_TRACKING_TOKEN`, are not here.
"""

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

PROXY_VARIABLES = ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY")
# the first that is set is used; the Makefile chooses in the same way for pip and uv
CERTIFICATE_VARIABLES = ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_DIR")
USER_VARIABLES = ("LOGNAME", "USER", "LNAME", "USERNAME")  # Python's `getpass` reads the user's name from these


@dataclass(frozen=True)
class Settings:
    """The values of the environment variables; without another statement, a variable that is not set is empty."""

    # PIPELINE_PROJECT: the project, where the current folder is a flow run's clone of it
    project: str
    # PIPELINE_CACHE_DIR: the folder for checkpoints and other cached files; relative to the project, or absolute
    cache_dir: Path
    # whether PIPELINE_FLOW_RUN_ID is set, even to an empty text: then the current folder is a temporary clone
    in_flow_clone: bool
    # PIPELINE_FLOW_RUN_ID: the Prefect flow run that runs this stage; empty also in the clone of a reproduction
    flow_run_id: str
    # PIPELINE_FLOW_RUN_NAME: the name of that flow run
    flow_run_name: str
    # PIPELINE_FLOW_RUN_LINK: the address of that flow run's page
    flow_run_link: str
    # the name of the current DVC experiment: PIPELINE_EXPERIMENT if it is set, even to an empty text, else DVC_EXP_NAME
    experiment: str
    # PIPELINE_RECIPE: the recipe of the flow run; if it is empty, it is found by the parameters
    recipe: str
    # PIPELINE_REPRODUCES: the id of the MLflow run that this training reproduces, or None
    reproduces: str | None
    # PIPELINE_PARENT_RUN: the MLflow run over several seeds to which this training belongs, or None
    parent_run: str | None
    # PIPELINE_RESULT_FILE: the file for a step's result; if it is empty, the step writes none
    result_file: str
    # PIPELINE_PROGRESS_FILE: the file for a step's progress; it is empty also in the ranks of a training other than 0
    progress_file: str
    # PIPELINE_OWN_PREFECT_API_URL: the address that `make prefect-env` printed for the project's own server
    own_prefect_api_url: str
    # PIPELINE_NOTIFY_WEBHOOK, _SLACK, _EMAIL: where messages about nightly runs go; they may hold a password or token
    notify_webhook: str = field(repr=False)
    notify_slack: str = field(repr=False)
    notify_email: str = field(repr=False)
    # PIPELINE_NOTIFY_HOURS: the longest time from one completed nightly run to the next; if it is empty, the default
    notify_hours: str

    # DVC_ROOT: the project whose DVC runs this stage
    dvc_root: str
    # whether DVC_STAGE is set: DVC sets it for the stages that it runs
    in_dvc_stage: bool
    # whether DVC_EXP_NAME is set: `dvc exp run` sets it
    in_dvc_experiment: bool

    # MLFLOW_TRACKING_URI: the store of the runs; if it is empty, `mlflow.db` in the project
    mlflow_tracking_uri: str
    # MLFLOW_EXPERIMENT_NAME: the experiment of new runs; if it is empty, that of the data set or of its folder
    mlflow_experiment_name: str
    # MLFLOW_EXPERIMENT_ID: the id of the experiment of new runs
    mlflow_experiment_id: str
    # MLFLOW_RUN_ID: the steps that log to MLflow refuse it
    mlflow_run_id: str
    # MLFLOW_WORKSPACE: the workspace on an MLflow server
    mlflow_workspace: str
    # MLFLOW_ENABLE_WORKSPACES: whether the store has workspaces
    mlflow_enable_workspaces: str

    # whether one of PROXY_VARIABLES is set, in upper or lower case
    uses_proxy: bool
    # the hosts that no_proxy and NO_PROXY name, in this order; a client reads one of the two variables
    no_proxy: tuple[str, ...]
    # name and value of each of CERTIFICATE_VARIABLES that is set
    certificates: tuple[tuple[str, str], ...]
    # CXX: the C++ compiler of torch.compile; if it is not set, g++
    cxx: str
    # the first of USER_VARIABLES that is set
    user_name: str


@functools.cache
def get_settings() -> Settings:
    """Return the settings of this process; the environment is read at the first call.

    A test that changes the environment after that calls `get_settings.cache_clear()`.
    """
    return read_settings(os.environ)


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Return the settings that environment variables define."""

    def text(name: str) -> str:
        return environment.get(name, "")

    return Settings(
        project=text("PIPELINE_PROJECT"),
        cache_dir=Path(text("PIPELINE_CACHE_DIR") or ".cache"),
        in_flow_clone="PIPELINE_FLOW_RUN_ID" in environment,
        flow_run_id=text("PIPELINE_FLOW_RUN_ID"),
        flow_run_name=text("PIPELINE_FLOW_RUN_NAME"),
        flow_run_link=text("PIPELINE_FLOW_RUN_LINK"),
        experiment=environment.get("PIPELINE_EXPERIMENT", text("DVC_EXP_NAME")),
        recipe=text("PIPELINE_RECIPE"),
        reproduces=text("PIPELINE_REPRODUCES") or None,
        parent_run=text("PIPELINE_PARENT_RUN") or None,
        result_file=text("PIPELINE_RESULT_FILE"),
        progress_file="" if text("RANK") not in ("", "0") else text("PIPELINE_PROGRESS_FILE"),
        own_prefect_api_url=text("PIPELINE_OWN_PREFECT_API_URL"),
        notify_webhook=text("PIPELINE_NOTIFY_WEBHOOK"),
        notify_slack=text("PIPELINE_NOTIFY_SLACK"),
        notify_email=text("PIPELINE_NOTIFY_EMAIL"),
        notify_hours=text("PIPELINE_NOTIFY_HOURS"),
        dvc_root=text("DVC_ROOT"),
        in_dvc_stage="DVC_STAGE" in environment,
        in_dvc_experiment="DVC_EXP_NAME" in environment,
        mlflow_tracking_uri=text("MLFLOW_TRACKING_URI"),
        mlflow_experiment_name=text("MLFLOW_EXPERIMENT_NAME"),
        mlflow_experiment_id=text("MLFLOW_EXPERIMENT_ID"),
        mlflow_run_id=text("MLFLOW_RUN_ID"),
        mlflow_workspace=text("MLFLOW_WORKSPACE"),
        mlflow_enable_workspaces=text("MLFLOW_ENABLE_WORKSPACES"),
        uses_proxy=any(text(name) or text(name.lower()) for name in PROXY_VARIABLES),
        no_proxy=tuple(filter(None, f"{text('no_proxy')},{text('NO_PROXY')}".split(","))),
        certificates=tuple((name, text(name)) for name in CERTIFICATE_VARIABLES if text(name)),
        cxx=environment.get("CXX", "g++"),
        user_name=next(filter(None, map(text, USER_VARIABLES)), ""),
    )
