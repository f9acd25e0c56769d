"""`dvc repro` in a fresh clone runs only changed stages, and loses no good output."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.artifacts import NORMALIZE, bytes_md5, file_md5, verify
from pipeline.core.errors import UserError
from pipeline.core.git import git
from pipeline.core.stage_code import stage_names
from pipeline.core.yaml import read_yaml
from tests.conftest import PROJECT, copy_project

BIN = Path(sys.executable).parent


def dvc(*arguments: str, status: int = 0) -> str:
    """Run a DVC command in the current folder, and return its output."""
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run([BIN / "dvc", *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def change(old: str, new: str) -> None:
    path = Path("params.yaml")
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def stages_run(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory: pytest.TempPathFactory, mlflow_store: Path) -> Path:
    """Return a copy of the project that trains for two epochs, after one `dvc repro`."""
    folder = copy_project(tmp_path_factory.mktemp("dvc") / "project")
    shutil.copy(mlflow_store / "mlflow.db", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        change("  epochs: 20\n", "  epochs: 2\n")
        assert stages_run(dvc("repro")) == stage_names()
    return folder


@pytest.fixture
def project(reproduced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a new copy of the reproduced project, and return it."""
    monkeypatch.chdir(shutil.copytree(reproduced, tmp_path / "project"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Path.cwd()


def test_the_report_is_made_and_a_second_repro_leaves_it_and_git_as_they_are(project: Path) -> None:
    report, changed = Path("artifacts/report.html").read_bytes(), git(project, "status", "--porcelain")
    assert "report.html" not in changed
    dvc("repro")
    assert git(project, "status", "--porcelain") == changed
    assert Path("artifacts/report.html").read_bytes() == report


def test_a_second_repro_runs_nothing_and_a_change_runs_each_dependent_stage_once(project: Path) -> None:
    assert stages_run(dvc("repro")) == []
    change("top_k: 5", "top_k: 3")
    assert stages_run(dvc("repro"))[:1] == ["evaluate"]
    change("checkpoint: best", "checkpoint: last")
    change("  epochs: 2\n", "  epochs: 1\n")
    assert stages_run(dvc("repro"))[:2] == ["train", "evaluate"]
    change("  epochs: 1\n", "  epochs: 2\n")
    assert "Stage 'train' is cached" in (output := dvc("repro"))
    assert "train" not in stages_run(output)


def test_the_committed_lock_file_is_of_the_committed_code_and_parameters() -> None:
    params = read_yaml(PROJECT / "params.yaml")
    for name, stage in read_yaml(PROJECT / "dvc.lock")["stages"].items():
        assert stage["params"]["params.yaml"] == {name: params[name]}
        for dep in stage["deps"]:
            if dep["path"].startswith("pipeline/"):
                assert dep["md5"] == dvc_md5(PROJECT / dep["path"]), f"{dep['path']} changed: run `dvc repro`"


def dvc_md5(path: Path) -> str:
    """Return DVC's hash of a file, or of a folder of Python modules."""
    if path.is_file():
        return file_md5(path)
    modules = sorted(path.rglob("*.py"))
    listing = [{"md5": file_md5(each), "relpath": str(each.relative_to(path))} for each in modules]
    return f"{bytes_md5(json.dumps(listing, sort_keys=True).encode())}.dir"


def test_files_that_are_not_modules_do_not_belong_to_the_code_of_a_stage() -> None:
    names = ("__pycache__/lenet.cpython-311.pyc", ".lenet.py.swp", "lenet.py~", ".DS_Store")
    for name in names:
        command = [sys.executable, "-m", "dvc", "check-ignore", f"pipeline/models/{name}"]
        assert subprocess.run(command, cwd=PROJECT, capture_output=True, check=False).returncode == 0, name
    command = [sys.executable, "-m", "dvc", "check-ignore", "pipeline/models/mlp.py"]
    assert subprocess.run(command, cwd=PROJECT, capture_output=True, check=False).returncode == 1


def test_downloaded_and_normalized_data_have_the_committed_hashes(project: Path) -> None:
    committed, made = (read_yaml(folder / "dvc.lock")["stages"] for folder in (PROJECT, project))
    for stage in ("download", "normalize"):
        assert made[stage]["outs"] == committed[stage]["outs"]


def test_metrics_parameters_and_plots_can_be_compared(project: Path) -> None:
    assert (
        "accuracy"
        in json.loads(dvc("metrics", "show", "--json"))[""]["data"]["artifacts/evaluate/metrics.json"]["data"]
    )
    assert "train.epochs" in dvc("params", "diff")
    assert Path("dvc_plots/index.html").resolve().as_uri() in dvc("plots", "show")


def test_the_command_in_the_error_restores_the_last_good_model_after_a_failed_stage(project: Path) -> None:
    before = {path: path.read_bytes() for path in Path("artifacts/train").iterdir()}
    change("batch_size: 32", "batch_size: 32000")
    output = dvc("repro", status=255)
    assert "error: train.batch_size is 32000, but the train split has 1285 images" in output
    assert "`dvc checkout` restores the last good outputs" in output
    dvc("checkout")
    assert {path: path.read_bytes() for path in Path("artifacts/train").iterdir()} == before


@pytest.mark.parametrize(
    "is_newer", [True, False], ids=["its modification time is new", "its modification time is old"]
)
def test_a_damaged_file_in_the_cache_is_reported_and_fixed_by_the_commands_in_the_error(
    project: Path, is_newer: bool
) -> None:
    path = NORMALIZE / "train_images.npy"
    cached = Path(".dvc/cache/files/md5") / (md5 := file_md5(path))[:2] / md5[2:]
    before = cached.stat()
    cached.chmod(0o600)
    cached.write_bytes(b"?" * before.st_size)
    cached.chmod(before.st_mode)
    if not is_newer:
        os.utime(cached, ns=(before.st_atime_ns, before.st_mtime_ns))
    shutil.rmtree(NORMALIZE)
    change("  epochs: 2\n", "  epochs: 1\n")
    [error] = [line for line in dvc("repro", status=255).splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: {path}: {before.st_size:,} bytes with MD5 {file_md5(path)}, but ")
    assert f" lists MD5 {md5}; " in error
    rerun, check, _ = re.findall("`(.+?)`", error)
    with pytest.raises(UserError, match="train_images"):
        shell(rerun)
        verify(NORMALIZE)
    shell(check)
    shell(rerun)
    verify(NORMALIZE)


def shell(commands: str) -> str:
    """Run commands as a user does in a shell, in the current folder, up to the first that fails."""
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(["sh", "-ec", commands], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_pushed_outputs_can_be_pulled(project: Path) -> None:
    model = Path("artifacts/train/best.safetensors")
    content = model.read_bytes()
    dvc("push")
    for folder in (".dvc/cache", "artifacts/train"):
        shutil.rmtree(folder)
    dvc("pull")
    assert model.read_bytes() == content


def test_a_colleague_pulls_from_the_remote_that_the_commands_of_the_docs_set(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (PROJECT / "docs/data.md").read_text(encoding="utf-8").partition("## Versions of data and models")[2]
    set_up, _ = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    before, remote = output_md5s(), tmp_path / "a drive" / "storage"
    dvc("push")  # into the remote that comes with the project, which no colleague can reach
    shell("git config user.name t; git config user.email t@t; git commit -qam Train")
    shell("git init -q --bare ../bare; git remote add origin ../bare; git push -qu origin HEAD")
    shell(set_up.replace("/path/or/url", shlex.quote(str(remote))))
    shutil.move(project, tmp_path / "gone")  # with its cache and .dvcstore/
    monkeypatch.chdir(tmp_path)
    shell("git clone -q bare colleague")
    monkeypatch.chdir(tmp_path / "colleague")
    dvc("pull")
    assert output_md5s() == before
    assert "Data and pipelines are up to date" in dvc("status")
    answer = json.loads(shell("python -m pipeline.predict --json artifacts/evaluate/confusion_matrix.png"))
    assert len(answer["probabilities"]) == 10
    assert shell("git status --porcelain") == ""


def output_md5s() -> dict[str, str]:
    """Return the MD5 of each output of the stages, by its path."""
    return {str(path): file_md5(path) for path in sorted(Path("artifacts").glob("*/**/*")) if path.is_file()}


def test_a_read_only_project_is_reported_in_one_line(project: Path) -> None:
    read_only = f"mount --bind {project} {project} && mount -o remount,ro,bind {project} && cd {project}"
    command = ["unshare", "--mount", "sh", "-c", f"{read_only} && exec {sys.executable} -m pipeline.download"]
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("making a folder read-only for root as well takes mount namespaces, which are refused here")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "Read-only file system" in done.stderr


def test_a_changed_error_message_runs_no_stage_again(project: Path) -> None:
    for module in ("core/errors.py", "tracking/runs.py", "predict.py"):
        with Path("pipeline", module).open("a") as file:
            file.write("# a comment\n")
    assert stages_run(dvc("repro")) == []
