"""A worker for the deployments of prefect.yaml, in the foreground until Ctrl-C: `make worker`.

`python -m flows.worker` ensures a Prefect server and the work pool, deploys, and starts the worker.
`python -m flows.worker --env` prints what a shell needs for the `prefect` command to reach the same server.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
from contextlib import suppress

from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import FLOW_NAME, PROJECT, server
from flows.prefect_server import ensure_server, server_in_force
from flows.settings import OWN_NAME, PrefectServer
from flows.git import check_checkout
from pipeline.core.errors import TemporaryError, UserError, report_errors

POOL = "local"
STOP_SECONDS = 40
"""A worker that ends lets its flow runs end, which let their stages end."""
QUERY_SECONDS = "2"
"""How often the worker asks for flow runs; Prefect's own default is 10."""


def environment(api_url: str) -> dict[str, str]:
    """What the `prefect` command needs to reach the server and to keep to this project."""
    return {"PREFECT_API_URL": api_url, "PREFECT_HOME": os.environ["PREFECT_HOME"]}


def ensure_work_pool(name: str = POOL) -> None:
    """Make the work pool unless it is there."""
    with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):
        client.create_work_pool(WorkPoolCreate(name=name, type="process"))


def deploy(api_url: str) -> list[str]:
    """Register what prefect.yaml says; returns the deployments' names."""
    active = _active_schedules()
    done = subprocess.run(
        _command("--no-prompt", "deploy", "--all"),
        cwd=PROJECT,
        env={**os.environ, **environment(api_url)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = next(
            (line for line in reversed((done.stdout + done.stderr).splitlines()) if line.strip()), "no reason given"
        )
        raise UserError(f"prefect deploy --all: {reason.strip()}; see prefect.yaml")
    with get_client(sync_client=True) as client:
        for found in _deployments(client):
            for schedule in found.schedules if found.name in active else []:
                client.update_deployment_schedule(found.id, schedule.id, active=True)
        return sorted(f"{FLOW_NAME}/{found.name}" for found in _deployments(client))


def _deployments(client: SyncPrefectClient) -> list[DeploymentResponse]:
    ours = FlowFilter(name=FlowFilterName(any_=[FLOW_NAME]))
    return client.read_deployments(flow_filter=ours, limit=200, offset=0)


def _active_schedules() -> set[str]:
    """The deployments whose schedule the user switched on, which Prefect would make anew as the file has it: off."""
    with get_client(sync_client=True) as client:
        return {found.name for found in _deployments(client) if any(one.active for one in found.schedules)}


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "prefect", *arguments]


def work(used: PrefectServer) -> int:
    """Run a worker until it ends or a signal comes; what it started has ended when this returns."""
    command = _command("worker", "start", "--pool", POOL, "--type", "process")
    extra = {"PREFECT_WORKER_QUERY_SECONDS": os.environ.get("PREFECT_WORKER_QUERY_SECONDS", QUERY_SECONDS)}
    process = subprocess.Popen(
        command,
        cwd=PROJECT,
        env={**os.environ, **environment(used.api_url), **used.environment(), **extra},
        start_new_session=True,
    )
    try:
        return process.wait()
    finally:  # the signal comes to us alone, as the worker is in a session of its own
        server.end_group(process.pid, grace_seconds=STOP_SECONDS)


def _print_environment() -> None:
    try:
        found = server_in_force()
        if found is None:
            raise TemporaryError("no Prefect server of this project is running; `make worker` or `make ui` starts one")
    except (UserError, TemporaryError):
        print("false")  # for the shell that evaluates what we print
        raise
    names = ("PREFECT_PROFILES_PATH", "DO_NOT_TRACK", "NO_PROXY", "no_proxy")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    own = {OWN_NAME: found.api_url} if found.source is None else {}
    for name, value in {**environment(found.api_url), **kept, **own}.items():
        print(f"export {name}={shlex.quote(value)}")


def _serve() -> int:
    check_checkout(PROJECT)
    used = ensure_server()
    with temporary_settings({PREFECT_API_URL: used.api_url}):
        ensure_work_pool()
        names = deploy(used.api_url)
    print(f"Deployments: {', '.join(names)}\nForm:        {used.page}/deployments")
    print('Commands:    eval "$(make prefect-env)"; prefect deployment run train-classifier/on-demand -p recipe=digits')
    print("Ctrl-C stops the worker and what it runs.", flush=True)
    return work(used)


def main() -> None:
    """Deploy and work, or print the environment."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.worker",
        description="Register the deployments of prefect.yaml and run them until Ctrl-C.",
        epilog='The prefect command needs PREFECT_API_URL and PREFECT_HOME: eval "$(python -m flows.worker --env)"',
    )
    parser.add_argument("--env", action="store_true", help="print what a shell needs for the prefect command")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with report_errors():
        if arguments.env:
            _print_environment()
        else:
            sys.exit(_serve())


if __name__ == "__main__":
    main()
