"""Flow runs work with a real git repository, DVC and Prefect server; their stages take no time."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect import get_client
from ruamel.yaml import YAML

from flows import command_line, flow_run, git, train_classifier, workspace, workspace_folders
from flows.dvc_client import StepError
from flows.ports import free_port
from flows.workspace import Workspace, open_workspace
from pipeline.core.errors import UserError
from pipeline.core.settings import get_settings
from pipeline.core.stage_code import stage_names
from pipeline.core.yaml import read_yaml
from pipeline.tracking.store_uri import tracking_uri
from tests.conftest import PROJECT, enable_interrupts, start_repository

TOY = """
import json, os, signal, sys, time
from pathlib import Path
stage = sys.argv[1]
control = Path(os.environ["TOY"])
with (control / "ran").open("a") as file:
    print(stage, file=file)
def terminate(number, frame):
    (control / f"{stage}.terminating").touch()
    time.sleep(0.5)
    (control / f"{stage}.terminated").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, terminate)
print(f"{stage} begins")
while (control / f"{stage}.wait").exists():
    time.sleep(0.05)
if (control / f"{stage}.exit").exists():
    print("error: train.device is 'cuda'; allowed: cpu", file=sys.stderr)
    status = int((control / f"{stage}.exit").read_text())
    if status < 0:
        os.kill(os.getpid(), -status)
    sys.exit(status)
if (control / f"{stage}.result").exists():
    Path(os.environ["PIPELINE_RESULT_FILE"]).write_text((control / f"{stage}.result").read_text())
if (control / f"{stage}.title").exists():
    from pipeline.tracking.run_title import read_setup
    (control / f"{stage}.title").write_text(read_setup().title)
folder = Path("artifacts") / stage
folder.mkdir(parents=True, exist_ok=True)
if stage == "evaluate":
    metrics = {"accuracy": 0.983, "accuracy_low": 0.964, "accuracy_high": 0.993, "loss": 0.06}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    columns = [f"{name}{end}" for name in ("precision", "recall", "f1") for end in ("", "_low", "_high")]
    lines = ["class,images,predicted_images,num_correct," + ",".join(columns)]
    lines += ["zero,36,36,36,1,0.9,1,1,0.9,1,1,0.95,1", "one,35,31,31,1,0.89,1,0.9,0.74,0.96,0.94,0.84,0.98"]
    (folder / "per_class.csv").write_text("\\n".join(lines) + "\\n")
else:
    (folder / "out.txt").write_text(Path("params.yaml").read_text())
if stage == "normalize":
    (folder / "dataset.json").write_text(json.dumps({"counts": {"train": {"zero": 128, "one": 127}}}))
if stage == "train":
    (folder / "history.csv").write_text("epoch,validation_accuracy,selected\\n1,0.9,\\n2,0.95,highest\\n")
"""
TOY_REPORT = """
import json, os, sys
from pathlib import Path
if (Path(os.environ["TOY"]) / "report.exit").exists():
    sys.exit("error: artifacts/train is missing")
