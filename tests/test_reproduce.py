"""`flows.reproduce` repeats a real run on digits, and reports what differs."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from flows import reproduce, workspace, workspace_folders
from flows.dvc_state import cache_folder, cached_path, experiment_refs
from pipeline.artifacts import file_md5
from pipeline.core.errors import UserError
from pipeline.core.git import git
from pipeline.core.settings import get_settings
from pipeline.tracking.provenance import COMMIT, REPRODUCES
from pipeline.tracking.provenance_file import with_provenance
from pipeline.tracking.runs import find_or_create_run
from pipeline.tracking.search import Run, find_run, find_runs
from pipeline.tracking.store import connect

DIFFERENCE = b"""diff --git a/params.yaml b/params.yaml
--- a/params.yaml
+++ b/params.yaml
@@ -1 +1 @@
-no
+yes
"""
PACKAGES = {False: b"numpy==2.3.0\ntorch==2.11.0\n", True: b"numpy==2.3.0\ntorch==2.15.0\n"}


@pytest.fixture
def project(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{recorded}/mlflow.db")
    connect()
    return recorded


@pytest.fixture
def run(project: Path) -> Run:
    [found] = [run for run in find_runs({"model.md5": "%"}) if REPRODUCES not in run.tags]
    return with_provenance(found)


@pytest.fixture(scope="module")
def again(recorded: Path) -> tuple[int, str]:
    """Reproduce the recorded run, which trains again, and return the exit status and the output."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{recorded}/mlflow.db")
        get_settings.cache_clear()
        connect()
        [original] = [run for run in find_runs({"model.md5": "%"}) if REPRODUCES not in run.tags]
        command = [sys.executable, "-m", "flows.reproduce", original.run_id]
        before = state(recorded)
        done = subprocess.run(command, cwd=recorded, capture_output=True, text=True, check=False)
    assert state(recorded) == before
    return done.returncode, done.stdout + done.stderr


def state(project: Path) -> Any:
    """Return what a reproduction must not change: the checkout, DVC's cache, and the list of workspaces."""
    cache = sorted(str(path) for path in (project / ".dvc/cache").rglob("*"))
    spaces = [path for path in (project / workspace_folders.FOLDER).iterdir() if path.is_dir()]
    return git(project, "diff", "HEAD"), git(project, "status", "--porcelain"), cache, spaces


def from_cache(project: Path, run: Run, *, keep: bool = False) -> reproduce.Reproduction:
    return reproduce.reproduce(project, run, from_cache=True, keep=keep)


def test_a_reproduced_run_is_identical(again: tuple[int, str], run: Run) -> None:
    status, text = again
    assert (status, text.splitlines()[-1]) == (0, "identical"), text
    assert "epoch 1/1" in text
    for stage in ("download", "normalize", "train", "evaluate"):
        assert f"{stage:<11} identical" in text
    [copy] = map(with_provenance, find_runs({REPRODUCES: run.run_id}))
    assert (copy.tags["model.md5"], copy.tags["reproduction.result"]) == (run.tags["model.md5"], "identical")
    assert "dvc.experiment" not in copy.tags
    assert find_or_create_run(run.tags["model.md5"], experiment="digits")[0].run_id == run.run_id


def test_an_experiment_is_reproduced_by_its_name(project: Path) -> None:
    name = experiment_refs(project)[0].rpartition("/")[2]
    result = from_cache(project, reproduce.find(project, name))
    assert result.identical
    assert len(result.stages) == 4


