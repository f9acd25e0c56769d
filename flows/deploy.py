"""A deployment that takes its code from a git URL at one revision, so that a worker elsewhere needs no checkout.

`python -m flows.deploy --git URL --revision REV` registers `train-classifier/from-git` in the work pool `git`. The
other machine needs the locked packages and `prefect worker start --pool git --type process` with, in its environment:
PREFECT_API_URL; MLFLOW_TRACKING_URI (a server); PIPELINE_DVC_REMOTE, from which the flow takes what DVC has and into
which it puts what it makes. The experiment goes to the git URL: `dvc exp pull origin NAME` brings it.
"""

import argparse
import re
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.utilities.callables import parameter_schema

from flows import FLOW_NAME, PROJECT
from flows.prefect_server import ensure_server
from flows.train_classifier import train_classifier
from flows.worker import ensure_work_pool
from flows.git import find_repository
from pipeline.core.errors import UserError, report_errors, shown
from pipeline.core.git import git

POOL = "git"
NAME = "from-git"
ENTRYPOINT = "flows/train_classifier.py:train_classifier"


def resolve_remote_revision(url: str, revision: str) -> str:
    """The commit that a branch, tag or full hash stands for there; raises UserError where there is none."""
    if shown(url) != url:  # Prefect would keep it, and show it to everybody
        raise UserError(f"--git: found a password in the address of {shown(url)}; use git's credential helper there")
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    lines = git(PROJECT, "ls-remote", "--", url).splitlines()
    commits = {ref: commit for commit, _, ref in (line.partition("\t") for line in lines)}
    wishes = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}^{{}}", f"refs/tags/{revision}")
    found = next((commits[wish] for wish in wishes if wish in commits), None)
    if found is None:
        raise UserError(f"--revision: {shown(url)} has no {revision!r}; allowed: a branch, a tag or a full commit hash")
    return found


def deploy_from_git(url: str, commit: str) -> UUID:
    """Register the deployment; the form is that of this checkout."""
    ensure_work_pool(POOL)
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
            NAME,
            version=commit[:8],
            description=f"Train a classifier with the code of {shown(url)} at {commit[:8]}.",
            entrypoint=ENTRYPOINT,
            pull_steps=steps,
            work_pool_name=POOL,
            parameter_openapi_schema=parameter_schema(train_classifier).model_dump_for_openapi(),
            enforce_parameter_schema=True,
        )


def main() -> None:
    """Register the deployment and say what to do on the other machine."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m flows.deploy", description=summary, epilog=rest)
    parser.add_argument("--git", required=True, metavar="URL", help="where the worker clones from (and pushes to)")
    parser.add_argument("--revision", default="HEAD", help="branch, tag or full commit hash (default: %(default)s)")
    arguments = parser.parse_args()
    with report_errors():
        commit = resolve_remote_revision(arguments.git, arguments.revision)
        with temporary_settings({PREFECT_API_URL: ensure_server().api_url}):
            deploy_from_git(arguments.git, commit)
        print(
            f"Deployment: {FLOW_NAME}/{NAME} at {commit}\nWorker:     prefect worker start --pool {POOL} --type process"
        )


if __name__ == "__main__":
    main()
