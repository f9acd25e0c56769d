"""One damaged item among several is reported, and the others are still processed."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest

from flows import doctor
from flows.dvc_state import cache_folder, cached_path, missing_outputs
from flows.lineage import Sources
from pipeline.artifacts import write_json
from pipeline.core.processes import HOST, PID, STARTED, process_state, this_process
from pipeline.datasets.fetch import find_archive
from pipeline.params import DownloadParams
from pipeline.tracking.outbox import flush_outbox, outbox_folder, queued_runs
from pipeline.tracking.store import connect, store_md5

COMMITTER = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
LOCK = "stages: {train: {cmd: train, outs: [{path: model, md5: %s}]}}"


def git(*arguments: str) -> str:
    return subprocess.run(["git", *COMMITTER, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def add_experiment(name: str, lock: str) -> str:
    """Make an experiment whose commit has this dvc.lock, and return the commit."""
    baseline = git("rev-parse", "main")
    git("checkout", "-q", "--detach", "main")
    Path("dvc.lock").write_text(lock)
    git("commit", "-qam", name)
    git("update-ref", experiment_ref(name, baseline), "HEAD")
    commit = git("rev-parse", "HEAD")
    git("checkout", "-q", "main")
    return commit


def experiment_ref(name: str, baseline: str) -> str:
    return f"refs/exps/{baseline[:2]}/{baseline[2:]}/{name}"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a new repository with a dvc.yaml and a dvc.lock without outputs, and return its folder."""
    monkeypatch.chdir(tmp_path)
    git("init", "-q", "-b", "main")
    Path("dvc.yaml").write_text("stages: {train: {cmd: train}}")
    Path("dvc.lock").write_text("stages: {}")
    git("add", ".")
    git("commit", "-qm", "first")
    return tmp_path


@pytest.mark.parametrize("lock", ["{", "[1, 2]", "stages: {train: {outs: [{md5: abc}]}}"])
def test_the_doctor_reports_a_damaged_experiment_and_checks_the_others(project: Path, lock: str) -> None:
    add_experiment("a-damaged", lock)
    add_experiment("b-incomplete", LOCK % ("a" * 32))
    damaged, incomplete = doctor._run_check(doctor.missing_objects, project)
    assert damaged.what.startswith("experiment a-damaged: ") or damaged.what.startswith("a-damaged: ")
    assert "dvc.lock cannot be read (" in damaged.what
    assert damaged.remedy == "`dvc exp remove a-damaged`"
    assert incomplete.what == "experiment b-incomplete: files are missing in DVC's cache: model"


def test_a_damaged_listing_in_the_cache_counts_as_a_missing_output(project: Path) -> None:
    md5 = f"{'b' * 32}.dir"
    listing = cached_path(cache_folder(project), md5)
    listing.parent.mkdir(parents=True)
    listing.write_text("[{")
    experiment = add_experiment("a", LOCK % md5)
    assert missing_outputs(project, experiment) == ["model"]


def test_findings_of_a_check_are_kept_when_it_fails(project: Path) -> None:
    def check(_: Path) -> Any:
        yield doctor.Finding("first")
        raise OSError("gone")

    assert [finding.what for finding in doctor._run_check(check, project)] == ["first", "check were not checked: gone"]


def test_a_trace_skips_damaged_experiments_and_reads_the_others(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/none.db")
    damaged, good = add_experiment("damaged", "{"), add_experiment("good", LOCK % ("a" * 32))
    baseline = git("rev-parse", "main")
    lost = project / ".git" / experiment_ref("lost", baseline)
    lost.write_text(f"{'12' * 20}\n")
    sources = Sources(project)
    assert {found.name: found.commit for found in sources.experiments} == {"damaged": damaged, "good": good}
    assert [sources.outputs(commit) for commit in (damaged, good)] == [{}, {"model": "a" * 32}]
    messages = "\n".join(sources.warnings)
    assert "experiment lost was not searched: its commit cannot be read" in messages
    assert f"commit {damaged}: dvc.lock cannot be read (" in messages


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"run_id": "x"}', '{"store": "", "run_id": "", "status": "", "ended": 0, "waiting": [1]}']
)
def test_a_queued_run_is_sent_although_another_is_damaged(
    workspace: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    connect()
    run = mlflow.MlflowClient().create_run("0", tags={**this_process(), PID: str(2**22), STARTED: "0@dead"})
    outbox = outbox_folder()
    (outbox / "0 damaged").mkdir(parents=True)
    (outbox / "0 damaged/run.json").write_text(content)
    (outbox / run.info.run_id).mkdir()
    record = {"store": store_md5(), "run_id": run.info.run_id, "status": "FINISHED", "ended": 1}
    write_json(outbox / run.info.run_id / "run.json", {**record, "waiting": [["loss", 0.5, 1, 1]]})
    assert not flush_outbox()
    assert [path.parent.name for path in queued_runs()] == ["0 damaged"]
    output = capsys.readouterr().out
    assert "warning: " in output
    assert "0 damaged stays queued: " in output
    assert "Traceback" not in output
    found = mlflow.MlflowClient().get_run(run.info.run_id)
    assert (found.info.status, found.data.metrics) == ("FINISHED", {"loss": 0.5})


@pytest.mark.parametrize("tags", [{}, {**this_process(), HOST: "another host"}])
def test_a_run_stays_queued_while_the_state_of_its_process_is_unknown(workspace: Path, tags: dict[str, str]) -> None:
    connect()
    run_id = mlflow.MlflowClient().create_run("0", tags=tags).info.run_id
    path = outbox_folder() / run_id / "run.json"
    path.parent.mkdir(parents=True)
    record = {"store": store_md5(), "run_id": run_id, "status": "FINISHED", "ended": 1, "waiting": []}
    write_json(path, record)
    assert not flush_outbox()
    assert path.exists()


@pytest.mark.parametrize("tags", [{PID: "many"}, {STARTED: "yesterday"}])
def test_the_state_of_a_process_with_a_damaged_record_is_unknown(tags: dict[str, str]) -> None:
    assert process_state({**this_process(), **tags}) == "unknown"


@pytest.mark.skipif(sys.platform != "linux", reason="a file that can be opened, but not read, is /proc/self/mem")
def test_an_unreadable_archive_is_reported_and_skipped(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("good.tar.gz").write_bytes(b"content")
    params = DownloadParams(
        dataset="cifar10",
        folder="-",
        labels="auto",
        urls=("/proc/self/mem", "good.tar.gz"),
        md5="9a0364b9e99bb480dd25e1f0284c8555",
        timeout_seconds=1,
    )
    assert find_archive(params) == Path("good.tar.gz")
    assert "/proc/self/mem: Input/output error" in capsys.readouterr().out
