"""What killed runs left in MLflow, Prefect, DVC and on the disk: found, and with `--fix` settled.

`python -m flows.doctor [--fix]`. What is alive is never touched; of what runs on another host nothing can be known, so
it is left alone. Exit status: 0 nothing found or all of it settled, 1 something is left to do.
"""

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psutil
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort, TaskRunSort
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Crashed
from prefect.types._datetime import now

from flows import FLOW_NAME, PROJECT, server
from flows.dvc_state import (
    HARDLINK_LOCK,
    HERE,
    RWLOCK,
    dead_lockers,
    hardlink_lock,
    missing_outputs,
    release_dead_lockers,
)
from flows.prefect_server import server_in_force
from flows.workspace import EXPERIMENT_LABEL, made_store
from flows.workspace_folders import FOLDER, find_leftovers, is_held, remove_leftovers
from pipeline.core.errors import TemporaryError, UserError, report_errors, shown
from pipeline.core.processes import HOST, PID, life, this_process

PROJECT_LABEL = "process.project"
RUN_COUNT_LABEL = "process.run_count"
LIVE_STATES = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
PAGE = 200
CHECKPOINTS = Path(".cache/checkpoints")
CHECKPOINT_DAYS = 14
SILENCE = timedelta(hours=1)
"""A flow run that says nothing of its process is worth a word after this long."""


@dataclass(frozen=True)
class Finding:
    """What was found; `settle` does what `cure` says, and returns whether it could.

    Without `settle`, `cure` is for the user to do, or empty where it is only worth knowing.
    """

    what: str
    cure: str = ""
    settle: Callable[[], bool] | None = None


Check = Callable[[Path], Iterator[Finding]]


def sign(flow_run_id: str, *, run_count: int, project: Path = PROJECT, experiment: str = "") -> None:
    """Write down, in Prefect, which process makes this flow run: what `prefect_runs` goes by."""
    labels: dict[str, Any] = {**this_process(), PROJECT_LABEL: str(project), RUN_COUNT_LABEL: run_count}
    labels |= {EXPERIMENT_LABEL: experiment} if experiment else {}
    with get_client(sync_client=True) as client:
        client.update_flow_run_labels(UUID(flow_run_id), labels)


def settle_quietly(project: Path = PROJECT) -> Iterator[str]:
    """At the start of a flow run: settle what can be settled without asking; a line for each thing settled.

    MLflow, which takes 2 s to import, is looked at only where a killed run left traces elsewhere.
    """
    found = [finding for check in QUICK_CHECKS for finding in _examine(check, project) if finding.settle]
    if not found:
        return
    yield from (line for finding in found for line, settled in [_settle(finding)] if settled)
    command = [sys.executable, "-m", "flows.doctor", "--only-mlflow"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    yield from (line for line in done.stdout.splitlines() if line.startswith("settled"))


def mlflow_runs(project: Path) -> Iterator[Finding]:
    """Runs that MLflow holds to be running, though their process is dead."""
    uri = made_store(project)
    if uri is None:
        return
    os.environ["MLFLOW_TRACKING_URI"] = uri
    from pipeline.tracking import runs as tracking  # noqa: PLC0415  # MLflow takes 2 s to import; a flow run's start has no need of it

    tracking.connect()
    for run in tracking.running():
        name = f"MLflow run {run.run_id} ({run.name}) is RUNNING"
        if run.life == "dead":
            yield Finding(
                f"{name}, but its process {run.pid} is dead",
                "marked KILLED",
                lambda run=run: tracking.mark_killed(run),  # type: ignore[misc]
            )
        elif run.life == "elsewhere":
            yield Finding(f"{name} on another host, {run.host}")
    for path in tracking.put_aside():
        what = f"{path.parent} keeps what MLflow should have had of a run"
        yield Finding(what, "delivered", tracking.deliver)


def prefect_runs(project: Path) -> Iterator[Finding]:
    """Flow runs of ours that Prefect holds to be under way, though their process is dead."""
    found = server_in_force(project)
    if found is None:
        yield Finding("Prefect's flow runs were not looked at: no server of this project is running")
        return
    url = found.api_url
    try:
        with prefect_client(url) as client:
            runs = _live_runs(client)
    except (httpx.HTTPError, PrefectException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        yield Finding(f"Prefect's flow runs were not looked at: {shown(url)}: {reason}")
        return
    for run in runs:
        yield from _judge(run, url=url)


@contextmanager
def prefect_client(url: str) -> Iterator[SyncPrefectClient]:
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        yield client


def _live_runs(client: SyncPrefectClient) -> list[FlowRun]:
    runs: list[FlowRun] = []
    flows = FlowFilter(name=FlowFilterName(any_=[FLOW_NAME]))
    live = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=LIVE_STATES)))
    # the client's own defaults for order and limit, None, are refused by the server
    while page := client.read_flow_runs(
        flow_filter=flows, flow_run_filter=live, sort=FlowRunSort.ID_DESC, limit=PAGE, offset=len(runs)
    ):
        runs += page
    return runs


