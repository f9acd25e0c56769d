"""Find and fix what killed runs left in MLflow, in Prefect and on the disk, and report damage in DVC's files.

`python -m flows.doctor [--fix]`. What belongs to a living process, or to a process on another host, is never changed.
Exit status: 0 nothing found or all of it fixed, 1 something is left to do.
"""

import argparse
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter, TaskRunFilter
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort, TaskRunSort
from prefect.states import Cancelled, Crashed
from prefect.types._datetime import now

from flows import FLOW_NAME, PROJECT, server
from flows.champion_ref import champion_refs
from flows.dvc_state import DAMAGED, experiment_refs, missing_outputs
from flows.live_progress import mark_interrupted
from flows.prefect_server import MAX_RECORDS_PER_REQUEST, current_server, prefect_client
from flows.workspace import EXPERIMENT_LABEL, existing_store
from flows.workspace_folders import FOLDER, find_leftovers, is_held, remove_leftovers
from pipeline.core.errors import TemporaryError, UserError, first_line, report_errors
from pipeline.core.processes import HOST, PID, process_state, this_process
from pipeline.core.project import pipeline_cache_folder

PROJECT_LABEL = "process.project"
RUN_COUNT_LABEL = "process.run_count"
LIVE = {"state": {"type": {"any_": [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]}}}
CRASHED = {"state": {"type": {"any_": [StateType.CRASHED]}}}
CHECKPOINT_DAYS = 14
# how long a flow run may be live without a record of its process before it is reported
MAX_TIME_WITHOUT_PROCESS = timedelta(hours=1)
RWLOCK, HARDLINK_LOCK = Path(".dvc/tmp/rwlock"), Path(".dvc/tmp/lock")


@dataclass(frozen=True)
class Finding:
    """A problem that a check found, with its remedy.

    `fix` applies the remedy, and returns False where it could not. Without `fix`, the user has to apply the remedy;
    without a remedy, there is nothing to do.
    """

    what: str
    remedy: str = ""
    fix: Callable[[], bool | None] | None = None


Check = Callable[[Path], Iterator[Finding]]


def register_process(flow_run_id: str, *, run_count: int, project: Path = PROJECT, experiment: str = "") -> None:
    """Record in Prefect that this process executes the flow run; `prefect_runs` reads that."""
    labels: dict[str, Any] = {**this_process(), PROJECT_LABEL: str(project), RUN_COUNT_LABEL: run_count}
    labels |= {EXPERIMENT_LABEL: experiment} if experiment else {}
    with get_client(sync_client=True) as client:
        client.update_flow_run_labels(UUID(flow_run_id), labels)


def fix_leftovers(project: Path = PROJECT) -> list[str]:
    """Fix what killed flow runs left, and return a line for each thing fixed; each flow run calls it at its start.

    MLflow, which takes 2 s to import, is checked only where another check has found something to fix.
    """
    with chdir(project):
        found = [finding for check in QUICK_CHECKS for finding in _run_check(check, project) if finding.fix]
        found += [finding for finding in _run_check(mlflow_runs, project) if finding.fix] if found else []
        results = [_handle(finding, fix=True) for finding in found]
    return [line for line, fixed in results if fixed]


def mlflow_runs(project: Path) -> Iterator[Finding]:
    """Find runs that are RUNNING in MLflow though their process is dead, and what is still queued for MLflow."""
    uri = existing_store(project)
    if uri is None:
        return
    # MLflow takes 2 s to import; most flow runs start without it
    from pipeline.tracking.outbox import flush_outbox, queued_runs  # noqa: PLC0415  # see above
    from pipeline.tracking.registrations import pending_registrations, register_pending  # noqa: PLC0415  # see above
    from pipeline.tracking.search import find_running, mark_killed  # noqa: PLC0415  # see above
    from pipeline.tracking.store import connect  # noqa: PLC0415  # see above

    connect(uri)
    for run in find_running():
        name = f"MLflow run {run.run_id} ({run.name}) is RUNNING"
        if run.process_state == "dead":
            what = f"{name}, but its process {run.tags[PID]} is dead"
            yield Finding(what, "marked KILLED", partial(mark_killed, run))
        elif run.process_state == "elsewhere":
            yield Finding(f"{name} on another host, {run.tags[HOST]}")
    for path in queued_runs():
        yield Finding(f"{path.parent} has results of a run that MLflow has not received", "sent", flush_outbox)
    for path in pending_registrations():
        fix = partial(_has_registered, path, register_pending)
        yield Finding(f"{path} has a model that MLflow's registry has not received", "registered", fix)


