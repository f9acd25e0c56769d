"""A flow run publishes its progress in Prefect as one artifact that is updated in place."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect import get_client
from prefect.client.schemas.objects import Artifact
from prefect.client.schemas.sorting import ArtifactSort
from prefect.settings import PREFECT_API_SSL_CERT_FILE, PREFECT_API_URL, temporary_settings

from flows.live_progress import STAGES, LiveProgress, artifact_key, seconds_between_updates
from flows.ports import free_port
from flows.progress_page import DONE, Page, StageState, as_interrupted, as_line, as_markdown, format_seconds
from flows.workspace import PROGRESS
from flows.workspace_folders import FOLDER
from pipeline.core.stage_code import stage_names
from pipeline.core.step_progress import EpochProgress, StepProgress, TrainingProgress
from tests import test_flows
from tests.conftest import PROJECT
from tests.test_flows import start_run_until

project = test_flows.project  # pytest finds a fixture by its name in the module
run_here = test_flows.run_here

BAR = "█"
EPOCH = EpochProgress(2, 0.41, 0.88, 0.39, 0.9025, 3200.0)
BEST = EpochProgress(1, 0.61, 0.8, 0.37, 0.95, 3100.0)
TRAINING = TrainingProgress(20, may_end_early=False, epochs_done=2, last=EPOCH, best=BEST)
STEP = StepProgress("epoch 3", 40, 63, "steps", fraction=0.5, seconds_elapsed=70, seconds_left=134, training=TRAINING)
RUNNING = [StageState("download", DONE, 1), StageState("normalize", DONE, 2), StageState("train", "running", start=5)]


def artifacts() -> list[Artifact]:
    """Return the progress artifacts of the server, the newest first."""
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(sort=ArtifactSort.CREATED_DESC)
    return [artifact for artifact in found if artifact.key == "digits-progress"]


def wait_for(text: str, *, known: set[Any]) -> Artifact:
    """Return the artifact of a new flow run once it has the text; pytest's timeout ends a test that hangs."""
    while not (found := [each for each in artifacts() if each.id not in known and text in str(each.data)]):
        time.sleep(0.2)
    return found[0]


def test_one_artifact_is_updated_while_a_step_prints_nothing_until_the_run_is_finished(
    project: Path, api_url: str
) -> None:
    known = {artifact.id for artifact in artifacts()}
    process = start_run_until("normalize", project=project, api_url=api_url)
    [folder] = [path for path in (project / FOLDER).iterdir() if path.is_dir()]
    for done in (12_000, 24_000):
        values = {"title": "normalize", "done": done, "total": 50_000, "unit": "images", "fraction": done / 50_000}
        (folder / PROGRESS).write_text(json.dumps(values))
        updated = wait_for(f"normalize: {done:,} of 50,000 images", known=known)
    assert str(updated.description).endswith("normalize · 48%")
    (project.parent / "normalize.wait").unlink()
    process.communicate()
    [last] = [artifact for artifact in artifacts() if artifact.id not in known]
    assert last.id == updated.id
    assert str(last.flow_run_id) == folder.name
    assert str(last.data).startswith("## Finished after ")
    assert BAR not in str(last.data)


def test_a_failed_run_shows_no_bar_but_its_error(project: Path, run_here: Callable[[], Any]) -> None:
    (project.parent / "train.exit").write_text("2")
    known = {artifact.id for artifact in artifacts()}
    run_here()
    [artifact] = [each for each in artifacts() if each.id not in known]
    text = str(artifact.data)
    assert artifact.description == "Failed in train: train.device is 'cuda'; allowed: cpu"
    assert text.startswith("## Failed after ")
    assert "train: train.device is 'cuda'; allowed: cpu" in text
    assert [state in text for state in ("| train | failed |", "| evaluate | not run |")] == [True, True]
    assert BAR not in text