def _judge(run: FlowRun, *, url: str) -> Iterator[Finding]:
    assert run.state
    name = f"Prefect flow run {run.id} ({run.name}) is {run.state.name}"
    labels = {key: str(value) for key, value in run.labels.items()}
    signed = run.state.type != StateType.PENDING and labels.get(RUN_COUNT_LABEL) == str(run.run_count)
    fate = life(labels) if signed else "unknown"  # what an earlier attempt signed says nothing of this one
    if fate == "dead" and not is_held(Path(labels[PROJECT_LABEL]), str(run.id)):
        state = Cancelled if run.state.type == StateType.CANCELLING else Crashed
        message = f"its process {labels[PID]} on {labels[HOST]} ended without a word"
        yield Finding(
            f"{name}, but its process {labels[PID]} is dead",
            f"set to {state.__name__}",
            lambda: _end_run(run, state(message=message), url=url),
        )
    elif fate == "elsewhere":
        yield Finding(f"{name} on another host, {labels[HOST]}")
    elif fate == "unknown" and now("UTC") - run.state.timestamp > SILENCE:
        remedy = f"if nothing runs it: prefect flow-run delete {run.id}"
        yield Finding(f"{name} since {run.state.timestamp:%Y-%m-%d %H:%M} UTC, by an unknown process", remedy)


def _end_run(run: FlowRun, state: State[Any], *, url: str) -> bool:
    """Set the flow run, and those of its task runs that have no end, to the state."""
    with prefect_client(url) as client:
        tasks = client.read_task_runs(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])),
            task_run_filter=TaskRunFilter(state=TaskRunFilterState(type=TaskRunFilterStateType(any_=LIVE_STATES))),
            sort=TaskRunSort.ID_DESC,
            limit=PAGE,
        )
        for task in tasks:
            client.set_task_run_state(task.id, state, force=True)
        client.set_flow_run_state(run.id, state, force=True)
    return True


def prefect_server(project: Path) -> Iterator[Finding]:
    """The record of the project's own server, when that is dead."""
    if server.forget_dead(project, remove=False):
        yield Finding(
            "the Prefect server on record in .prefect/server.json is dead",
            "record removed",
            lambda: server.forget_dead(project),
        )


def workspaces(project: Path) -> Iterator[Finding]:
    """Clones of killed flow runs."""
    for name in find_leftovers(project):
        folder = FOLDER / name
        yield Finding(
            f"workspace {folder} has no living flow run",
            "removed",
            lambda folder=folder: remove_leftovers(project) is not None and not (project / folder).exists(),  # type: ignore[misc]
        )


def checkpoints(project: Path) -> Iterator[Finding]:
    """Those of trainings that nobody took up again for long: code, data or parameters have changed since."""
    folder = project / CHECKPOINTS
    for lock in sorted(folder.glob("*.lock")):
        newest = max(path.stat().st_mtime for path in [lock, *lock.with_suffix("").glob("*")])
        if time.time() - newest > CHECKPOINT_DAYS * 24 * 3600:
            yield Finding(
                f"{lock.with_suffix('').relative_to(project)}, the checkpoints of a training, are older than "
                f"{CHECKPOINT_DAYS} days",
                "removed",
                lambda lock=lock: _remove_checkpoints(lock),  # type: ignore[misc]
            )


def _remove_checkpoints(lock: Path) -> bool:
    """False where a training holds the lock."""
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if not (lock.exists() and os.path.samestat(lock.stat(), os.fstat(file.fileno()))):
            return False  # another training has begun since
        for suffix in ("", ".gone"):
            shutil.rmtree(lock.with_suffix(suffix), ignore_errors=True)
        lock.unlink(missing_ok=True)
    return True


def dvc_locks(project: Path) -> Iterator[Finding]:
    """Locks of dead processes; `.dvc/tmp/lock` by itself is none, since the kernel lets go of it."""
    try:
        for pid in dead_lockers(project):
            what = f"{RWLOCK} holds locks of the dead process {pid}"
            yield Finding(what, "released", lambda: release_dead_lockers(project))
    except (ValueError, KeyError, AttributeError):
        yield Finding(f"{RWLOCK} is damaged", f"if no dvc command runs here: rm {RWLOCK}")
    if hardlink_lock(project):
        yield Finding(f"{HARDLINK_LOCK} is taken", f"if no dvc command runs here: rm {HARDLINK_LOCK}")


