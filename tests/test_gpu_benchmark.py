"""The GPU benchmark runs in dry mode on the CPU, keeps the results of a part that is killed, and detects errors."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from benchmarks.gpu import correctness
from benchmarks.gpu.correctness import CPU, relative_difference, update
from benchmarks.gpu.images import unpack, write_arrays
from benchmarks.gpu.pack import pack
from benchmarks.gpu.part import Emit, PartResult, Setting, run_part
from benchmarks.gpu.report import is_good, markdown
from benchmarks.gpu.speed import covered
from benchmarks.gpu.toy import TWO_STEPS, toy_params, toy_split
from pipeline.arrays import Split
from pipeline.artifacts import file_md5, read_split
from pipeline.core.errors import UserError
from tests.conftest import PROJECT

# Runs the benchmark as on a machine that has only the packages that it needs.
WITHOUT_PACKAGES = """
import runpy, sys
for name in ("mlflow", "prefect", "dvc", "sqlalchemy", "sklearn", "pandas", "matplotlib", "scipy", "requests", "git"):
    sys.modules[name] = None
sys.argv = ["gpu", *sys.argv[1:]]
runpy.run_module("benchmarks.gpu", run_name="__main__", alter_sys=True)
"""


def run(*arguments: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Run the benchmark without git."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGES, *arguments],
        cwd=PROJECT,
        env={**os.environ, "PATH": str(path)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_dry_mode_runs_on_a_machine_without_mlflow_prefect_dvc_and_git(tmp_path: Path) -> None:
    done = run("--dry", "--out", str(tmp_path / "out"), path=tmp_path)
    log = tmp_path / "out/log.txt"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text() if log.exists() else "")
    found = json.loads((tmp_path / "out/gpu.json").read_text())
    assert {name: part["status"] for name, part in found["parts"].items()} == dict.fromkeys(
        ("correctness", "fast94", "compile", "resnet18", "lock"), "done"
    )
    assert {row["ok"] for name in ("correctness", "lock") for row in found["parts"][name]["rows"]} == {True}
    assert "commit unknown" in found["header"]
    text = (tmp_path / "out/gpu.md").read_text()
    assert "| a non-finite loss changes no weight | 18 of 18 |" in text
    assert "| seeds |" in text
    assert text in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_reported_in_one_line(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path / "out"), path=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: found no GPU that PyTorch can use (CUDA); `python -m benchmarks.gpu --dry`")
    assert len(done.stderr.splitlines()) == 1


def test_missing_images_are_reported_in_one_line(tmp_path: Path) -> None:
    done = run("--dry", "--images", str(tmp_path / "none"), "--out", str(tmp_path / "out"), path=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "none: no such folder or file; allowed: a tree" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def run_alone(part: object, tmp_path: Path, *, seconds: float) -> PartResult:
    setting = Setting(arrays=tmp_path, dry=True)
    return run_part("one", part, setting, seconds=seconds, out=tmp_path)  # type: ignore[arg-type]


def test_a_part_is_killed_at_its_limit_with_its_children_and_its_findings_are_kept(tmp_path: Path) -> None:
    def part(_: Setting, emit: Emit) -> None:
        emit(child=subprocess.Popen(["sleep", "600"]).pid)
        time.sleep(600)

    seen: list[psutil.Process] = []

    def on_change() -> None:
        seen.extend(psutil.Process(row["child"]) for row in result.rows)

    result = PartResult()
    run_part("one", part, Setting(tmp_path, dry=True), seconds=20, out=tmp_path, result=result, on_change=on_change)
    assert result.status == "cut off"
    assert len(seen) == len(result.rows) == 1
    alive = psutil.wait_procs(seen, timeout=10)[1]
    assert all(
        process.status() == psutil.STATUS_ZOMBIE for process in alive
    )  # a process stays a zombie until its exit status is read


def test_the_findings_and_the_traceback_of_a_failed_part_are_kept(tmp_path: Path) -> None:
    def part(_: Setting, emit: Emit) -> None:
        emit(check="one", case="", ok=True, found="all")
        raise RuntimeError("no such kernel")

    found = run_alone(part, tmp_path, seconds=60)
    assert (found.status, len(found.rows)) == ("failed", 1)
    assert "RuntimeError: no such kernel" in (tmp_path / "log.txt").read_text()
    assert not is_good({"lock": found})
    assert "### lock: failed" in markdown("", {"lock": found}, dry=False)


def test_a_failed_check_is_reported() -> None:
    result = PartResult("done", rows=[{"check": "same bits", "case": "lenet", "ok": False, "found": "differ | twice"}])
    text = markdown("", {"correctness": result}, dry=False)
    assert "| same bits | 0 of 1 |" in text
    assert "| same bits | lenet | FAILED | differ / twice |" in text
    assert not is_good({"correctness": result})


def test_an_update_with_another_learning_rate_is_far_beyond_the_tolerance() -> None:
    values = [toy_params("lenet", "sgd", **TWO_STEPS | {"learning_rate": rate}) for rate in (0.001, 0.00101)]
    one, other = (update(params, device=CPU) for params in values)
    assert relative_difference(one, one) == 0
    assert relative_difference(other, one) > 10 * correctness.UPDATE_TOLERANCES["lenet", "sgd"]


def test_trainings_that_differ_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = iter(range(100))

    def other_images(number: int, *, seed: int, device: torch.device) -> Split:
        return toy_split(number, seed=seed + next(seeds), device=device)

    monkeypatch.setattr(correctness, "toy_split", other_images)
    params = toy_params("lenet", "sgd", batch_size=4, epochs=2)
    assert correctness._same_bits(params, device=CPU, losses={})() == (False, "differ: twice, resumed")


def test_overlapping_kernels_are_counted_once_in_the_busy_time() -> None:
    assert covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4


def jpeg_tree(folder: Path) -> tuple[Path, Path]:
    """Write a tree of JPEG files, and the arrays that normalize would make of it; return both folders."""
    draw = np.random.default_rng(0)
    pixels, labels = dict[str, list[Any]](), dict[str, Any]()
    for split, number in (("train", 3), ("validation", 2), ("test", 2)):
        labels[split], pixels[split] = np.arange(number), []
        for label in range(number):
            path = folder / "tree" / split.replace("validation", "train") / str(label) / f"{split}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
            pixels[split].append(np.asarray(Image.open(path)))
    together = np.concatenate([np.stack(images) for images in pixels.values()])
    md5 = write_arrays(folder / "arrays", together, labels, {})
    write_arrays(folder / "arrays", together, labels, {"md5": md5})
    return folder / "tree", folder / "arrays"


def test_a_packed_file_unpacks_to_the_same_arrays(tmp_path: Path) -> None:
    tree, folder = jpeg_tree(tmp_path)
    assert pack(tree, folder, tmp_path / "packed.npz") == (tmp_path / "packed.npz").stat().st_size
    unpack(tmp_path / "packed.npz", tmp_path / "again")
    for name in ("train", "validation", "test"):
        for kind in ("images", "labels"):
            file = f"{name}_{kind}.npy"
            assert file_md5(folder / file) == file_md5(tmp_path / "again" / file)
    assert len(read_split("train", folder=tmp_path / "again")[0]) == 3


def test_a_damaged_packed_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "packed.npz").write_bytes(b"PK\x03\x04 and nothing")
    with pytest.raises(UserError, match=r"packed\.npz: damaged"):
        unpack(tmp_path / "packed.npz", tmp_path / "again")
