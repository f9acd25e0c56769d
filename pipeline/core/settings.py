"""The environment variables that the pipeline reads: one typed object, made once for each process.

docs/settings.md describes the variables of MLflow, Prefect and proxies. Variables that a library reads by itself, such
as `MLFLOW_TRACKING_TOKEN`, are not here.
"""

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PROXY_VARIABLES = ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY")
CERTIFICATE_VARIABLES = ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_DIR")
"""In the order in which they are used. The Makefile has the same for pip and uv."""
USER_VARIABLES = ("LOGNAME", "USER", "LNAME", "USERNAME")
"""Where Python's `getpass` looks for the name of the user."""


@dataclass(frozen=True)
class Settings:
    """The values of the environment variables; a variable that is not set counts as an empty one unless stated."""

    project: str
    """PIPELINE_PROJECT: the project of which the current folder is a flow run's clone."""
    cache_dir: Path
    """PIPELINE_CACHE_DIR: the folder for checkpoints and what else is kept; a relative path is one in the project."""
    in_flow_clone: bool
    """Whether PIPELINE_FLOW_RUN_ID is set, even to an empty text: the current folder is a clone, to be deleted."""
    flow_run_id: str
    """PIPELINE_FLOW_RUN_ID: the Prefect flow run that runs this stage; empty also in the clone of a reproduction."""
    flow_run_name: str
    """PIPELINE_FLOW_RUN_NAME: the name of that flow run."""
    flow_run_link: str
    """PIPELINE_FLOW_RUN_LINK: the address of that flow run's page."""
    experiment: str
    """The DVC experiment that is being made: PIPELINE_EXPERIMENT where it is set, even to an empty text, else
    DVC_EXP_NAME."""
    reproduces: str | None
    """PIPELINE_REPRODUCES: the id of the MLflow run that this training makes again, or None."""
    result_file: str
    """PIPELINE_RESULT_FILE: the file for a step's result; empty: the step writes none."""
    own_prefect_api_url: str
    """PIPELINE_OWN_PREFECT_API_URL: the address that `make prefect-env` printed for the project's own server."""

    dvc_root: str
    """DVC_ROOT: the project whose DVC runs this stage."""
    in_dvc_stage: bool
    """Whether DVC_STAGE is set, as DVC does for the stages that it runs."""
    in_dvc_experiment: bool
    """Whether DVC_EXP_NAME is set, as `dvc exp run` does."""

    mlflow_tracking_uri: str
    """MLFLOW_TRACKING_URI: the store of the runs; empty: `mlflow.db` in the project."""
    mlflow_experiment_name: str
    """MLFLOW_EXPERIMENT_NAME: the experiment of new runs; empty: the data set's name."""
    mlflow_experiment_id: str
    """MLFLOW_EXPERIMENT_ID: the same, by its id."""
    mlflow_run_id: str
    """MLFLOW_RUN_ID: refused by the steps that record."""
    mlflow_workspace: str
    """MLFLOW_WORKSPACE: the workspace on an MLflow server."""
    mlflow_enable_workspaces: str
    """MLFLOW_ENABLE_WORKSPACES: whether the store has workspaces."""

    uses_proxy: bool
    """Whether one of ALL_PROXY, HTTP_PROXY and HTTPS_PROXY is set, in capitals or not."""
    no_proxy: tuple[str, ...]
    """The hosts that no_proxy and NO_PROXY name, in this order; clients read one of the two."""
    certificates: tuple[tuple[str, str], ...]
    """Name and value of each of CERTIFICATE_VARIABLES that is set."""
    cxx: str
    """CXX: the C++ compiler of torch.compile; by default g++."""
    user_name: str
    """The first of LOGNAME, USER, LNAME and USERNAME that is set."""


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
        reproduces=text("PIPELINE_REPRODUCES") or None,
        result_file=text("PIPELINE_RESULT_FILE"),
        own_prefect_api_url=text("PIPELINE_OWN_PREFECT_API_URL"),
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
