"""Run a worker for the deployments of prefect.yaml, in the foreground until Ctrl-C: `make worker`.

`python -m flows.worker` ensures a Prefect server and the work pool, registers the deployments, and starts the worker.
`python -m flows.worker --env` prints the variables that a shell needs for the `prefect` command to use the same server.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys

from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import PROJECT, notifications, server
from flows.deployments import LOCAL_POOL, cli_environment, deploy_all, ensure_work_pool
from flows.git import check_checkout
from flows.prefect_server import current_server, ensure_server
from flows.settings import NOTIFY_ADDRESSES, OWN_API_URL_VARIABLE, PrefectServer
from pipeline.core.errors import TemporaryError, UserError, report_errors

STOP_SECONDS = 40  # a worker waits for its flow runs, which wait for their stages
QUERY_SECONDS = "2"  # between two requests for new flow runs; Prefect's default is 10


def work(used: PrefectServer) -> int:
    """Run a worker until it ends or a signal comes, end all that it has started, and return its exit status."""
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", LOCAL_POOL, "--type", "process"]
    extra = {
        "PREFECT_WORKER_QUERY_SECONDS": os.environ.get("PREFECT_WORKER_QUERY_SECONDS", QUERY_SECONDS),
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(notifications.heartbeat_seconds()),
    }
    inherited = {name: value for name, value in os.environ.items() if name not in NOTIFY_ADDRESSES}
    process = subprocess.Popen(
        command,
        cwd=PROJECT,
        env={**inherited, **cli_environment(used.api_url), **used.environment(), **extra},
        start_new_session=True,
    )
    try:
        return process.wait()
    finally:  # a signal reaches only this process, since the worker is in a session of its own
        server.end_group(process.pid, grace_seconds=STOP_SECONDS)


def _print_environment() -> None:
    """Print `export` commands for the current server; raises TemporaryError where none is running."""
    try:
        found = current_server()
        if found is None:
            raise TemporaryError("no Prefect server of this project is running; `make worker` or `make ui` starts one")
    except (UserError, TemporaryError):
        print("false")  # so that the `eval` of the shell fails
        raise
    names = ("PREFECT_PROFILES_PATH", "DO_NOT_TRACK", "NO_PROXY", "no_proxy")
    passed_on = {name: os.environ[name] for name in names if name in os.environ}
    own = {OWN_API_URL_VARIABLE: found.api_url} if found.source is None else {}
    for name, value in {**cli_environment(found.api_url), **passed_on, **own}.items():
        print(f"export {name}={shlex.quote(value)}")


def _serve() -> int:
    """Register the deployments, print how to use them, and run the worker; returns its exit status."""
    check_checkout(PROJECT)
    used = ensure_server()
    with temporary_settings({PREFECT_API_URL: used.api_url}):
        ensure_work_pool(LOCAL_POOL)
        names = deploy_all(used.api_url)
        notified = notifications.register(used.api_url)
    print(f"Deployments: {', '.join(names)}\nForm:        {used.page}/deployments")
    print('Commands:    eval "$(make prefect-env)"')
    print("             .venv/bin/prefect deployment run train-classifier/on-demand -p recipe=digits")
    print(f"Failed, crashed and missed nights are reported by: {', '.join(notified) or 'nothing (docs/operations.md)'}")
    print("Ctrl-C stops the worker and its flow runs.", flush=True)
    return work(used)


def main() -> None:
    """Register the deployments and run a worker, or print the environment."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.worker",
        description="Register the deployments of prefect.yaml and run them until Ctrl-C.",
        epilog='The prefect command needs PREFECT_API_URL and PREFECT_HOME: eval "$(python -m flows.worker --env)"',
    )
    parser.add_argument(
        "--env", action="store_true", help="print the variables that a shell needs for the prefect command"
    )
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
