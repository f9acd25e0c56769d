"""Pages in a real browser: the report, and MLflow's pages of two runs; skipped where Chromium is not installed."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from flows.ports import free_port
from flows.ui import _address, mlflow_server
from pipeline.tracking.links import EXPERIMENTS_PAGE, MODE, run_page, runs_page
from tests.browser import Page, needs_chromium, open_browser
from tests.conftest import PROJECT, run_step, start_repository, write_normalized
from tests.report_page import write_artifacts

pytestmark = [pytest.mark.slow, needs_chromium]


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with open_browser() as page:
        yield page


@pytest.fixture(scope="module", params=[2, 100])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, mlflow_store: Path) -> Path:
    """Return the report of a model of 2 or 100 classes with awkward names."""
    folder = tmp_path_factory.mktemp(f"classes{request.param}")
    shutil.copy(mlflow_store / "mlflow.db", folder)
    shutil.copy(PROJECT / "params.yaml", folder)
    write_artifacts(folder, classes=request.param, size=64, channels=3)
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    done = run_step("evaluate", folder=folder, environment=environment)
    assert "report file://" in done.stdout, done.stdout
    return folder / "artifacts/report.html"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1280])
def test_the_report_fits_the_window_and_requests_nothing(browser: Page, report: Path, width: int, dark: bool) -> None:
    browser.requested.clear()
    browser.open(report.as_uri(), width=width, dark=dark)
    assert browser.value_of("document.documentElement.scrollWidth") <= width
    assert {url for url in browser.requested if not url.startswith("data:")} == {report.as_uri()}
    broken = "[...document.images].filter(image => !image.complete || !image.naturalWidth).length"
    assert browser.value_of("document.images.length") > 10
    assert browser.value_of(broken) == 0


def brightness(page: Page) -> float:
    """Return the mean of the background's color channels, from 0 to 255."""
    color = page.value_of("getComputedStyle(document.body).backgroundColor")
    return sum(map(float, color.strip("rgba()").split(",")[:3])) / 3


def test_the_report_follows_the_color_scheme_of_the_system(browser: Page, report: Path) -> None:
    browser.open(report.as_uri(), dark=False)
    light = brightness(browser)
    browser.open(report.as_uri(), dark=True)
    assert (brightness(browser) < 60, light > 200) == (True, True)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, mlflow_store: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve the store of two trainings with other learning rates; yield the address and the ids of the runs."""
    folder = tmp_path_factory.mktemp("served")
    write_normalized(folder)
    shutil.copytree(PROJECT / "recipes", folder / "recipes")
    text = (PROJECT / "params.yaml").read_text().replace("epochs: 20", "epochs: 2")
    (folder / "params.yaml").write_text(text)
    start_repository(folder, "params.yaml")
    shutil.copy(mlflow_store / "mlflow.db", folder)
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    for rate in ("0.05", "0.03"):
        (folder / "params.yaml").write_text(text.replace("learning_rate: 0.05", f"learning_rate: {rate}"))
        for step in ("train", "evaluate"):
            done = run_step(step, folder=folder, environment=environment | {"PIPELINE_FLOW_RUN_ID": ""})
            assert done.returncode == 0, done.stderr
    runs = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db").search_runs(["1"])
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with mlflow_server(folder, port=free_port()) as address:
            yield address, [run.info.run_id for run in runs]


def test_the_compare_page_opens_on_the_validation_accuracy(browser: Page, served: tuple[str, list[str]]) -> None:
    address, runs = served
    browser.open(f'{address}/#/compare-runs?runs={json.dumps(runs)}&experiments=["1"]&{MODE}')
    browser.wait_for("document.body.innerText.includes('Run details')")
    visible = browser.text().partition("Run details")[0]
    assert "validation/accuracy" in visible
    assert "train.learning_rate" in visible
    assert "system/" not in visible


def test_the_table_of_runs_shows_names_and_metrics(browser: Page, served: tuple[str, list[str]]) -> None:
    browser.open(_address(served[0], runs_page("1")))
    browser.wait_for("document.body.innerText.includes('digits lr=0.03')")
    assert "test/accuracy" in browser.text()
    assert "Model training" in browser.text()


def test_a_runs_page_opens_for_the_training_of_models(browser: Page, served: tuple[str, list[str]]) -> None:
    browser.open(_address(served[0], run_page(served[1][0], experiment_id="1")))
    browser.wait_for("document.body.innerText.includes('Test accuracy')")
    assert MODE in browser.value_of("location.href")
    assert "digits lr=0.03" in browser.text()


def test_the_list_of_experiments_opens_for_the_training_of_models(browser: Page, served: tuple[str, list[str]]) -> None:
    browser.open(_address(served[0], EXPERIMENTS_PAGE))
    browser.wait_for("[...document.querySelectorAll('a')].some(link => link.innerText == 'images')")
    assert MODE in browser.value_of("location.href")
