"""Register deployments of the flow: those of prefect.yaml, and one that clones its code from a git URL for each run.

`flows.worker` registers those of prefect.yaml and runs them in this checkout. A worker elsewhere needs no checkout:
`python -m flows.deployments --git URL --revision REV` registers `train-classifier/from-git` in the work pool `git`. The
other machine needs the locked packages. It runs `prefect worker start --pool git --type process` with these variables:
PREFECT_API_URL; MLFLOW_TRACKING_URI (a server); PIPELINE_DVC_REMOTE, a DVC remote from which a run pulls cached outputs
and to which it pushes its own. The experiment is pushed to the git URL: `dvc exp pull origin NAME` fetches it.
"""

import argparse
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.utilities.callables import parameter_schema

from flows import FLOW_NAME, PROJECT
from flows.git import find_repository
from flows.prefect_server import MAX_RECORDS_PER_REQUEST, ensure_server
from flows.train_classifier import train_classifier
from pipeline.core.errors import UserError, redact_url, report_errors
from pipeline.core.git import git

LOCAL_POOL = "local"  # the work pool of the deployments in prefect.yaml
NIGHTLY = f"{FLOW_NAME}/nightly"
GIT_POOL = "git"
GIT_DEPLOYMENT = "from-git"
ENTRYPOINT = "flows/train_classifier.py:train_classifier"


def cli_environment(api_url: str) -> dict[str, str]:
    """Return the variables with which the `prefect` command uses the server and this project's folder of settings."""
    return {"PREFECT_API_URL": api_url, "PREFECT_HOME": os.environ["PREFECT_HOME"]}


def ensure_work_pool(name: str) -> None:
    """Create the work pool unless it exists."""
    with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):
        client.create_work_pool(WorkPoolCreate(name=name, type="process"))


def deploy_all(api_url: str) -> list[str]:
    """Register the deployments of prefect.yaml and return their names; a schedule that is enabled stays enabled."""
    active = _active_schedules()
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
        cwd=PROJECT,
        env={**os.environ, **cli_environment(api_url)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise UserError(f"prefect deploy --all failed: {(lines or ['no reason given'])[-1]}; correct prefect.yaml")
    with get_client(sync_client=True) as client:
        for found in _deployments(client):
            for schedule in found.schedules if found.name in active else []:  # `prefect deploy` has disabled them
                client.update_deployment_schedule(found.id, schedule.id, active=True)
        return sorted(f"{FLOW_NAME}/{found.name}" for found in _deployments(client))


def _deployments(client: SyncPrefectClient) -> list[DeploymentResponse]:
    """Return the deployments of our flow on the server."""
    our_flow = FlowFilter(name=FlowFilterName(any_=[FLOW_NAME]))
    return client.read_deployments(flow_filter=our_flow, limit=MAX_RECORDS_PER_REQUEST, offset=0)


def _active_schedules() -> set[str]:
    """Return the names of the deployments whose schedule is enabled on the server."""
    with get_client(sync_client=True) as client:
        return {found.name for found in _deployments(client) if any(one.active for one in found.schedules)}


def resolve_remote_revision(url: str, revision: str) -> str:
    """Return the commit that a branch, tag or full hash names in the repository at `url`; raises UserError if none."""
    if redact_url(url) != url:  # Prefect would store the password and show it to everybody
        raise UserError(
            f"--git: found a password in the address of {redact_url(url)}; allowed: an address without one; leave it "
            "out, and set up git's credential helper on the worker's machine"
        )
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    lines = git(PROJECT, "ls-remote", "--", url).splitlines()
    commits = {ref: commit for commit, _, ref in (line.partition("\t") for line in lines)}
    refs = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}^{{}}", f"refs/tags/{revision}")
    found = next((commits[ref] for ref in refs if ref in commits), None)
    if found is None:
        raise UserError(
            f"--revision: {redact_url(url)} has no {revision!r}; allowed: a branch, a tag or a full commit hash; "
            "push it, or name another one"
        )
    return found


def deploy_from_git(url: str, commit: str) -> UUID:
    """Register the deployment from git and return its id; its form in Prefect's UI has this checkout's parameters."""
    ensure_work_pool(GIT_POOL)
    steps: list[dict[str, Any]] = [
        {"prefect.deployments.steps.git_clone": {"id": "clone", "repository": url, "commit_sha": commit}}
    ]
    _, subfolder = find_repository(PROJECT)
    if subfolder != Path():
        folder = f"{{{{ clone.directory }}}}/{subfolder}"
        steps.append({"prefect.deployments.steps.set_working_directory": {"directory": folder}})
    with get_client(sync_client=True) as client:
        return client.create_deployment(
            client.create_flow_from_name(FLOW_NAME),
            GIT_DEPLOYMENT,
            version=commit[:8],
            description=f"Train a classifier with the code of {redact_url(url)} at {commit[:8]}.",
            entrypoint=ENTRYPOINT,
            pull_steps=steps,
            work_pool_name=GIT_POOL,
            parameter_openapi_schema=parameter_schema(train_classifier).model_dump_for_openapi(),
            enforce_parameter_schema=True,
        )


def main() -> None:
    """Register the deployment from git and print the command of the other machine."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m flows.deployments", description=summary, epilog=rest)
    parser.add_argument("--git", required=True, metavar="URL", help="where the worker clones from (and pushes to)")
    parser.add_argument("--revision", default="HEAD", help="branch, tag or full commit hash (default: %(default)s)")
    arguments = parser.parse_args()
    with report_errors():
        commit = resolve_remote_revision(arguments.git, arguments.revision)
        with temporary_settings({PREFECT_API_URL: ensure_server().api_url}):
            deploy_from_git(arguments.git, commit)
        print(f"Deployment: {FLOW_NAME}/{GIT_DEPLOYMENT} at {commit}")
        print(f"Worker:     prefect worker start --pool {GIT_POOL} --type process")


if __name__ == "__main__":
    main()
