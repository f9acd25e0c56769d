"""Check that servers, worker, nightly run and disk are well: `python -m flows.health`; nothing is changed.

One line a check: `ok`, `wrong` with what to do, or `unknown` where it could not be checked.
Exit status: 0 all ok, 1 something is wrong, 3 nothing is known to be wrong, but not all could be checked.
"""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import pynvml
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, Worker, WorkerStatus
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.types._datetime import now

from flows import PROJECT, doctor
from flows.checks import OTHER_GPUS
from flows.deployments import LOCAL_POOL, NIGHTLY
from flows.dvc_state import cache_folder
from flows.health_mlflow import CheckFailedError, check_mlflow, mlflow_runs
from flows.prefect_server import check_answers, current_server, prefect_client
from pipeline.core.errors import (
    EXIT_PARTIAL,
    TemporaryError,
    UserError,
    escape_control_chars,
    report_errors,
)
from pipeline.core.project import artifact_folder, pipeline_cache_folder
from pipeline.core.sqlite import sqlite_path
from pipeline.tracking.store_uri import tracking_uri

State = Literal["ok", "wrong", "unknown"]
# returns what is ok; raises CheckFailedError, or another error if the check cannot be made
Check = Callable[[Path], str]
MAX_NIGHTLY_AGE = timedelta(hours=26)  # a day, and two hours for a worker that was away
HEARTBEATS_MISSED = 3  # after as many missed heartbeats, Prefect's server too counts a worker as offline
MIN_FREE_GIB = 10.0  # a nightly run's files, a checkpoint and a backup of the databases fit many times
LEFTOVERS = (mlflow_runs, doctor.prefect_runs, doctor.workspaces, doctor.dvc_locks, doctor.temporary_files)


@dataclass(frozen=True)
class Result:
    """The outcome of one check; `text` is a line for people."""

    check: str
    state: State
    text: str


def check_prefect(project: Path) -> str:
    """Return that the Prefect server in use answers, with its address."""
    found = current_server(project)
    if found is None:
        raise CheckFailedError(
            "no server of this project is running; `python -m flows.server start`, or start its service"
        )
    try:
        with prefect_client(found.api_url):
            check_answers(found.api_url, found.source or found.page)
    except (UserError, TemporaryError) as error:
        raise CheckFailedError(str(error)) from None
    return f"{found.page} answers"


def check_worker(project: Path) -> str:
    """Return the workers that are online for the work pool of prefect.yaml."""
    with _connected(project) as client:
        try:
            pool = client.read_work_pool(LOCAL_POOL)
        except ObjectNotFound:
            raise CheckFailedError(f"the work pool {LOCAL_POOL} does not exist; `make worker` makes it") from None
        workers = client.read_workers_for_work_pool(LOCAL_POOL)
    if pool.is_paused:
        raise CheckFailedError(f"the work pool {LOCAL_POOL} is paused; `prefect work-pool resume {LOCAL_POOL}`")
    online = [one.name for one in workers if one.status == WorkerStatus.ONLINE and not _is_silent(one)]
    if not online:
        raise CheckFailedError(f"no worker of the pool {LOCAL_POOL} is online; `make worker`, or start its service")
    return f"{len(online)} online for the pool {LOCAL_POOL}: {', '.join(online)}"


def _is_silent(worker: Worker) -> bool:
    """Return whether a worker has missed its heartbeats; the server itself reports that only later."""
    if worker.last_heartbeat_time is None or not worker.heartbeat_interval_seconds:
        return True
    allowed = timedelta(seconds=HEARTBEATS_MISSED * worker.heartbeat_interval_seconds)
    return now("UTC") - worker.last_heartbeat_time > allowed


@contextmanager
def _connected(project: Path) -> Iterator[SyncPrefectClient]:
    """Yield a client of the Prefect server in use; raises TemporaryError where there is none."""
    found = current_server(project)
    if found is None:
        raise TemporaryError("no Prefect server of this project is running")
    with prefect_client(found.api_url) as client:
        yield client


def check_nightly(project: Path) -> str:
    """Return the state and age of the last nightly run, where its schedule is on."""
    with _connected(project) as client:
        try:
            deployment = client.read_deployment_by_name(NIGHTLY)
        except ObjectNotFound:
            raise CheckFailedError(f"the deployment {NIGHTLY} does not exist; `make worker` registers it") from None
        if deployment.paused or not any(one.active for one in deployment.schedules):
            raise CheckFailedError(
                f"the schedule of {NIGHTLY} is off; switch it on in Prefect's page, Deployments, or by "
                "`prefect deployment schedule resume`, or leave this check out: --skip nightly"
            )
        due = {"deployment_id": {"any_": [deployment.id]}, "expected_start_time": {"before_": now("UTC")}}
        runs = client.read_flow_runs(
            flow_run_filter=FlowRunFilter.model_validate(due), sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=1
        )
    if not runs:
        raise TemporaryError("its schedule is on, and no run was due yet")
    return _check_last_run(runs[0])