def missing_objects(project: Path) -> Iterator[Finding]:
    """Outputs that `dvc checkout` or `dvc exp apply` could not bring."""
    for missing in missing_outputs(project):
        if missing.damaged:
            remedy = "`git checkout dvc.lock`" if missing.owner == HERE else f"`dvc exp remove {missing.owner}`"
            yield Finding(f"{missing.owner}: dvc.yaml or dvc.lock cannot be read ({missing.damaged})", remedy)
            continue
        outputs = f"DVC's cache lacks files of {', '.join(missing.outputs)}"
        if missing.owner == HERE:
            yield Finding(f"{HERE}: {outputs}", "`dvc pull` fetches them, `dvc repro` makes them")
        else:
            remedy = f"`dvc exp apply {missing.owner} && dvc repro` makes them, `dvc exp remove` forgets it"
            yield Finding(f"experiment {missing.owner}: {outputs}", remedy)


def temporary_files(project: Path) -> Iterator[Finding]:
    """What `pipeline.artifacts` renames once it is whole, of processes that were killed before that."""
    for path in sorted([*project.glob("artifacts/**/.*.tmp"), *project.glob(".prefect/.*.tmp")]):
        if _is_abandoned(path, project):
            yield Finding(
                f"{path.relative_to(project)} was left by a dead process",
                "removed",
                lambda path=path: _is_abandoned(path, project) and _remove(path),  # type: ignore[misc]
            )


def _is_abandoned(path: Path, project: Path) -> bool:
    """Whether nobody can be writing this: `.<file>.<pid>.tmp`, `.<folder>.new.tmp` or `.<folder>.old.tmp`."""
    name, _, word = path.name.removesuffix(".tmp").removeprefix(".").rpartition(".")
    if word.isdigit():
        return not psutil.pid_exists(int(word))
    if word == "old" and not path.with_name(name).exists():
        return False  # what is left of the good one
    return word in {"new", "old"} and time.time() - path.stat().st_mtime > 60 and not _runs_step(project)


def _runs_step(project: Path) -> bool:
    """Whether a step may run here: of another user's process, the folder is not known (None)."""
    processes = psutil.process_iter(["cwd", "cmdline"])
    return any(
        found.info["cwd"] in (None, str(project))
        and any(word.startswith("pipeline.") for word in found.info["cmdline"] or [])
        for found in processes
    )


def _remove(path: Path) -> bool:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    return True


QUICK_CHECKS: tuple[Check, ...] = (prefect_runs, prefect_server, workspaces, dvc_locks, temporary_files)
CHECKS: tuple[Check, ...] = (mlflow_runs, *QUICK_CHECKS, checkpoints, missing_objects)


def _examine(check: Check, project: Path) -> list[Finding]:
    """What a check finds; that it cannot look any further is a finding too."""
    found: list[Finding] = []
    try:
        found.extend(check(project))  # keeps what came before an error
    except (UserError, TemporaryError, OSError) as error:
        found.append(Finding(f"{check.__name__.replace('_', ' ')} were not looked at: {error}"))
    return found


def _settle(finding: Finding) -> tuple[str, bool]:
    """Try; returns the line to print, and whether it is settled."""
    assert finding.settle
    try:
        done, reason = finding.settle(), "it is in use; try again"
    except (UserError, TemporaryError, OSError, httpx.HTTPError, PrefectException) as error:
        done, reason = False, " ".join(str(error).split())
    return (f"settled  {finding.what}: {finding.cure}", True) if done else (f"found    {finding.what}; {reason}", False)


def _report(finding: Finding, *, fix: bool) -> tuple[str, bool]:
    """The line to print, and whether nothing is left to do."""
    if finding.settle:
        return _settle(finding) if fix else (f"found    {finding.what}", False)
    return (f"found    {finding.what}; {finding.cure}", False) if finding.cure else (f"note     {finding.what}", True)


def main() -> None:
    """Look, print, settle."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.doctor",
        description="Find what killed runs left in MLflow, Prefect, DVC and on the disk. Living runs are left alone.",
        epilog="Exit status: 0 nothing found or all of it settled, 1 something is left to do.",
    )
    parser.add_argument("--fix", action="store_true", help="settle what can be settled")
    parser.add_argument("--only-mlflow", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with report_errors(), chdir(PROJECT):
        checks = (mlflow_runs,) if arguments.only_mlflow else CHECKS
        findings = [finding for check in checks for finding in _examine(check, PROJECT)]
        results = [_report(finding, fix=arguments.fix or arguments.only_mlflow) for finding in findings]
    print("\n".join(line for line, _ in results) or "nothing found")
    if not arguments.fix and any(finding.settle for finding in findings):
        print("`python -m flows.doctor --fix` settles what it can")
    sys.exit(0 if all(settled for _, settled in results) else 1)


if __name__ == "__main__":
    main()
