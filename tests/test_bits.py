"""A short portable training has the committed bits, whatever the x86-64 CPU."""

import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.core.errors import UserError
from pipeline.models.cpu_kernels import PORTABLE, cpu_kernels_in_use, use_cpu_kernels
from tests.bits import check
from tests.bits.training import NETWORKS, Bits
from tests.conftest import PROJECT, train_params

# For each version of PyTorch: network, threads and MD5s, as `python -m tests.bits.training portable …` prints them.
GOLDEN = json.loads(Path(__file__).with_name("bits").joinpath("golden.json").read_text())
BITS = Bits("lenet", 1, cpu="a CPU", capability="AVX2", weights="w", evaluation="e")
UNSET = {name: value for name, value in os.environ.items() if name not in PORTABLE}


def python(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=PROJECT, env=UNSET | variables, capture_output=True, text=True, check=False
    )


def test_the_locked_pytorch_has_committed_bits() -> None:
    [locked] = re.findall(r"^torch==([0-9.]+)", (PROJECT / "requirements/base.lock").read_text(), re.MULTILINE)
    assert {version.partition("+")[0] for version in GOLDEN} >= {locked}


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the hashes are those of x86-64")
@pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="this CPU has no AVX2")
@pytest.mark.skipif(torch.__version__ not in GOLDEN, reason=f"no hashes of PyTorch {torch.__version__} are committed")
def test_a_portable_training_has_the_committed_bits() -> None:
    done = python("-m", "tests.bits.training", "portable", *NETWORKS)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    kept = ("network", "threads", "weights", "evaluation")
    assert [{name: bits[name] for name in kept} for bits in found] == GOLDEN[torch.__version__], done.stderr


def test_the_committed_bits_are_of_all_networks_and_differ_by_threads() -> None:
    for rows in GOLDEN.values():
        assert [(row["network"], row["threads"]) for row in rows] == [(name, n) for name in NETWORKS for n in (1, 2)]
        assert len({row["weights"] for row in rows}) == len(rows)


def test_portable_kernels_are_refused_if_chosen_too_late_and_native_ones_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    use_cpu_kernels("native", field="train.cpu_kernels")
    with pytest.raises(UserError, match="is portable, but PyTorch already computes with AVX512 in this process"):
        use_cpu_kernels("portable", field="train.cpu_kernels")


def test_a_cpu_without_avx2_causes_a_warning_and_sets_no_variables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(os, "environ", dict(UNSET))
    use_cpu_kernels("portable", field="train.cpu_kernels")
    assert "warning: train.cpu_kernels is portable, but this CPU" in capsys.readouterr().err
    assert not PORTABLE.keys() & os.environ.keys()
    assert cpu_kernels_in_use(train_params()).startswith("native (no AVX2): ")


def test_the_records_name_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert cpu_kernels_in_use(train_params()) == "portable"
    assert cpu_kernels_in_use(train_params(cpu_kernels="native")).startswith("native (as chosen): ")
    assert cpu_kernels_in_use(train_params(compile=True)).startswith("native (train.compile): ")


def results(kernels: str, *weights: str) -> list[check.Result]:
    return [(cpu, kernels, replace(BITS, weights=value)) for cpu, value in zip(check.EMULATED, weights, strict=True)]


@pytest.mark.parametrize(
    ("portable", "native", "status", "line"),
    [
        ("aa", "ab", 0, "portable: the same bits on all CPUs"),
        ("ab", "ab", 1, "portable: other bits on another CPU: lenet with 1 thread"),
        ("aa", "aa", 3, "so this machine proves nothing"),
    ],
)
def test_the_check_passes_only_if_the_bits_are_equal_and_those_of_the_control_differ(
    portable: str, native: str, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = results("portable", *portable) + results("native", *native)
    assert check.report(found) == status
    assert line in capsys.readouterr().out


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other machines report the unsupported CPU first")
def test_a_missing_emulator_is_reported_in_one_line_with_the_package(tmp_path: Path) -> None:
    done = python("-m", "tests.bits.check", PATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: qemu-x86_64: not found; install it, as by `apt-get install qemu-user` on Debian\n"
