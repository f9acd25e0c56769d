"""A stopped training resumes as if it had not been stopped, in this process and by the command."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch

from pipeline.arrays import DatasetInfo
from pipeline.artifacts import file_md5
from pipeline.core.errors import UserError
from pipeline.core.yaml import dump_yaml
from pipeline.models.build import build
from pipeline.params import TrainParams
from pipeline.train import _determinants
from pipeline.training import saving
from pipeline.training.checkpoints import Checkpoint, fingerprint
from pipeline.training.loop import TrainingResult, train
from tests.conftest import DEFAULTS, PROJECT, read_until, release, start_step, train_params, write_normalized
from tests.forked import Process
from tests.test_model import config
from tests.test_train import OPTIMIZERS, QUICK, runs, split_of

MODEL = Path("artifacts/train/best.safetensors")
# Trainings that are killed need a checkpoint after each step, as they are shorter than the default interval.
EVERY_STEP = {"checkpoint_every_minutes": 0.000001}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, as small networks spend most of their time in waiting for other threads on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(
    params: TrainParams, *, stop_after: int | None = None, start: Checkpoint | None = None
) -> TrainingResult | Checkpoint:
    """Train with 4 steps per epoch, and return the result, or the checkpoint if Ctrl-C stops it after a step."""
    torch.manual_seed(params.seed)
    classifier = build(config(params.model, classes=3)).to(memory_format=torch.channels_last)
    saved: list[Checkpoint] = []

    def on_step(step: int, _loss: float, _rate: float) -> None:
        if step == stop_after:
            raise KeyboardInterrupt

    try:
        return train(
            classifier,
            params=params,
            train_split=split_of(4 * params.batch_size, seed=1),
            validation_split=split_of(24, seed=2),
            on_step=on_step,
            start=start,
            save=saved.append,
        )
    except KeyboardInterrupt:
        return Checkpoint.from_bytes(saved[-1].to_bytes())


def assert_same(found: TrainingResult | Checkpoint, uninterrupted: TrainingResult | Checkpoint) -> None:
    assert isinstance(found, TrainingResult)
    assert isinstance(uninterrupted, TrainingResult)
    assert found.history == uninterrupted.history
    for one, other in ((found.best, uninterrupted.best), (found.last, uninterrupted.last)):
        assert all(torch.equal(one[name], other[name]) for name in other)


def stopped(params: TrainParams, *steps: int) -> TrainingResult | Checkpoint:
    """Train, stop and resume after each of these steps, and return the result."""
    start = None
    for step in (*steps, None):
        found = run(params, stop_after=step, start=start)
        start = found if isinstance(found, Checkpoint) else None
    return found


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [
        *(("lenet", name) for name in OPTIMIZERS),
        pytest.param("resnet18", "nesterov", marks=pytest.mark.slow),
        ("mobilenet_v3_small", "adamw"),
    ],
)
def test_a_training_stopped_in_the_middle_of_an_epoch_has_the_same_result(model: str, optimizer: str) -> None:
    changes = {"flip": True, "crop_padding": 3, "cutout_size": 8, "log_every_steps": 1, "early_stopping_epochs": 5}
    changes |= {} if model == "lenet" else {"batch_size": 8}  # it takes a third of the time
    params = train_params(**{**QUICK, "learning_rate": 0.01, **OPTIMIZERS[optimizer], **changes}, model=model)
    assert_same(stopped(params, 2, 4, 5), run(params))


def test_a_resumed_training_keeps_the_slow_weights_of_lookahead() -> None:
    changes = {"average_every_steps": 3, "bias_learning_rate_factor": 4.0, "log_every_steps": 1}
    params = train_params(**QUICK | changes | {"learning_rate": 0.02, "schedule": "linear"}, model="airbench")
    assert_same(stopped(params, 2, 4, 5), run(params))


def test_a_training_can_be_stopped_after_every_step() -> None:
    params = train_params(**QUICK, log_every_steps=1, crop_padding=3)
    assert_same(stopped(params, *range(1, 9)), run(params))


def checkpoints(**changes: float) -> list[Checkpoint]:
    """Return the checkpoints of a training of two epochs of four steps."""
    saved: list[Checkpoint] = []
    torch.manual_seed(0)
    train(
        build(config("lenet", classes=3)),
        params=train_params(**QUICK, **changes),
        train_split=split_of(64, seed=1),
        validation_split=split_of(24, seed=2),
        save=saved.append,
    )
    return saved


def test_a_long_epoch_has_checkpoints_between_its_steps() -> None:
    assert [found.step for found in checkpoints(**EVERY_STEP)] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]


@pytest.mark.parametrize(("seconds", "steps"), [(0, [4, 8]), (3600, [])])
def test_an_epoch_has_a_checkpoint_if_the_last_one_is_old_enough(
    monkeypatch: pytest.MonkeyPatch, seconds: int, steps: list[int]
) -> None:
    monkeypatch.setattr(saving, "MIN_SECONDS_BETWEEN_CHECKPOINTS", seconds)
    assert [found.step for found in checkpoints()] == steps


class Project:
    """A folder with data in which `python -m pipeline.train` trains for four epochs of twenty steps."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder = folder
        write_normalized(folder, train=320)
        self.set(**changes)

    def set(self, **changes: Any) -> None:
        values = json.loads(json.dumps(DEFAULTS))
        values["train"] |= {"epochs": 4, "batch_size": 16, "log_every_steps": 1, "cpu_threads": 1} | changes
        (self.folder / "params.yaml").write_text(dump_yaml(values))

    def start(self, *, hold: str | None = None) -> Process:
        return start_step("train", folder=self.folder, hold=hold, merge_stderr=True)

    def start_until(self, line: str) -> Process:
        """Start a training that pauses after a line until a signal arrives or `release` is called."""
        process = self.start(hold=line)
        read_until(line, process)
        return process

    def finish(self) -> str:
        """Run the command until it ends with status 0, and return its output."""
        process = self.start()
        output, _ = process.communicate()
        assert process.returncode == 0, output
        return output