def test_another_package_version_or_hardware_is_reported(
    again: tuple[int, str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    [copy] = map(with_provenance, find_runs({REPRODUCES: run.run_id}))
    monkeypatch.setattr(reproduce, "read_file", lambda found, name: PACKAGES[found.run_id == copy.run_id])
    lines = list(reproduce._environment_differences(replace(run, tags={**run.tags, "hardware.cpu": "abacus"}), copy))
    assert lines == [
        "environment torch: was 2.11.0, is 2.15.0",
        f"hardware    cpu: was abacus, is {copy.tags['hardware.cpu']}",
    ]


@pytest.mark.parametrize(
    ("original_hardware", "reasons"),
    [
        (
            {"cpu": "AMD", "cpu_kernels": "native (as chosen): x"},
            ["not portable in both runs (native (as chosen), portable)"],
        ),
        ({"cpu": "AMD"}, ["not portable in both runs (portable, unknown)"]),
        ({"cpu": "AMD", "cpu_kernels": "portable"}, []),
        ({"cpu": "Intel", "cpu_kernels": "native (as chosen): x"}, []),
        ({"gpu": "H100", "cpu_kernels": "portable"}, ["another GPU"]),
        ({"threads": "4"}, ["another number of threads"]),
        ({}, []),
    ],
)
def test_the_reason_for_different_bits_is_reported(
    original_hardware: Mapping[str, str], reasons: Sequence[str]
) -> None:
    hardware = {"cpu": "Intel", "cpu_kernels": "portable", "gpu": "none", "threads": "2"}
    run, again = (
        Run("b", "again", "FINISHED", 0, {f"hardware.{part}": value for part, value in tags.items()}, {}, {})
        for tags in (original_hardware, hardware)
    )
    lines = list(reproduce._reasons(run, again))
    assert len(lines) == len(reasons)
    assert all(reason in line for reason, line in zip(reasons, lines, strict=True))


def test_a_run_of_older_code_is_found_by_its_tags(
    project: Path, again: tuple[int, str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    [copy] = map(with_provenance, find_runs({REPRODUCES: run.run_id}))
    model = cached_path(cache_folder(project), run.tags["model.md5"])
    find = partial(reproduce._find_new_run, run, reported_id=None, model=model)
    assert find(since=copy.started) == copy
    monkeypatch.setattr(reproduce, "REPRODUCES", "not.yet.tagged")
    assert find(since=copy.started) == copy
    assert find(since=copy.started + 1) is None


def test_a_different_hash_is_reported_with_its_file(project: Path, run: Run) -> None:
    tags = {**run.tags, "outputs.train": run.tags["outputs.train"].replace('"history.csv": "', '"history.csv": "f')}
    result = from_cache(project, replace(run, tags=tags))
    assert not result.identical
    assert result.mlflow_run_id is None
    [stage] = [stage for stage in result.stages if stage.differences]
    assert str(stage).startswith("train ")
    assert "history.csv was f" in str(stage)


def test_a_model_changed_in_mlflow_is_reported_and_the_clone_can_be_kept(project: Path, run: Run) -> None:
    copies = list((project / "mlartifacts").rglob("best.safetensors"))
    content = copies[0].read_bytes()
    for copy in copies:
        copy.write_bytes(content + b" ")
    try:
        result = from_cache(project, run, keep=True)
    finally:
        for copy in copies:
            copy.write_bytes(content)
    assert not result.identical
    assert "MLflow's copy was changed by hand" in result.damaged[0]
    [kept] = (project / workspace.KEPT_CLONES).iterdir()
    assert file_md5(kept / "artifacts/train/best.safetensors") == run.tags["model.md5"]


def test_a_model_changed_in_the_cache_is_reported_although_dvc_fixes_it(project: Path, run: Run) -> None:
    cached = cache_folder(project) / run.tags["model.md5"][:2] / run.tags["model.md5"][2:]
    content = cached.read_bytes()
    cached.chmod(0o644)
    cached.write_bytes(content[:-1] + b"?")
    result = from_cache(project, run)
    assert "DVC's cache was changed by hand" in result.damaged[0]
    assert not result.identical
    assert cached.read_bytes() == content


def test_an_unknown_run_is_refused(project: Path) -> None:
    with pytest.raises(UserError, match="0" * 32 + ": no MLflow run, commit or experiment"):
        reproduce.find(project, "0" * 32)


def test_a_commit_that_is_not_in_the_repository_is_refused(
    project: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown_commit = replace(run, tags={**run.tags, COMMIT: "1" * 40})
    monkeypatch.setattr(reproduce, "find_run", lambda run_id: unknown_commit)
    with pytest.raises(UserError, match=f"its commit {'1' * 40} is not in this repository"):
        reproduce.find(project, run.run_id)


def test_changes_that_do_not_apply_are_refused(project: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "read_file", lambda run, name: DIFFERENCE)
    with pytest.raises(UserError, match="the recorded changes do not apply to commit"):
        from_cache(project, run)
    assert find_run(run.run_id)