def _check_last_run(run: FlowRun) -> str:
    assert run.expected_start_time
    age = now("UTC") - run.expected_start_time
    state = run.state_name or "of no state"
    text = f"the last run, {run.name} of {run.expected_start_time:%Y-%m-%d %H:%M} UTC, is {state}"
    if not run.state or run.state.is_failed() or run.state.is_crashed() or run.state.is_cancelled() or state == "Late":
        raise CheckFailedError(f"{text}; its page in Prefect has the reason")
    if age > MAX_NIGHTLY_AGE:
        raise CheckFailedError(f"{text}; {age.total_seconds() / 3600:.0f} hours ago, allowed: {MAX_NIGHTLY_AGE}")
    return text


def check_disk(project: Path, *, min_free_gib: float = MIN_FREE_GIB) -> str:
    """Return the free space on each file system that has the project, a store or a cache."""
    places = [project, artifact_folder(project), cache_folder(project), pipeline_cache_folder(project)]
    if path := sqlite_path(tracking_uri(project)):
        places.append(path.parent)
    free: dict[int, tuple[float, Path]] = {}
    for place in map(_existing, places):
        free.setdefault(place.stat().st_dev, (shutil.disk_usage(place).free / 2**30, place))
    text = ", ".join(f"{gib:,.1f} GiB free for {place}" for gib, place in free.values())
    if min(gib for gib, _ in free.values()) < min_free_gib:
        raise CheckFailedError(f"{text}; allowed: {min_free_gib:g} or more; see Retention in docs/operations.md")
    return f"{text} (allowed: {min_free_gib:g} or more)"


def _existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    return path if path.exists() else _existing(path.parent)


def check_gpu(_project: Path) -> str:
    """Return the names of the GPUs that NVIDIA's driver lists."""
    try:
        pynvml.nvmlInit()
        try:
            handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
            names = [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
        finally:
            pynvml.nvmlShutdown()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        if any(path.exists() for path in OTHER_GPUS):
            raise TemporaryError("a GPU of another kind than NVIDIA's, which is not looked at") from None
        names = []
    except pynvml.NVMLError as error:
        raise CheckFailedError(f"NVIDIA's driver answers with an error: {error}; `nvidia-smi` shows more") from None
    if not names:
        raise CheckFailedError("no GPU; check that `nvidia-smi` lists one")
    return ", ".join(names)


def check_leftovers(project: Path) -> str:
    """Return that nothing is left of killed runs; otherwise raise an error with what is left."""
    findings = doctor.find_all(project, checks=LEFTOVERS)
    if wrong := [one for one in findings if one.fix or one.remedy]:
        raise CheckFailedError(f"{'; '.join(one.what for one in wrong)}; `python -m flows.doctor --fix`")
    if findings:
        raise TemporaryError("; ".join(one.what for one in findings))
    return "killed runs have left nothing"


CHECKS: dict[str, Check] = {
    "prefect": check_prefect,
    "mlflow": check_mlflow,
    "worker": check_worker,
    "nightly": check_nightly,
    "disk": check_disk,
    "leftovers": check_leftovers,
    "gpu": check_gpu,
}


def run_check(name: str, check: Check, project: Path) -> Result:
    """Return the outcome of a check; one that could not be made is `unknown`."""
    try:
        return Result(name, "ok", check(project))
    except CheckFailedError as error:
        return Result(name, "wrong", str(error))
    except (UserError, TemporaryError, OSError) as error:
        return Result(name, "unknown", str(error))


def exit_status(results: list[Result]) -> int:
    """Return 0 where all is ok, 1 where something is wrong, else 3."""
    states = {result.state for result in results}
    return 1 if "wrong" in states else EXIT_PARTIAL if "unknown" in states else 0


def _gibibytes(text: str) -> float:
    """Return the number that an argument has; raises argparse.ArgumentTypeError for text and negative numbers."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed: a number of GiB, 0 or more; correct it")
    return value


def main() -> None:
    """Run the checks, print a line for each, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m flows.health", description=__doc__)
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--skip", nargs="+", choices=[*CHECKS], default=[], help="leave these checks out")
    parser.add_argument("--gpu", action="store_true", help="a GPU is expected")
    help_text = f"GiB that must be free (default: {MIN_FREE_GIB:g})"
    parser.add_argument("--min-free", type=_gibibytes, default=MIN_FREE_GIB, metavar="GIB", help=help_text)
    arguments = parser.parse_args()
    skipped = {*arguments.skip} | (set() if arguments.gpu else {"gpu"})
    checks: dict[str, Check] = {**CHECKS, "disk": partial(check_disk, min_free_gib=arguments.min_free)}
    with report_errors(), chdir(PROJECT):
        results = [run_check(name, check, PROJECT) for name, check in checks.items() if name not in skipped]
        lines = [f"{result.check:<10}{result.state:<9}{escape_control_chars(result.text)}" for result in results]
        print(json.dumps([asdict(result) for result in results], indent=2) if arguments.json else "\n".join(lines))
    sys.exit(exit_status(results))


if __name__ == "__main__":
    main()
