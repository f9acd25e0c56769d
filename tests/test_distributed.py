"""Several processes share one training as torchrun starts them, here on the CPU with gloo."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import psutil
import pytest
import torch
from safetensors.torch import load

from pipeline.core.errors import UserError
from pipeline.core.yaml import dump_yaml
from pipeline.training import distributed
from tests.conftest import DEFAULTS, PROJECT, read_until, run_step, start_step, write_normalized

pytestmark = pytest.mark.slow
VALUES = {"epochs": 4, "batch_size": 16, "learning_rate": 0.01, "cpu_threads": 1, "flip": True, "log_every_steps": 1}


def configure(folder: Path, **changes: object) -> None:
    values = json.loads(json.dumps(DEFAULTS))
    values["train"] |= VALUES | changes
    (folder / "params.yaml").write_text(dump_yaml(values))


def losses(folder: Path) -> list[list[float]]:
    """Return the losses of each run by step, the newest run first."""
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    runs = client.search_runs([found.experiment_id for found in client.search_experiments()])
    assert [run.info.status for run in runs] == ["FINISHED"] * len(runs)
    found = []
    for run in runs:
        history = client.get_metric_history(run.info.run_id, "step/loss")
        assert [point.step for point in history] == list(range(1, 25))
        found.append([point.value for point in history])
    return found


def train(workspace: Path, *, processes: int) -> bytes:
    """Train in this number of processes, and return the content of last.safetensors."""
    configure(workspace, processes=processes)
    done = run_step("train", folder=workspace)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.count("epoch 4/4") == 1  # only rank 0 prints
    return (workspace / "artifacts/train/last.safetensors").read_bytes()


def test_two_processes_have_the_losses_of_one_process_also_after_a_kill_and_an_interrupt(
    workspace: Path,
) -> None:
    write_normalized(workspace)
    one, two = (train(workspace, processes=processes) for processes in (1, 2))
    for name, values in load(one).items():
        assert values.numpy() == pytest.approx(load(two)[name].numpy(), rel=1e-2, abs=1e-4)
    configure(workspace, processes=2, checkpoint_every_minutes=0.000001)  # after each step
    killed = start_step("train", hold="epoch 1/4")
    read_until("epoch 1/4", killed)
    assert set(listening_addresses(killed.pid)) == {"127.0.0.1"}
    os.kill(child_of_rank(killed.pid, "1"), signal.SIGKILL)
    _, stderr = killed.communicate()
    assert killed.returncode == 75, stderr
    assert "run the same command again to resume" in stderr
    interrupted = start_step("train", hold="epoch 3/4")
    assert "resumes from its checkpoint" in read_until("epoch 3/4", interrupted)
    interrupted.terminate()
    _, stderr = interrupted.communicate()
    assert (interrupted.returncode, len(stderr.splitlines())) == (128 + signal.SIGTERM, 1), stderr
    assert "the same command resumes from epoch" in stderr
    assert train(workspace, processes=2) == two
    again, by_two, by_one = losses(workspace)
    assert again == by_two == pytest.approx(by_one, rel=1e-3)


def listening_addresses(pid: int) -> list[str]:
    """Return the addresses on which a process and its children listen."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    connections = [found for process in processes for found in process.net_connections()]
    return [found.laddr.ip for found in connections if found.status == psutil.CONN_LISTEN]


def child_of_rank(pid: int, rank: str) -> int:
    children = psutil.Process(pid).children()
    [found] = [child.pid for child in children if child.environ().get("RANK") == rank]
    return found


def test_two_resumed_processes_keep_running_statistics_averages_and_dropout(workspace: Path) -> None:
    write_normalized(workspace)
    averaged = {"ema_decay": 0.9, "mixup_alpha": 0.4, "color_jitter": 0.2}
    configure(workspace, processes=2, epochs=2, model="mobilenet_v3_small", **averaged)

    def finish() -> list[bytes]:
        done = run_step("train", folder=workspace)
        assert (done.returncode, done.stderr) == (0, "")
        return [(workspace / "artifacts/train" / name).read_bytes() for name in ("last.safetensors", "history.csv")]

    whole = finish()
    stopped = start_step("train", hold="epoch 1/2")
    read_until("epoch 1/2", stopped)
    stopped.terminate()
    stopped.communicate()
    assert stopped.returncode == 128 + signal.SIGTERM
    assert finish() == whole


def test_processes_end_when_their_launcher_was_killed(workspace: Path) -> None:
    write_normalized(workspace)
    configure(workspace, processes=2, epochs=100_000)
    launcher = start_step("train")
    read_until("epoch      1/100000", launcher)
    ranks = psutil.Process(launcher.pid).children()
    assert len(ranks) >= 2
    launcher.kill()
    psutil.wait_procs(ranks)


def test_more_processes_than_devices_are_refused() -> None:
    with pytest.raises(UserError, match=r"train.processes is 2, but this machine has 1 of type mps; allowed: up to 1"):
        distributed.check_num_devices(2, device=torch.device("mps"))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, True),
        ({"TORCHELASTIC_RUN_ID": "1", "LOCAL_RANK": "0"}, True),
        ({"TORCHELASTIC_RUN_ID": "1", "LOCAL_RANK": "1"}, False),
        (
            {"TORCHELASTIC_RUN_ID": "1", "LOCAL_RANK": "0", distributed.RENDEZVOUS_VARIABLE: "f"},
            False,
        ),  # its launcher locks the GPUs
    ],
)
def test_one_process_of_each_machine_locks_the_gpus_of_all(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: bool
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed.acts_for_its_machine() == expected


def test_torchrun_can_start_the_processes(workspace: Path) -> None:
    write_normalized(workspace)
    configure(workspace, processes=2, epochs=1)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [*torchrun, "2", "-m", "pipeline.train"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [*torchrun, "1", "-m", "pipeline.train"], env=environment, capture_output=True, text=True, check=False
    )
    assert "error: train.processes is 2, but torchrun started 1 in total; set train.processes to 1" in done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 15}, "error: params.yaml: train.batch_size is 15, but processes 2; allowed: a multiple of p"),
        ({"learning_rate": 1e30, "momentum": 0.0, "nesterov": False, "schedule": "constant"}, "step 2: the loss is"),
    ],
)
def test_an_error_of_all_processes_is_reported_once(workspace: Path, changes: dict[str, object], message: str) -> None:
    write_normalized(workspace)
    configure(workspace, processes=2, **changes)
    done = run_step("train", folder=workspace)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert message in done.stderr


RANK_1_FAILS = """
import sys, torch
from pipeline.training import distributed
from pipeline.core.errors import UserError, report_errors
distributed.MAX_LAG_SECONDS = 0
cpu = torch.device("cpu")
with report_errors():
    if not distributed.is_launched():
        distributed.launch("alone", processes=2)
        sys.exit()
    with distributed.process_group(cpu, processes=2):
        if distributed.rank() == 1:
            raise UserError("found in this one alone")
        distributed.sum_over_ranks(torch.zeros(1))
"""


def test_an_error_of_one_process_is_reported_by_that_process(tmp_path: Path) -> None:
    (tmp_path / "alone.py").write_text(RANK_1_FAILS)
    environment = os.environ | {"PYTHONPATH": f"{PROJECT}{os.pathsep}{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "-m", "alone"], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, "error: found in this one alone\n")
