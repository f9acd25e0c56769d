"""The doctor finds and fixes what flow runs leave that are killed in the middle of a training."""

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
from mlflow import MlflowClient
from prefect import get_client
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import TaskRunSort
from prefect.states import Crashed, Running

from flows import doctor, dvc_state, workspace_folders
from flows.train_classifier import train_classifier
from pipeline.core.processes import HOST, PID, start_of, this_process
from tests import test_flows
from tests.conftest import PROJECT
from tests.test_flows import dvc, output, run, start_run, wait_until
from tests.test_processes import set_clock

project = test_flows.project  # pytest finds a fixture by its name in the module

TRAIN = """
if stage == "train":
    from pipeline.tracking.runs import describe_dataset, training_run
    dataset = describe_dataset("toy", source=None, digest="0")
    with training_run(experiment="toy", params={}, dataset=dataset, training=str(os.getpid())):
        print("training begins")
        while (control / "train.long").exists():
            time.sleep(0.05)
"""


@pytest.fixture
def tracked(project: Path, stores: Path) -> Path:
    """Return the toy project with a training that MLflow records, and that runs as long as `train.long` exists."""
    toy = project / "toy.py"
    toy.write_text(toy.read_text() + TRAIN)
    output(project, "git", "add", "--all")
    shutil.copy(stores / "mlflow.db", project)
    (project.parent / "train.long").touch()
    return project


def start_training(project: Path, epochs: int, *, api_url: str) -> subprocess.Popen[str]:
    process = start_run(project, "--set", f"train.epochs={epochs}", api_url=api_url)
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "training begins" in line:
            return process
    raise AssertionError("".join(lines))


def kill_all(process: subprocess.Popen[str]) -> None:
    """Kill a process and its children, as the end of a container does: none of them can record its end."""
    processes = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for each in processes:
        each.kill()
    process.communicate()
    psutil.wait_procs(processes)


def examine(project: Path, *arguments: str, api_url: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "flows.doctor", *arguments],
        cwd=project,
        env={**os.environ, "PREFECT_API_URL": api_url, "PREFECT_HOME": str(project / ".prefect")},
        capture_output=True,
        text=True,
        check=False,
    )
    # on a loaded machine, Prefect warns at exit that it is still sending an event
    assert not [line for line in done.stderr.splitlines() if "Still processing items" not in line]
    return done.returncode, done.stdout


def mlflow_statuses(project: Path) -> list[str]:
    """Return the statuses of the MLflow runs, oldest first."""
    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    return [run.info.status for run in client.search_runs(ids, order_by=["attributes.start_time ASC"])]


def flow_run(flow_run_id: str) -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(flow_run_id)  # type: ignore[arg-type]


def task_states(flow_run_id: str) -> list[str]:
    with get_client(sync_client=True) as client:
        tasks = client.read_task_runs(sort=TaskRunSort.ID_DESC, limit=200)
    return [str(task.state_name) for task in tasks if str(task.flow_run_id) == flow_run_id]


def workspaces(project: Path) -> set[str]:
    return {path.name for path in (project / workspace_folders.FOLDER).glob("*") if path.is_dir()}


def progress_headline(flow_run_id: str) -> str:
    with get_client(sync_client=True) as client:
        [artifact] = [each for each in client.read_artifacts() if str(each.flow_run_id) == flow_run_id]
    return str(artifact.data).splitlines()[0]


def test_leftovers_of_killed_runs_are_fixed_and_running_ones_are_not_changed(tracked: Path, api_url: str) -> None:
    first = start_training(tracked, 1, api_url=api_url)
    [dead] = workspaces(tracked)
    second = start_training(tracked, 2, api_url=api_url)
    assert examine(tracked, "--fix", api_url=api_url) == (0, "nothing found\n")

    kill_all(first)
    status, text = examine(tracked, api_url=api_url)
    assert (status, text.count("found  "), text.count(f"process {first.pid} is dead")) == (1, 3, 1), text
    assert mlflow_statuses(tracked) == ["RUNNING", "RUNNING"]
    status, text = examine(tracked, "--fix", api_url=api_url)
    assert (status, text.count("fixed    ")) == (0, 3), text
    assert mlflow_statuses(tracked) == ["KILLED", "RUNNING"]
    state = flow_run(dead).state
    assert state
    assert (state.type, state.message) == (
        StateType.CRASHED,
        f"its process {first.pid} on {socket.gethostname()} ended without a final state",
    )
    assert set(task_states(dead)) <= {"Completed", "Cached", "Crashed"}
    assert progress_headline(dead).startswith("## Interrupted in ")
    [other] = workspaces(tracked)
    assert flow_run(other).state_name == "Running"
    assert progress_headline(other).startswith("## Running: ")

    kill_all(second)
    (tracked.parent / "train.long").unlink()
    status, text = run(tracked, "--set", "train.epochs=3", api_url=api_url)
    assert status == 0, text
    assert text.count("fixed    ") == 3, text
    assert flow_run(other).state_name == "Crashed"
    assert mlflow_statuses(tracked) == ["KILLED", "KILLED", "FINISHED"]
    assert not workspaces(tracked)
    assert examine(tracked, api_url=api_url) == (0, "nothing found\n")