assert Path("artifacts/evaluate/metrics.json").exists()
variables = {name: value for name, value in os.environ.items() if name.startswith("PIPELINE_")}
Path(sys.argv[2]).write_text(json.dumps({"arguments": sys.argv[1:], "variables": variables}))
print("warning: the page is not in MLflow", file=sys.stderr)
"""
TOY_STAGES: dict[str, Any] = {
    "download": {"deps": ["${download.folder}", "toy.py"], "outs": ["artifacts/download"]},
    "normalize": {"deps": ["artifacts/download"], "outs": ["artifacts/normalize"]},
    "train": {"deps": ["artifacts/normalize"], "outs": ["artifacts/train"]},
    "evaluate": {
        "deps": ["artifacts/train"],
        "outs": ["artifacts/evaluate/per_class.csv"],
        "metrics": [{"artifacts/evaluate/metrics.json": {"cache": False}}],
    },
}
# A toy stage for each stage of `dvc.yaml`, as the flow has a task for each of them.
STAGES = {
    stage: TOY_STAGES.get(stage, {"deps": ["artifacts/train"], "outs": [f"artifacts/{stage}"]})
    for stage in stage_names()
}
for _stage, _values in STAGES.items():
    _values |= {"cmd": f"python toy.py {_stage}", "params": [_stage]}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOY", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return make_project(tmp_path)


def make_project(parent: Path) -> Path:
    """Make a committed project with the real flows, toy stages, an uncommitted change and a user's image."""
    folder = parent / "project"
    for name in ("pipeline", "flows", ".dvc", "data/images", "params.yaml", ".gitignore"):
        source, target = PROJECT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(
                source, target, ignore=shutil.ignore_patterns("cache", "tmp", "config.local", "__pycache__")
            )
        else:
            shutil.copy(source, target)
    (folder / "toy.py").write_text(TOY)
    (folder / "pipeline/report.py").write_text(TOY_REPORT)
    YAML().dump({"stages": STAGES}, folder / "dvc.yaml")
    (folder / "recipes").mkdir()
    (folder / "recipes" / "digits.yaml").write_text("train: {epochs: 7}\n")
    start_repository(folder)
    for name in ("user.name", "user.email"):  # DVC needs them to stash uncommitted changes
        subprocess.run(["git", "config", name, "t"], cwd=folder, check=True)
    (folder / "toy.py").write_text(TOY + "# changed\n")
    (folder / "data/images/cats").mkdir()
    (folder / "data/images/cats/1.png").write_text("an image")
    return folder