def _has_registered(path: Path, register_pending: Callable[[], object]) -> bool:
    """Register what is queued, and return whether this file is."""
    register_pending()
    return not path.exists()


def prefect_runs(project: Path) -> Iterator[Finding]:
    """Find runs of this flow that are live in Prefect, or crashed with live task runs, though their process is dead.

    The notifications set a flow run without heartbeats to Crashed, but not its task runs.
    """
    found = current_server(project)
    if found is None:
        yield Finding("Prefect's flow runs were not checked: no server of this project is running")
        return
    with prefect_client(found.api_url) as client:
        live = _read_flow_runs(client, FlowRunFilter.model_validate(LIVE))
        crashed = _read_flow_runs(client, FlowRunFilter.model_validate(CRASHED), TaskRunFilter.model_validate(LIVE))
    for run in live:
        yield from _check_flow_run(run, url=found.api_url)
    for run in crashed:
        yield from _check_crashed_run(run, url=found.api_url)


def _read_flow_runs(
    client: SyncPrefectClient, runs: FlowRunFilter, task_runs: TaskRunFilter | None = None
) -> list[FlowRun]:
    """Return the runs of this flow that the filter accepts; with `task_runs`, those that have such task runs."""
    found: list[FlowRun] = []
    while page := client.read_flow_runs(
        flow_filter=FlowFilter.model_validate({"name": {"any_": [FLOW_NAME]}}),
        flow_run_filter=runs,
        task_run_filter=task_runs,
        sort=FlowRunSort.ID_DESC,
        limit=MAX_RECORDS_PER_REQUEST,
        offset=len(found),
    ):
        found += page
    return found


def _check_flow_run(run: FlowRun, *, url: str) -> Iterator[Finding]:
    """Find whether the process of a live flow run is dead, on another host or unknown."""
    assert run.state
    name = f"Prefect flow run {run.id} ({run.name}) is {run.state.name}"
    labels, state_of_process = _process_of(run)
    if state_of_process == "dead":
        make_state = Cancelled if run.state.type == StateType.CANCELLING else Crashed
        state: State[Any] = make_state(message=_reason(labels))
        what = f"{name}, but its process {labels[PID]} is dead"
        yield Finding(what, f"set to {state.name}", partial(_end_flow_run, run.id, state, url=url))
    elif state_of_process == "elsewhere":
        yield Finding(f"{name} on another host, {labels[HOST]}")
    elif state_of_process == "unknown" and now("UTC") - run.state.timestamp > MAX_TIME_WITHOUT_PROCESS:
        remedy = f"if nothing runs it: prefect flow-run delete {run.id}"
        yield Finding(f"{name} since {run.state.timestamp:%Y-%m-%d %H:%M} UTC, by an unknown process", remedy)


def _check_crashed_run(run: FlowRun, *, url: str) -> Iterator[Finding]:
    """Find whether the process of a crashed flow run with live task runs is dead."""
    labels, state_of_process = _process_of(run)
    if state_of_process == "dead":
        what = f"Prefect flow run {run.id} ({run.name}) is Crashed, but has live task runs"
        state: State[Any] = Crashed(message=_reason(labels))
        yield Finding(what, "they are set to Crashed", partial(_end_flow_run, run.id, state, url=url, has_ended=True))


