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

from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import PROJECT, server
from flows.deployments import LOCAL_POOL, cli_environment, deploy_all, ensure_work_pool
from flows.git import check_checkout
from flows.prefect_server import ensure_server, server_in_force
from flows.settings import OWN_NAME, PrefectServer
from pipeline.core.errors import TemporaryError, UserError, report_errors

STOP_SECONDS = 40
"""For a worker to end: it waits for its flow runs, which wait for their stages."""
QUERY_SECONDS = "2"
"""How often the worker asks for flow runs; Prefect's own default is 10."""


def work(used: PrefectServer) -> int:
    """Run a worker until it ends or a signal comes; when this returns, what it started has ended."""
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", LOCAL_POOL, "--type", "process"]
    extra = {"PREFECT_WORKER_QUERY_SECONDS": os.environ.get("PREFECT_WORKER_QUERY_SECONDS", QUERY_SECONDS)}
    process = subprocess.Popen(
        command,
        cwd=PROJECT,
        env={**os.environ, **cli_environment(used.api_url), **used.environment(), **extra},
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
    for name, value in {**cli_environment(found.api_url), **kept, **own}.items():
        print(f"export {name}={shlex.quote(value)}")


def _serve() -> int:
    check_checkout(PROJECT)
    used = ensure_server()
    with temporary_settings({PREFECT_API_URL: used.api_url}):
        ensure_work_pool(LOCAL_POOL)
        names = deploy_all(used.api_url)
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