def test_the_next_attempt_marks_a_killed_training_as_killed(tracked: Path, api_url: str) -> None:
    process = start_training(tracked, 1, api_url=api_url)
    [training] = [p for p in psutil.Process(process.pid).children(recursive=True) if p.cmdline()[-1:] == ["train"]]
    (tracked.parent / "train.long").unlink()
    training.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    assert "SIGKILL (out of memory?)" in output
    assert "was left RUNNING by a dead process: marked KILLED" in output
    assert (process.returncode, mlflow_statuses(tracked)) == (0, ["KILLED", "FINISHED"])


def findings_of(check: doctor.Check, project: Path) -> list[str]:
    return [finding.what for finding in check(project)]


def fix(check: doctor.Check, project: Path) -> list[bool]:
    return [bool(finding.fix and finding.fix() is not False) for finding in check(project)]


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def make_running_flow_run(flow_run_labels: dict[str, Any], *, run_count: int = 1) -> str:
    """Make a flow run in state Running with these labels, and return its id."""
    with get_client(sync_client=True) as client:
        made = client.create_flow_run(train_classifier)
        for _ in range(run_count):
            client.set_flow_run_state(made.id, Running(), force=True)
        client.update_flow_run_labels(made.id, flow_run_labels)
        return str(made.id)


def test_a_flow_run_of_another_host_or_a_later_attempt_is_not_changed(
    project: Path, api_url: str, dead_pid: int
) -> None:
    dead = {**this_process(), PID: str(dead_pid), doctor.PROJECT_LABEL: str(project), doctor.RUN_COUNT_LABEL: 1}
    elsewhere = make_running_flow_run({**dead, HOST: "far-away"})
    again = make_running_flow_run(dead, run_count=2)
    gone = make_running_flow_run(dead)
    findings = {finding.what.split()[3]: finding for finding in doctor.prefect_runs(project)}
    assert again not in findings
    assert (findings[elsewhere].fix, findings[elsewhere].what.endswith("on another host, far-away")) == (None, True)
    assert findings[gone].fix
    with get_client(sync_client=True) as client:
        for run_id in (elsewhere, again, gone):
            client.delete_flow_run(run_id)  # type: ignore[arg-type]


def test_the_live_task_runs_of_a_crashed_flow_run_are_ended_without_a_second_crash(tracked: Path, api_url: str) -> None:
    process = start_training(tracked, 1, api_url=api_url)
    [run_id] = workspaces(tracked)
    with get_client(sync_client=True) as client:  # as the notifications do where no heartbeat comes
        client.set_flow_run_state(UUID(run_id), Crashed(message="no heartbeat"))
    assert findings_of(doctor.prefect_runs, tracked) == []
    kill_all(process)
    assert fix(doctor.prefect_runs, tracked) == [True]
    assert set(task_states(run_id)) <= {"Completed", "Cached", "Crashed"}
    assert progress_headline(run_id).startswith("## Interrupted in ")
    state = flow_run(run_id).state
    assert state
    assert state.message == "no heartbeat"
    assert findings_of(doctor.prefect_runs, tracked) == []


def test_without_a_server_the_doctor_reports_that_prefect_was_not_checked(project: Path) -> None:
    status, text = examine(project, api_url="")
    assert (status, text.count("\n")) == (0, 1)
    assert "Prefect's flow runs were not checked: no server" in text
    assert not (project / ".prefect" / "server.json").exists()


def test_dvc_drops_locks_of_dead_processes_itself(project: Path, dead_pid: int) -> None:
    dead = {"pid": dead_pid, "cmd": "dvc repro"}
    locked = str(project / "artifacts" / "download")
    path = project / doctor.RWLOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"read": {str(project / "toy.py"): [dead]}, "write": {locked: dead}}))
    dvc(project, "repro", "download")
    assert locked not in json.loads(path.read_text()).get("write", {})
    assert findings_of(doctor.dvc_locks, project) == []