def _process_of(run: FlowRun) -> tuple[dict[str, str], str]:
    """Return the labels of a flow run, and the state of the process that they name: see `process_state`.

    A process counts as alive while its workspace is held: its DVC process may live longer.
    """
    assert run.state
    labels = {key: str(value) for key, value in run.labels.items()}
    # an earlier attempt of the flow run has registered another process
    registered = run.state.type != StateType.PENDING and labels.get(RUN_COUNT_LABEL) == str(run.run_count)
    state = process_state(labels) if registered else "unknown"
    is_alive = state == "dead" and is_held(Path(labels[PROJECT_LABEL]), str(run.id))
    return labels, "alive" if is_alive else state


def _reason(labels: dict[str, str]) -> str:
    return f"its process {labels[PID]} on {labels[HOST]} ended without a final state"


def _end_flow_run(run_id: UUID, state: State[Any], *, url: str, has_ended: bool = False) -> None:
    """Set the flow run and its live task runs to the state, on the server whose API is at `url`.

    The state of a flow run that has ended is not set: a second event would be a second notification.
    """
    of_run, live = FlowRunFilter.model_validate({"id": {"any_": [run_id]}}), TaskRunFilter.model_validate(LIVE)
    with prefect_client(url) as client:
        for task in client.read_task_runs(
            flow_run_filter=of_run, task_run_filter=live, sort=TaskRunSort.ID_DESC, limit=MAX_RECORDS_PER_REQUEST
        ):
            client.set_task_run_state(task.id, state, force=True)
        if not has_ended:
            client.set_flow_run_state(run_id, state, force=True)
        mark_interrupted(client, run_id)


def prefect_server(project: Path) -> Iterator[Finding]:
    """Report the record of a dead Prefect server of the project; the next server overwrites the record."""
    if server.has_dead_record(project):
        yield Finding("the Prefect server on record in .prefect/server.json is dead")


def workspaces(project: Path) -> Iterator[Finding]:
    """Find clones of killed flow runs."""
    if names := find_leftovers(project):
        what = f"{FOLDER} has workspaces of dead flow runs: {', '.join(names)}"
        yield Finding(what, "removed", lambda: bool(remove_leftovers(project)) and not find_leftovers(project))


def checkpoints(project: Path) -> Iterator[Finding]:
    """Find checkpoints that no training has used for CHECKPOINT_DAYS; code, data or parameters have changed since."""
    for lock in sorted((pipeline_cache_folder(project) / "checkpoints").glob("*.lock")):
        folder = lock.with_suffix("")
        newest = max(path.stat().st_mtime for path in [lock, *folder.glob("*")])
        if time.time() - newest > CHECKPOINT_DAYS * 24 * 3600:
            name = folder.relative_to(project) if folder.is_relative_to(project) else folder
            what = f"{name}, the checkpoints of a training, are older than {CHECKPOINT_DAYS} days"
            yield Finding(what, "removed", partial(_remove_checkpoints, lock))


def _remove_checkpoints(lock: Path) -> bool:
    """Remove the checkpoints; returns False where a training holds the lock."""
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if not (lock.exists() and os.path.samestat(lock.stat(), os.fstat(file.fileno()))):
            return False  # a training that has started meanwhile made a new lock
        for suffix in ("", ".gone"):
            shutil.rmtree(lock.with_suffix(suffix), ignore_errors=True)
        lock.unlink(missing_ok=True)
    return True


def temporary_files(project: Path) -> Iterator[Finding]:
    """Find files that `pipeline.artifacts` had not yet renamed when their process was killed.

    Folders, `.<folder>.new.tmp`, do not name their process; the next run of the step removes them.
    """
    for path in sorted([*project.glob("artifacts/**/.*.tmp"), *project.glob(".prefect/.*.tmp")]):
        pid = path.name.split(".")[-2]  # of .<file>.<pid>.tmp
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            what = f"{path.relative_to(project)} was left by a dead process"
            yield Finding(what, "removed", partial(path.unlink, missing_ok=True))