def test_a_terminated_run_is_shown_as_interrupted(project: Path, api_url: str) -> None:
    known = {artifact.id for artifact in artifacts()}
    process = start_run_until("normalize", project=project, api_url=api_url)
    process.terminate()
    process.communicate()
    assert "| normalize | interrupted |" in str(wait_for("## Interrupted after ", known=known).data)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_client_that_cannot_be_opened_fails_no_run(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.pem")
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_API_SSL_CERT_FILE: missing}),
        LiveProgress(tmp_path / "progress.json", recipe="digits", flow_run_id="0" * 32) as live,
        live.stage("train"),
    ):
        pass
    assert not live._thread.is_alive()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_server_that_does_not_answer_fails_no_run(tmp_path: Path, error: type[BaseException]) -> None:
    url = f"http://127.0.0.1:{free_port()}/api"
    with temporary_settings({PREFECT_API_URL: url}), pytest.raises(error):  # noqa: SIM117
        with (
            LiveProgress(tmp_path / "progress.json", recipe="digits", flow_run_id="0" * 32) as live,
            live.stage("train"),
        ):
            raise error
    assert not live._thread.is_alive()


def test_a_running_training_is_shown_with_epoch_bar_losses_and_time_left() -> None:
    text = as_markdown(Page("running", RUNNING, progress=STEP, training=TRAINING), elapsed=143)
    assert text.startswith("## Running: train, epoch 3 of 20\n")
    assert f"`{BAR * 15}{'░' * 15}` **50%** · 2 min 10 s left · 1 min 10 s so far · 3,200 images/s" in text
    assert "epoch 3: 40 of 63 steps" in text
    assert "| train, epoch 2 | 0.4100 | 88.00% |\n| validation, epoch 2 | 0.3900 | **90.25%** |" in text
    assert "| best validation, epoch 1 | 0.3700 | 95.00% |" in text
    assert "| train | running | 2 min 18 s |" in text
    assert "As of 2 min 23 s after the start; reload the page" in text


def test_the_progress_of_a_killed_run_is_shown_as_interrupted_without_a_bar() -> None:
    running = as_markdown(Page("running", RUNNING, progress=STEP, training=TRAINING), elapsed=143)
    killed = as_interrupted(running)
    assert killed.startswith("## Interrupted in train, epoch 3 of 20\n")
    assert BAR not in killed
    assert "| train | interrupted | 2 min 18 s |" in killed
    assert killed.endswith("As of 2 min 23 s after the start\n")
    assert as_interrupted(killed) == killed


def test_the_line_begins_with_what_the_flow_runs_page_has_space_for() -> None:
    early = TrainingProgress(20, may_end_early=True, epochs_done=2, last=EPOCH, best=BEST)
    for training, left in ((TRAINING, "2 min 10 s left"), (early, "≤ 2 min 10 s left")):
        progress = StepProgress("epoch 3", 4, 6, "steps", fraction=0.5, seconds_left=134, training=training)
        line = as_line(Page("running", RUNNING, progress=progress, training=training))
        assert line == f"{left} · epoch 3/20 · 90.2% validation accuracy"
        assert "90.2%" in line[:40]


def test_an_unknown_total_or_time_left_is_not_guessed() -> None:
    fetching = StepProgress("fetching", 12_000_000, None, "B")
    text = as_markdown(Page("running", [StageState("download", "running")], progress=fetching), elapsed=0)
    assert "fetching: 12.0MB\n" in text
    assert "time left not known yet" in as_markdown(
        Page("running", RUNNING, progress=StepProgress("epoch 1", 0, 9, "steps", fraction=0.0)), elapsed=0
    )


def test_a_long_run_is_updated_less_often() -> None:
    assert [seconds_between_updates(seconds) for seconds in (1, 200, 1000, 86_400)] == [2, 2, 10, 30]


def test_each_recipe_has_a_key_that_prefect_accepts() -> None:
    keys = [artifact_key(path.stem, "progress") for path in (PROJECT / "recipes").glob("*.yaml")]
    assert artifact_key("cifar10_lenet", "progress") == "cifar10-lenet-progress"
    assert len(set(keys)) == len(keys)
    assert all(set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for key in keys)


def test_the_page_lists_the_stages_of_a_flow_run() -> None:
    assert list(STAGES) == list(stage_names())[: len(STAGES)]


@pytest.mark.parametrize(
    ("seconds", "text"), [(45.4, "45 s"), (59.6, "1 min"), (130, "2 min 10 s"), (3600, "1 h"), (11_130, "3 h 5 min")]
)
def test_durations_have_at_most_two_units(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