def test_an_empty_lock_file_that_stops_dvc_is_reported(project: Path) -> None:
    path = project / doctor.RWLOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    [finding] = doctor.dvc_locks(project)
    assert (finding.what, finding.fix) == (".dvc/tmp/rwlock is damaged", None)
    assert finding.remedy.endswith("rm .dvc/tmp/rwlock")


def test_temporary_files_of_dead_processes_are_removed(project: Path, dead_pid: int) -> None:
    folder = project / "artifacts" / "train"
    folder.mkdir(parents=True)
    mine, dead = (folder / f".history.csv.{pid}.tmp" for pid in (os.getpid(), dead_pid))
    half = project / "artifacts" / ".train.new.tmp"  # the next run of the step removes it
    half.mkdir()
    for path in (mine, dead):
        path.touch()
    assert fix(doctor.temporary_files, project) == [True]
    assert (mine.exists(), dead.exists(), half.exists()) == (True, False, True)


def test_the_record_of_a_dead_server_is_reported(project: Path, dead_pid: int) -> None:
    record = project / ".prefect" / "server.json"
    record.parent.mkdir(exist_ok=True)
    record.write_text(json.dumps({"pid": dead_pid, "started": 0.0, "port": 4200}))
    [finding] = doctor.prefect_server(project)
    assert (finding.what, finding.remedy) == ("the Prefect server on record in .prefect/server.json is dead", "")
    assert record.exists()


@pytest.mark.parametrize("as_number", [True, False])
def test_the_record_of_a_running_server_is_not_reported(
    project: Path, monkeypatch: pytest.MonkeyPatch, *, as_number: bool
) -> None:
    started = psutil.Process().create_time() if as_number else start_of(os.getpid())  # older versions wrote a number
    record = project / ".prefect" / "server.json"
    record.parent.mkdir(exist_ok=True)
    record.write_text(json.dumps({"pid": os.getpid(), "started": started, "port": 4200}))
    if not as_number:
        set_clock(monkeypatch, forward_seconds=3600)
    assert findings_of(doctor.prefect_server, project) == []


def test_files_missing_in_the_cache_are_reported_with_the_remedy(project: Path, api_url: str) -> None:
    status, text = run(project, api_url=api_url)
    assert status == 0, text
    [name] = dvc(project, "exp", "list", "--name-only").split()
    assert findings_of(doctor.missing_objects, project) == []
    Path(cached(project, name, "artifacts/evaluate/per_class.csv")).unlink()
    [finding] = doctor.missing_objects(project)
    assert finding.what == f"experiment {name}: files are missing in DVC's cache: artifacts/evaluate/per_class.csv"
    assert f"dvc exp apply {name} && dvc repro" in finding.remedy
    assert finding.fix is None


def cached(project: Path, experiment: str, path: str) -> str:
    """Return the path in DVC's cache of an output of an experiment."""
    [ref] = [ref for ref in dvc_state.experiment_refs(project) if ref.endswith(f"/{experiment}")]
    md5 = dvc_state.outputs(output(project, "git", "show", f"{ref}:dvc.lock").decode())[path]
    return str(dvc_state.cached_path(dvc_state.cache_folder(project), md5))


def test_a_workspace_in_use_is_not_a_leftover(project: Path) -> None:
    with workspace_folders.make_folder(project, "one") as (folder, _):
        assert workspace_folders.is_held(project, "one")
        assert workspace_folders.find_leftovers(project) == []
        (folder.parent / "two").mkdir()
        assert fix(doctor.workspaces, project) == [True]
        assert folder.exists()
    wait_until(lambda: not workspace_folders.is_held(project, "one"))


def test_a_flow_run_ends_when_its_worker_was_killed() -> None:
    flow = (
        "import os, signal; from pipeline.core.processes import call_at_parent_end; "
        "call_at_parent_end(lambda: os.kill(os.getpid(), signal.SIGTERM)); "
        "print(os.getpid(), flush=True); signal.pause()"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {flow!r}])"],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout
    process = psutil.Process(int(worker.stdout.readline()))
    worker.kill()
    worker.communicate()
    psutil.wait_procs([process])


def test_old_checkpoints_are_removed(project: Path) -> None:
    folder = project / ".cache/checkpoints"
    for name, days in {"old": 15, "young": 13}.items():
        (folder / name).mkdir(parents=True)
        for path in (folder / name / "step-1", folder / f"{name}.lock"):
            path.touch()
            os.utime(path, (time.time() - days * 86400,) * 2)
    [finding] = doctor.checkpoints(project)
    assert "checkpoints/old, the checkpoints of a training, are older than 14 days" in finding.what
    assert finding.fix
    with (folder / "old.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert finding.fix() is False
    assert finding.fix() is not False
    assert sorted(path.name for path in folder.iterdir()) == ["young", "young.lock"]