def dvc_locks(project: Path) -> Iterator[Finding]:
    """Report locks that stop every DVC command; DVC itself removes the locks of dead processes on single files."""
    try:
        json.loads((project / RWLOCK).read_text(encoding="utf-8"))
    except FileNotFoundError:
        pass
    except ValueError:
        yield Finding(f"{RWLOCK} is damaged", f"if no dvc command runs here: rm {RWLOCK}")
    lock = project / HARDLINK_LOCK
    if lock.exists() and lock.stat().st_nlink > 1:  # as with `core.hardlink_lock`; its owner is unknown
        yield Finding(f"{HARDLINK_LOCK} is taken", f"if no dvc command runs here: rm {HARDLINK_LOCK}")


def missing_objects(project: Path) -> Iterator[Finding]:
    """Report outputs of the checkout, experiments and champions that DVC's cache lacks, or whose record is damaged."""
    for champion in champion_refs(project):
        if missing := missing_outputs(project, champion):
            remedy = f"`git worktree add --detach FOLDER {champion}`, then `dvc pull` there, or a backup, brings them"
            yield Finding(f"champion {champion}: files are missing in DVC's cache: {', '.join(missing)}", remedy)
    for ref in [None, *experiment_refs(project)]:
        name = ref.rpartition("/")[2] if ref else ""
        owner = f"experiment {name}" if name else "this checkout"
        try:
            if missing := missing_outputs(project, ref):
                remedy = "`dvc pull` fetches them; `dvc commit` adds those in artifacts/, `dvc repro` makes them again"
                if name:
                    remedy = f"`dvc exp apply {name} && dvc repro` makes them again, `dvc exp remove {name}` removes it"
                yield Finding(f"{owner}: files are missing in DVC's cache: {', '.join(missing)}", remedy)
        except DAMAGED as error:
            remedy = f"`dvc exp remove {name}`" if name else "`git checkout dvc.lock`"
            yield Finding(f"{owner}: dvc.lock cannot be read ({first_line(error)})", remedy)


QUICK_CHECKS: tuple[Check, ...] = (prefect_runs, prefect_server, workspaces, dvc_locks, temporary_files)
CHECKS: tuple[Check, ...] = (mlflow_runs, *QUICK_CHECKS, checkpoints, missing_objects)


def find_all(project: Path, *, checks: Sequence[Check] = CHECKS) -> list[Finding]:
    """Return what the checks find in the project, which must be the current folder; nothing is fixed."""
    return [finding for check in checks for finding in _run_check(check, project)]


def _run_check(check: Check, project: Path) -> list[Finding]:
    """Return the findings of a check; an error that ends the check is a finding too."""
    found: list[Finding] = []
    try:
        found.extend(check(project))  # adds the findings before an error too
    except (UserError, TemporaryError, OSError) as error:
        found.append(Finding(f"{check.__name__.replace('_', ' ')} were not checked: {error}"))
    return found


def _handle(finding: Finding, *, fix: bool) -> tuple[str, bool]:
    """Apply the finding's `fix` if asked to; return the line to print, and whether nothing is left to do."""
    reason = finding.remedy
    if finding.fix:
        reason = "`--fix` fixes it"
        try:
            if fix and finding.fix() is not False:
                return f"fixed    {finding.what}: {finding.remedy}", True
            reason = "it is in use; try again later" if fix else reason
        except (UserError, TemporaryError, OSError) as error:
            reason = first_line(error)
    return (f"found    {finding.what}; {reason}", False) if reason else (f"info     {finding.what}", True)


def main() -> None:
    """Run all checks, fix what can be fixed where `--fix` is given, print the findings."""
    parser = argparse.ArgumentParser(prog="python -m flows.doctor", description=__doc__)
    parser.add_argument("--fix", action="store_true", help="fix what can be fixed")
    arguments = parser.parse_args()
    with report_errors(), chdir(PROJECT):
        results = [_handle(finding, fix=arguments.fix) for finding in find_all(PROJECT)]
    print("\n".join(line for line, _ in results) or "nothing found")
    sys.exit(0 if all(fixed for _, fixed in results) else 1)


if __name__ == "__main__":
    main()