@pytest.fixture
def project(workspace: Path) -> Project:
    return Project(workspace)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, mlflow_store: Path) -> tuple[str, dict[str, list[int]]]:
    return train_uninterrupted(tmp_path_factory.mktemp("whole"), mlflow_store)


def train_uninterrupted(folder: Path, mlflow_store: Path, **changes: Any) -> tuple[str, dict[str, list[int]]]:
    """Train without interruption, and return the MD5 of the model and the steps of each metric."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.copy(mlflow_store / "mlflow.db", folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        Project(folder, **changes).finish()
        return outcome()


def outcome() -> tuple[str, dict[str, list[int]]]:
    """Return the MD5 of the model and the steps of each metric in the only run, which must be finished."""
    [found] = runs()
    assert found.info.status == "FINISHED"
    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    names = [name for name in found.data.metrics if not name.startswith("system/")]
    steps = {name: [point.step for point in client.get_metric_history(found.info.run_id, name)] for name in names}
    return file_md5(MODEL), {name: sorted(values) for name, values in steps.items()}


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_writes_a_checkpoint_and_the_same_command_resumes(
    project: Project, uninterrupted: Any, sent: signal.Signals, status: int
) -> None:
    process = project.start_until("epoch 2/4")
    process.send_signal(sent)
    output, _ = process.communicate()
    assert process.returncode == status
    assert "the same command resumes from epoch" in output.splitlines()[-1]
    assert [run.info.status for run in runs()] == ["KILLED"]
    assert "resumes from its checkpoint: " in project.finish()
    assert outcome() == uninterrupted
    assert list((project.folder / ".cache/checkpoints").iterdir()) == []


def test_a_training_with_another_parameter_does_not_use_the_checkpoint(project: Project, uninterrupted: Any) -> None:
    project.set(**EVERY_STEP)
    process = project.start_until("epoch 2/4")
    process.kill()
    process.wait()
    project.set(epochs=2)
    assert "resumes from its checkpoint" not in project.finish()
    project.set()  # the interval of checkpoints is not part of the fingerprint
    assert "resumes from its checkpoint" in project.finish()
    assert file_md5(MODEL) == uninterrupted[0]


def test_the_fingerprint_depends_on_data_parameters_code_device_and_processes(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, info, cpu = train_params(), DatasetInfo.read(), torch.device("cpu")

    def fingerprint_with(**changes: Any) -> str:
        values: dict[str, Any] = {"params": params, "info": info, "device": cpu} | changes
        return fingerprint(**_determinants(**values))

    before = fingerprint_with()
    assert fingerprint_with(params=train_params(checkpoint_every_minutes=1)) == before
    others = [
        fingerprint_with(params=train_params(seed=1)),
        fingerprint_with(info=info.model_copy(update={"md5": "0"})),
    ]
    others.append(fingerprint_with(device=torch.device("cuda")))
    others.append(fingerprint_with(params=train_params(processes=2)))
    monkeypatch.setattr("pipeline.train.code_md5", lambda stage: "0")
    others.append(fingerprint_with())
    assert len({before, *others}) == 6


def test_a_training_resumes_after_a_parameter_of_another_step_changes(project: Project, uninterrupted: Any) -> None:
    project.set(**EVERY_STEP)
    process = project.start_until("epoch 2/4")
    process.kill()
    process.wait()
    text = (project.folder / "params.yaml").read_text()
    (project.folder / "params.yaml").write_text(text.replace("top_k: 5", "top_k: 3"))
    assert "resumes from its checkpoint" in project.finish()
    assert outcome() == uninterrupted


def test_a_diverged_training_stops_before_the_step_and_keeps_its_last_good_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(saving, "MIN_SECONDS_BETWEEN_CHECKPOINTS", 0)
    torch.manual_seed(0)
    classifier, saved = build(config("lenet", classes=3)), list[Checkpoint]()

    def set_nan(step: int, _loss: float, _rate: float) -> None:
        if step == 6:
            next(classifier.parameters()).data.fill_(float("nan"))

    with pytest.raises(UserError, match="epoch 2, step 7: the loss is nan"):
        train(
            classifier,
            params=train_params(**QUICK, log_every_steps=1),
            train_split=split_of(64, seed=1),
            validation_split=split_of(24, seed=2),
            on_step=set_nan,
            save=saved.append,
        )
    assert [found.step for found in saved] == [4]


def test_a_training_continues_when_its_data_are_deleted(project: Project, uninterrupted: Any) -> None:
    process = project.start_until("epoch 1/4")
    shutil.rmtree(project.folder / "artifacts/normalize")
    release(project.folder)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert outcome() == uninterrupted


def test_truncated_data_end_the_training_which_resumes_when_they_are_restored(
    project: Project, uninterrupted: Any
) -> None:
    project.set(**EVERY_STEP)
    images = project.folder / "artifacts/normalize/train_images.npy"
    content = images.read_bytes()
    process = project.start_until("epoch 1/4")
    os.truncate(images, 4096)
    release(project.folder)
    process.communicate()
    assert process.returncode == -signal.SIGBUS
    images.write_bytes(content)
    assert "resumes from its checkpoint" in project.finish()
    assert outcome() == uninterrupted


@pytest.mark.slow
def test_insufficient_memory_is_reported_in_one_line(project: Project) -> None:
    project.set(model="resnet18", batch_size=320, input_size=1024)

    def little_memory() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30))

    done = subprocess.run(
        [sys.executable, "-m", "pipeline.train"],
        cwd=project.folder,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=little_memory,
    )
    assert done.returncode == 2, done.stderr
    assert "error: train.batch_size is 320: this needs more memory than there is" in done.stderr.splitlines()[-1]
    assert [run.info.status for run in runs()] == ["FAILED"]


CLOCK_JUMPS = """
import itertools, runpy, time
now, jumps = time.time, itertools.cycle([0, -3600, 3600])
time.time = lambda: now() + next(jumps)
runpy.run_module("pipeline.train", run_name="__main__")
"""


def test_a_clock_that_jumps_back_and_forth_does_not_change_the_result(project: Project, uninterrupted: Any) -> None:
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    subprocess.run(
        [sys.executable, "-c", CLOCK_JUMPS], cwd=project.folder, env=environment, check=True, capture_output=True
    )
    assert outcome() == uninterrupted


def in_small_file_system(folder: Path, *, size: str, then: str) -> subprocess.CompletedProcess[str]:
    """Run a shell command with a file system of this size mounted at `folder`."""
    script = f'mount -t tmpfs -o size={size} tmpfs "{folder}" && {then}'
    return subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def small(project: Project) -> Callable[..., subprocess.CompletedProcess[str]]:
    (project.folder / "mnt").mkdir()
    attempt = shutil.which("unshare") and in_small_file_system(project.folder / "mnt", size="1m", then="true")
    if not attempt or attempt.returncode:
        pytest.skip("this machine does not let users mount file systems (unshare --user --mount)")
    return in_small_file_system


def test_a_disk_without_space_for_checkpoints_does_not_end_the_training(
    project: Project, uninterrupted: Any, small: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    (project.folder / ".cache").mkdir()
    project.set(**EVERY_STEP)
    done = small(project.folder / ".cache", size="300k", then=f"{sys.executable} -m pipeline.train")
    assert done.returncode == 0, done.stderr
    assert "has no checkpoint: " in done.stdout
    assert "No space left on device" in done.stdout
    assert outcome() == uninterrupted


def test_a_disk_without_space_for_the_model_is_reported_and_the_training_resumes_later(
    project: Project, uninterrupted: Any, small: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    data = project.folder / "data"
    project.set(**EVERY_STEP)
    (project.folder / "artifacts/normalize").rename(data)
    link = f'ln -s "{data}" artifacts/normalize'
    done = small(project.folder / "artifacts", size="300k", then=f"{link} && {sys.executable} -m pipeline.train")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "No space left on device" in done.stderr.splitlines()[-1]
    data.rename(project.folder / "artifacts/normalize")
    output = project.finish()
    assert "4/4 epochs done" in output
    assert outcome() == uninterrupted