def start_run(project: Path, *arguments: str, api_url: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flows.train_classifier", *arguments],
        cwd=project,
        env={**os.environ, "PREFECT_API_URL": api_url, "PREFECT_HOME": str(project / ".prefect")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=enable_interrupts,  # noqa: PLW1509
    )


def start_run_until(stage: str, *, project: Path, api_url: str) -> subprocess.Popen[str]:
    """Start a flow run, and return its process once `stage` runs, which does not end by itself."""
    (project.parent / f"{stage}.wait").touch()
    process = start_run(project, api_url=api_url)
    assert process.stdout
    next(line for line in process.stdout if f"{stage} begins" in line)
    return process


def run(project: Path, *arguments: str, api_url: str) -> tuple[int, str]:
    """Run the flow from the command line, and return its exit status and output."""
    process = start_run(project, *arguments, api_url=api_url)
    output, _ = process.communicate()
    return process.returncode, output


@pytest.fixture
def run_here(project: Path, api_url: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that runs the flow in this process, without importing Prefect again, and returns its state."""
    monkeypatch.setattr(flow_run, "PROJECT", project)
    return lambda overrides={}: train_classifier.train_classifier("digits", overrides, return_state=True)


@pytest.fixture
def opened(project: Path) -> Iterator[Workspace]:
    values = read_yaml(project / "params.yaml")
    text = (project / "params.yaml").read_text()
    with open_workspace(project, params=values, params_text=text, experiment="one", flow_run_id="1") as space:
        yield space


def ran(project: Path) -> list[str]:
    return (project.parent / "ran").read_text().split()


def files(project: Path) -> dict[str, bytes]:
    """Return all that a flow run must not change: files outside the folders of git and the tools, and git's status."""
    own = {".git", ".dvc", ".prefect", "__pycache__", "reports"}
    paths = (path for path in project.rglob("*") if path.is_file() and not own & set(path.relative_to(project).parts))
    return {str(path): path.read_bytes() for path in paths} | {
        "status": output(project, "git", "status", "--porcelain")
    }


def output(project: Path, *command: str) -> bytes:
    return subprocess.run(command, cwd=project, capture_output=True, check=True).stdout


def dvc(project: Path, *arguments: str) -> str:
    return output(project, sys.executable, "-m", "dvc", *arguments).decode()


def test_a_flow_run_saves_an_experiment_and_does_not_change_the_checkout(project: Path, api_url: str) -> None:
    before = files(project)
    status, text = run(project, "--set", "train.epochs=9", api_url=api_url)
    assert status == 0, text
    assert files(project) == before
    assert ran(project) == list(STAGES)
    assert "train: train begins" in text
    assert "98.30% (95% interval 96.40% to 99.30%)" in text
    [name] = dvc(project, "exp", "list", "--name-only").split()
    assert name.startswith("digits-epochs-9-")
    assert f"dvc exp apply {name}" in text
    assert (project / f"artifacts/reports/{name}.html").as_uri() in text
    assert "Finished in state Completed" not in text
    assert not [path for path in (project / workspace_folders.FOLDER).iterdir() if path.is_dir()]
    dvc(project, "exp", "apply", name)
    assert read_yaml(project / "artifacts/train/out.txt")["train"]["epochs"] == 9
    assert json.loads((project / "artifacts/evaluate/metrics.json").read_text())["accuracy"] == 0.983
    assert (project / "toy.py").read_text().endswith("# changed\n")
    dvc(project, "repro")
    assert len(ran(project)) == len(STAGES)


def test_stages_that_dvc_has_cached_are_shown_as_cached(project: Path, run_here: Callable[[], Any]) -> None:
    first, second = run_here().result(), run_here().result()
    assert [step.outcome for step in first.steps] == ["ran"] * 4
    assert [step.outcome for step in second.steps] == ["restored"] * 4
    assert str(second.steps[0]) == "download cached"
    assert len(ran(project)) == len(STAGES)


def test_a_flow_run_has_the_title_of_its_mlflow_run(project: Path, run_here: Callable[..., Any]) -> None:
    params = project / "params.yaml"
    params.write_text(params.read_text().replace("batch_size: 32", "batch_size: 64"))
    (project / "recipes/nearer.yaml").write_text("train: {epochs: 7, learning_rate: 1.0e-05, batch_size: 64}\n")
    output(project, "git", "add", "recipes")
    (project.parent / "train.title").touch()
    state = run_here({"train.learning_rate": 1e-05})
    with get_client(sync_client=True) as client:
        name = client.read_flow_run(state.state_details.flow_run_id).name
    assert name == (project.parent / "train.title").read_text() == "digits lr=1e-05 batch=64"


def test_a_value_that_is_not_allowed_fails_the_run_and_not_its_naming(run_here: Callable[..., Any]) -> None:
    state = run_here({"train.momentum": 0.0})
    assert state.name == "Failed"
    assert "train." in state.message
    with get_client(sync_client=True) as client:
        assert "=" not in client.read_flow_run(state.state_details.flow_run_id).name


def test_each_flow_run_renders_a_report_of_its_experiment(project: Path, run_here: Callable[..., Any]) -> None:
    first, cached = run_here().result(), run_here().result()
    read = [json.loads(summary.report.read_text()) for summary in (first, cached)]
    assert first.report == project / f"artifacts/reports/{first.experiment}.html"
    assert [report["variables"]["PIPELINE_EXPERIMENT"] for report in read] == [first.experiment, cached.experiment]
    assert (read[0]["variables"]["PIPELINE_RECIPE"], read[0]["variables"]["PIPELINE_PROJECT"]) == (
        "digits",
        str(project),
    )
    assert [word.partition("=")[0] for word in read[0]["arguments"][3::2]] == list(STAGES)
    assert read[1]["arguments"] == ["--output", str(cached.report)]


def test_a_report_that_fails_is_a_warning(
    project: Path, run_here: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert run_here().result().report
    assert "the page is not in MLflow" in caplog.text
    (project.parent / "report.exit").touch()
    assert run_here().result().report is None
    assert "the report was not made: artifacts/train is missing" in caplog.text


def test_an_error_of_a_stage_is_reported_in_one_line(
    project: Path, run_here: Callable[[], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (project.parent / "train.exit").write_text("2")
    state = run_here()
    assert (state.name, state.message) == ("Failed", "train: train.device is 'cuda'; allowed: cpu")
    assert command_line.report(state, recipe="digits") == 2
    error, page, advice = capsys.readouterr().err.splitlines()[-3:]
    assert error == "error: train: train.device is 'cuda'; allowed: cpu"
    assert page.endswith(f"/runs/flow-run/{state.state_details.flow_run_id}")
    assert advice.startswith("next: correct that, then run the same command again")
    assert ran(project) == ["download", "normalize", "train"]
    assert "refs/exps" not in output(project, "git", "for-each-ref").decode()


def test_a_failing_stage_leaves_no_traceback_in_the_terminal(project: Path, api_url: str) -> None:
    (project.parent / "download.exit").write_text("1")
    status, text = run(project, api_url=api_url)
    assert status == 1
    assert "Traceback" not in text
    assert text.count("train.device is 'cuda'") == 1
    assert ran(project) == ["download"]


def test_the_clone_of_a_failed_run_is_kept_with_keep_workspace(project: Path, api_url: str) -> None:
    (project.parent / "train.exit").write_text("1")
    status, text = run(project, "--keep-workspace", api_url=api_url)
    assert status == 1
    [kept] = (project / workspace.KEPT_CLONES).iterdir()
    assert text.splitlines()[-1] == f"kept the clone: {workspace.KEPT_CLONES / kept.name}"
    assert (kept / "artifacts/normalize/out.txt").exists()
    assert not [path for path in (project / workspace_folders.FOLDER).iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    "case", [("download", 75, 4), ("download", 2, 1), ("train", 75, 4), ("train", 1, 1), ("normalize", 75, 1)]
)
def test_temporary_failures_are_retried(
    project: Path,
    run_here: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
    case: tuple[str, int, int],
) -> None:
    stage, status, attempts = case
    for task in (train_classifier.download, train_classifier.train):
        monkeypatch.setattr(task, "retry_delay_seconds", [0.0, 0.0, 0.0])
    (project.parent / f"{stage}.exit").write_text(str(status))
    state = run_here()
    assert command_line.report(state, recipe="digits") == status
    assert ran(project).count(stage) == attempts


def test_untracked_code_is_named_whatever_else_is_untracked(
    project: Path, run_here: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.txt", "b.txt", "c.txt", "d.txt", "pipeline/models/mine.py"):
        (project / name).touch()
    run_here()
    warnings = [record.getMessage() for record in caplog.records if "git does not track" in record.getMessage()]
    assert warnings == [
        "git does not track pipeline/models/mine.py: this run is without that code; `git add` it first",
        "git does not track a.txt, b.txt, c.txt, …: left out of this run; `git add` what it needs",
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ending_a_flow_run_ends_its_stage(project: Path, api_url: str, number: int) -> None:
    process = start_run_until("normalize", project=project, api_url=api_url)
    process.send_signal(number)
    text, _ = process.communicate()
    assert "Crash detected" not in text
    assert process.wait() in {-number, 128 + number}
    assert not running_in(project)
    assert not [path for path in (project / workspace_folders.FOLDER).iterdir() if path.is_dir()]


def test_a_second_sigterm_does_not_interrupt_the_cleanup_of_a_stage(project: Path, api_url: str) -> None:
    process = start_run_until("normalize", project=project, api_url=api_url)
    process.terminate()
    wait_until((project.parent / "normalize.terminating").exists)
    process.terminate()
    process.communicate()
    process.wait()
    assert (project.parent / "normalize.terminated").exists()


def test_a_stage_does_not_outlive_a_killed_flow_run(project: Path, api_url: str) -> None:
    process = start_run_until("download", project=project, api_url=api_url)
    process.kill()
    process.communicate()
    wait_until(
        lambda: len(workspace_folders.remove_leftovers(project)) == 1
    )  # the DVC process must release its lock first
    wait_until(lambda: not running_in(project))  # the stage may still clean up


def running_in(project: Path) -> list[str]:
    """Return the command lines of running processes whose current folder is the project or below."""
    found = []
    for process in psutil.process_iter(["cwd", "cmdline", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE and (process.info["cwd"] or "").startswith(str(project)):
            found.append(" ".join(process.info["cmdline"]))
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    """Return once the condition holds; if it never does, pytest's timeout ends the test."""
    while not condition():
        time.sleep(0.1)


def test_workspaces_of_dead_processes_are_removed_and_those_in_use_are_kept(project: Path, opened: Workspace) -> None:
    dead = project / workspace_folders.FOLDER / "dead"
    (dead / "clone").mkdir(parents=True)
    assert workspace_folders.remove_leftovers(project) == ["dead"]
    assert not dead.exists()
    assert opened.folder.exists()


def test_the_users_images_have_the_same_hash_as_in_the_checkout(project: Path, opened: Workspace) -> None:
    opened.reproduce("download", on_line=print)
    dvc(project, "repro", "download")
    assert dep_md5(opened.folder) == dep_md5(project)


def dep_md5(folder: Path) -> str:
    [dep, _] = read_yaml(folder / "dvc.lock")["stages"]["download"]["deps"]
    assert dep["nfiles"] == 2
    return str(dep["md5"])


def test_output_and_exit_status_of_a_stage_are_passed_on(project: Path, opened: Workspace) -> None:
    lines: list[str] = []
    (project.parent / "download.exit").write_text("7")
    with pytest.raises(StepError, match=r"download: train\.device") as caught:
        opened.reproduce("download", on_line=lines.append)
    assert caught.value.status == 7
    assert lines[-2:] == ["download begins", "error: train.device is 'cuda'; allowed: cpu"]


@pytest.mark.parametrize(
    ("written", "run_id"), [(None, None), ('{"mlflow_run_id": "5f3a', None), ('{"mlflow_run_id": "5f3a"}', "5f3a")]
)
def test_the_mlflow_run_id_is_read_from_the_result_file_of_the_stage(
    project: Path, opened: Workspace, written: str | None, run_id: str | None
) -> None:
    if written:
        (project.parent / "download.result").write_text(written)
    assert opened.reproduce("download", on_line=print) == "ran"
    assert opened.mlflow_run_id == run_id


def test_the_status_of_a_killed_stage_is_its_signal(project: Path, opened: Workspace) -> None:
    (project.parent / "download.exit").write_text("-9")
    with pytest.raises(StepError, match=r"download: ") as caught:
        opened.reproduce("download", on_line=print)
    assert caught.value.status in (-signal.SIGKILL, 128 + signal.SIGKILL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "digit"], "recipe: found 'digit'; allowed: digits (did you mean digits?); correct the name"),
        (["--set", "train.epoch=3"], "unknown key 'train.epoch'"),
        (["--set", "train.epochs=0"], "train.epochs is 0"),
    ],
)
def test_a_bad_parameter_is_refused_before_a_server_starts(project: Path, arguments: list[str], message: str) -> None:
    status, text = run(project, *arguments, api_url="")
    assert status == 2
    assert message in text
    assert len(text.splitlines()) == 1
    assert not (project / ".prefect" / "server.json").exists()


def test_a_prefect_server_that_does_not_answer_is_reported_in_one_line(project: Path) -> None:
    status, text = run(project, api_url=f"http://127.0.0.1:{free_port()}/api")
    assert status == 75
    assert "PREFECT_API_URL: no server answers at" in text.splitlines()[-1]


def test_a_checkout_without_a_commit_is_refused(project: Path) -> None:
    shutil.rmtree(project / ".git")
    with pytest.raises(UserError, match="not in a git repository"):
        git.take_snapshot(project)
    output(project, "git", "init", "-q")
    with pytest.raises(UserError, match="no git commit yet"):
        git.take_snapshot(project)


def test_experiment_names_are_valid_and_unique(project: Path) -> None:
    identity = "01234567-89ab-7def-0123-456789abcdef"
    output(project, "git", "update-ref", "refs/exps/ab/cdef/digits-abcdef", "HEAD")
    assert git.experiment_name(project, "digits", flow_run_id=identity) == f"digits-{identity.replace('-', '')}"
    assert git.experiment_name(project, "digits lr=0.03", flow_run_id=identity) == "digits-lr-0-03-abcdef"
    assert git.experiment_name(project, "my_images b~1/é…", flow_run_id=identity) == "my-images-b-1-abcdef"
    long = f"{'r' * 30} epochs=12 weights=/somewhere/else"
    assert git.experiment_name(project, long, flow_run_id=identity) == f"{'r' * 30}-epochs-12-abcdef"
    assert git.experiment_name(project, "日本", flow_run_id=identity) == "abcdef"


def test_the_tracking_store_belongs_to_the_project_unless_the_user_names_one(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracking_uri(project) == f"sqlite:///{project}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    get_settings.cache_clear()
    assert tracking_uri(project) == f"sqlite:///{project}/other.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    get_settings.cache_clear()
    assert tracking_uri(project) == "http://127.0.0.1:5000"
