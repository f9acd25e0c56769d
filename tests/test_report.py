"""The report: every figure is recomputed from the predictions, nothing is requested, no name injects anything."""

import itertools
import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import balanced_accuracy_score, log_loss, precision_recall_fscore_support

from pipeline import report
from pipeline.artifacts import file_md5
from pipeline.core import report_command
from pipeline.core.errors import UserError
from pipeline.core.git import CodeState
from pipeline.core.settings import get_settings
from pipeline.reporting.baseline import Baseline, compare
from pipeline.reporting.data import read_content
from pipeline.reporting.facts import RunFacts
from pipeline.reporting.model import describe_model
from pipeline.reporting.page import Report, render
from pipeline.tracking.provenance import NOTE
from pipeline.tracking.provenance_file import Provenance, provenance_of
from pipeline.tracking.run_title import RunSetup
from pipeline.tracking.runs import find_or_create_run
from pipeline.tracking.search import find_run, find_runs
from pipeline.tracking.store import connect
from tests.conftest import PROJECT, make_once, run_step
from tests.report_page import HOSTILE_NAMES, THRESHOLDS, Page, write_artifacts

SIZES = {"few": {"classes": 3, "size": 32, "channels": 1}, "many": {"classes": 100, "size": 128, "channels": 3}}
HOSTILE = "\"><script>alert('x')</script>{{ 7*7 }}"
RUN = Provenance(
    HOSTILE,
    name=HOSTILE,
    commit=HOSTILE,
    is_dirty="false",
    seconds=7200.0,
    hardware={"gpu": HOSTILE, "cpu": HOSTILE},
    page=HOSTILE,
    experiment=HOSTILE,
    flow_run_name=HOSTILE,
    has_report=False,
)
SETUP = RunSetup(HOSTILE, HOSTILE, {"train.model": (HOSTILE, HOSTILE)})


def make_folder(folder: Path, *, classes: int, size: int, channels: int, store: Path) -> None:
    (folder / "mlflow.db").write_bytes((store / "mlflow.db").read_bytes())
    (folder / "params.yaml").write_text((PROJECT / "params.yaml").read_text())
    write_artifacts(folder, classes=classes, size=size, channels=channels)
    uri = f"sqlite:///{folder}/mlflow.db"
    environment = {"MLFLOW_TRACKING_URI": uri, "PIPELINE_FLOW_RUN_ID": "", "PATH": "/usr/bin:/bin"}
    done = run_step("evaluate", folder=folder, environment=environment)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module", params=SIZES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, mlflow_store: Path) -> Path:
    """Return a folder with the files of all steps, for few and for many classes with awkward names."""
    sizes = SIZES[request.param]
    return make_once(
        f"report_{request.param}",
        lambda target: make_folder(target, **sizes, store=mlflow_store),
        factory=tmp_path_factory,
    )


@pytest.fixture(scope="module")
def made(folder: Path) -> Report:
    """Return the content of a report with hostile facts about the run."""
    link = 'https://x.example/"><script>'
    facts = RunFacts(RUN, "javascript:alert(1)", HOSTILE, SETUP, CodeState(HOSTILE, b""), HOSTILE, HOSTILE, link, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/missing.db")
        get_settings.cache_clear()
        content = report.collect(seconds={})
    return replace(content, facts=facts)


@pytest.fixture(scope="module")
def page(made: Report) -> Page:
    return Page(render(made))


def wilson(successes: float, number: float) -> tuple[float, float]:
    """Solve (s / n - p)^2 = z^2 p (1 - p) / n for p."""
    z, fraction = 1.959963984540054, successes / number
    low, high = sorted(np.roots([1 + z * z / number, -2 * fraction - z * z / number, fraction**2]).real)
    return low, high


def with_interval(name: str, suffix: str, value: float, interval: tuple[float, float]) -> dict[str, float]:
    return {f"{name}{suffix}": value, f"{name}_low{suffix}": interval[0], f"{name}_high{suffix}": interval[1]}


def class_figures(actual: Any, predicted: Any, names: list[str]) -> dict[str, float]:
    """Return the figures of each class, by scikit-learn, with their intervals."""
    labels, found = range(len(names)), dict[str, float]()
    precision, recall, f1, images = precision_recall_fscore_support(actual, predicted, labels=labels, zero_division=0)
    for index, name in enumerate(names):
        correct = int(((actual == index) & (predicted == index)).sum())
        involved = int(((actual == index) | (predicted == index)).sum())
        low, high = wilson(correct, involved)
        found[f"images/{name}"] = images[index]
        found |= with_interval("recall", f"/{name}", recall[index], wilson(correct, images[index]))
        found |= with_interval("f1", f"/{name}", f1[index], (2 * low / (1 + low), 2 * high / (1 + high)))
        if number := int((predicted == index).sum()):
            found |= with_interval("precision", f"/{name}", precision[index], wilson(correct, number))
        for other, other_name in enumerate(names):
            count = int(((actual == index) & (predicted == other)).sum())
            found[f"confusion/{name}/{other_name}"] = count
            found[f"confusion_fraction/{name}/{other_name}"] = count / images[index]
    return found


def coverage_figures(confidence: Any, correct: Any) -> dict[str, float]:
    """Return the figures of each threshold of the model, and those of the text, which are of the last threshold."""
    found = dict[str, float]()
    for stated, threshold in THRESHOLDS.items():
        reported = confidence >= threshold
        number, suffix = int(reported.sum()), f"/{stated}"
        found |= {f"threshold{suffix}": threshold, f"reported{suffix}": number}
        found |= with_interval("coverage", suffix, reported.mean(), wilson(number, len(confidence)))
        if number:
            interval = wilson(correct[reported].sum(), number)
            found |= with_interval("reported_accuracy", suffix, correct[reported].mean(), interval)
    last = {name: found[f"reported_{name}/0.95"] for name in ("accuracy", "accuracy_low", "accuracy_high")}
    return found | {f"typical/{name}": value for name, value in (last | {"coverage": found["coverage/0.95"]}).items()}


def calibration_error(probabilities: Any, actual: Any, predicted: Any) -> float:
    """Return the error over 15 bins of equal width (low, high], bin by bin."""
    confidence = probabilities[np.arange(len(actual)), predicted].astype(float)
    edges, error = np.linspace(0, 1, 16), 0.0
    for low, high in itertools.pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            error += inside.mean() * abs((actual == predicted)[inside].mean() - confidence[inside].mean())
    return error


def expected_figures(folder: Path) -> dict[str, float]:
    """Recompute the figures of a page from the Parquet file, and counts from the arrays and `dataset.json`."""
    table = pq.read_table(folder / "artifacts/evaluate/predictions.parquet")
    names = json.loads(table.schema.metadata[b"class_names"])
    actual, predicted = (
        np.array([names.index(each) for each in table[c].to_pylist()]) for c in ("actual", "predicted")
    )
    raw, calibrated = (np.array(table[c].to_pylist()) for c in ("probabilities", "calibrated_probabilities"))
    correct, unique = actual == predicted, ~np.isin(np.arange(len(actual)), [0, 3])
    ranks = (raw > raw[np.arange(len(actual)), actual][:, None]).sum(1)
    ratios = [np.log(each[:, 0] / each[:, 1]) for each in (raw, calibrated)]
    found = with_interval("accuracy", "", correct.mean(), wilson(correct.sum(), len(actual)))
    found |= class_figures(actual, predicted, names)
    found |= {
        "test_images": len(actual),
        "mistakes": int((~correct).sum()),
        "balanced_accuracy": balanced_accuracy_score(actual, predicted),
        "macro_f1": float(np.mean([found[f"f1/{name}"] for name in names])),
        "top_5_accuracy": (ranks < 5).mean(),
        "loss": log_loss(actual, raw, labels=range(len(names))),
        "ece/raw": calibration_error(raw, actual, predicted),
        "ece/calibrated": calibration_error(calibrated, actual, predicted),
        "temperature": float(np.median(ratios[0] / ratios[1])),
        "test_duplicates": 2,
        "accuracy_without_duplicates": correct[unique].mean(),
        "duplicates/within": 3,
        "duplicates/across": 3,
        "duplicates/near": 4,
        "unreadable_files": 1,
        "ignored_files": 2,
        "selected_epoch": 3,
        "validation_accuracy": 0.3,
    }
    confidence = calibrated[np.arange(len(actual)), predicted].astype(float)
    found |= coverage_figures(confidence, correct)
    sure = confidence >= 0.9
    found |= {"sure/images": int(sure.sum()), "confidence_excess": confidence.mean() - correct.mean()}
    if sure.any():
        found |= {"sure/correct": int(correct[sure].sum()), "sure/accuracy": correct[sure].mean()}
    found |= {f"probability/{i}": calibrated[i, predicted[i]] for i in range(len(actual))}
    for split in ("train", "validation", "test"):
        labels = np.load(folder / f"artifacts/normalize/{split}_labels.npy")
        found[f"count/{split}"] = len(labels)
        found |= {f"count/{split}/{name}": int((labels == index).sum()) for index, name in enumerate(names)}
    return found


def test_every_figure_on_the_page_is_recomputed_from_the_predictions(folder: Path, page: Page) -> None:
    expected = expected_figures(folder)
    # a page escapes characters that turn the direction of text
    expected = {name.replace("\u202e", "\\u202e"): value for name, value in expected.items()}
    assert len(page.metrics) > 80
    for name, value in page.metrics:
        assert value == pytest.approx(expected[name], rel=1e-5, abs=2e-6), name


def test_no_figure_is_missing(folder: Path, page: Page) -> None:
    shown = {name for name, _ in page.metrics}
    missing = {name.replace("\u202e", "\\u202e") for name in expected_figures(folder)} - shown
    optional = ("confusion", "probability/", "top_5_accuracy")
    assert not [name for name in missing if not name.startswith(optional)]
    assert any(name.startswith("probability/") for name in shown)


@pytest.mark.parametrize("accuracy", [0.0, 0.05, 1.0])
def test_the_figures_of_the_baseline_are_recomputed(accuracy: float, folder: Path, made: Report) -> None:
    expected, number = expected_figures(folder), 1000
    baseline = Baseline(compare(made.content.metrics, accuracy=accuracy, number=number, commit="c"))
    shown = dict(Page(render(replace(made, baseline=baseline))).metrics)
    own, low, high = (expected[name] for name in ("accuracy", "accuracy_low", "accuracy_high"))
    base_low, base_high = wilson(accuracy * number, number)
    difference = own - accuracy
    lowest = difference - ((own - low) ** 2 + (base_high - accuracy) ** 2) ** 0.5
    highest = difference + ((high - own) ** 2 + (accuracy - base_low) ** 2) ** 0.5
    found = with_interval("baseline/difference", "", difference, (lowest, highest)) | {"baseline/accuracy": accuracy}
    assert {name: shown[name] for name in found} == pytest.approx(found, abs=2e-6)


def test_the_page_requests_nothing_and_its_policy_forbids_scripts(page: Page) -> None:
    page.check_requests_nothing()


def test_pictures_have_a_text_alternative_and_links_a_target(page: Page) -> None:
    assert len(page.all("img")) > 20
    page.check_links_and_alternatives()


def test_names_from_outside_are_text_and_nothing_else(made: Report, page: Page) -> None:
    assert HOSTILE in page.text
    for name in HOSTILE_NAMES[: len(made.content.info.class_names)]:
        assert name.replace("\u202e", "\\u202e") in page.text
    assert "{{ 7*7 }}" in page.text
    assert "javascript:" not in page.html
    assert "\x1b" not in page.html
    assert {each["href"] for each in page.all("a") if not str(each["href"]).startswith("#")} == {
        'https://x.example/"><script>'
    }


def test_the_page_of_100_classes_is_small_and_soon_made(made: Report) -> None:
    start = time.process_time()
    size = len(render(made).encode())
    assert size <= 3_000_000
    assert time.process_time() - start < 5


def test_what_is_unknown_is_shown_as_unknown(made: Report) -> None:
    text = Page(render(replace(made, facts=RunFacts(problem="no <such> file")))).text
    cost = text[text.rindex("\nCost\n") :]
    assert "MLflow run\nunknown" in re.sub(r"(?<=run)(?=unknown)", "\n", cost)
    assert "MLflow could not be asked: no <such> file" in text
    assert cost.count("unknown") >= 12


def test_a_model_without_thresholds_and_few_images_are_stated_as_such(made: Report) -> None:
    config = made.model.config.model_copy(update={"thresholds": None})
    without = Page(render(replace(made, model=replace(made.model, config=config)))).text
    assert "The model has no thresholds, since an earlier version trained it; dvc repro train" in without
    assert "--coverage" not in without
    text, is_few = Page(render(made)).text, len(made.content.predictions) < 100
    assert "Use a threshold by python -m pipeline.predict --coverage 0.95 PATHS…" in text
    assert ("There are only 13 test images" in text, "There are only 3 validation images" in text) == (is_few, is_few)


@pytest.mark.parametrize(("md5", "found"), [("b" * 32, "b" * 32), (None, "unknown")])
def test_predictions_of_other_or_unknown_weights_are_refused(
    folder: Path, made: Report, monkeypatch: pytest.MonkeyPatch, md5: str | None, found: str
) -> None:
    monkeypatch.chdir(folder)
    predictions = replace(made.content.predictions, weights_md5=md5)
    with pytest.raises(UserError, match=f"of MD5 {found}; allowed: those of .*{made.model.md5}; run `dvc repro evalu"):
        describe_model(made.params, made.content.info, images=made.content.test_images, predictions=predictions)


METRICS = {"accuracy": 0.9, "accuracy_low": 0.84, "accuracy_high": 0.94, "loss": 0.3, "test_images": 150}


@pytest.mark.parametrize(
    ("accuracy", "words"),
    [
        (0.88, ["; the difference from the committed baseline of 88.0 % is within what chance explains: +2.0 points"]),
        (
            0.2,
            [", 70.0 points above the committed baseline of 20.0 %", "difference: 63.5 to 74.6 points above)."],
        ),
        (
            1.0,
            [", 10.0 points below the committed baseline of 100.0 %", "difference: 6.0 to 16.0 points below)."],
        ),
    ],
)
def test_a_difference_is_stated_as_such_only_if_the_interval_shows_it(
    accuracy: float, words: list[str], made: Report
) -> None:
    content = replace(made.content, metrics={**made.content.metrics, **METRICS})
    baseline = Baseline(compare(METRICS, accuracy=accuracy, number=1000, commit="c"))
    verdict = Page(render(replace(made, content=content, baseline=baseline))).text.replace("\u00a0", " ")
    assert all(part in verdict for part in words)


def test_without_duplicates_one_sentence_says_so(made: Report) -> None:
    none_exact = {"within": {"train": 0}, "across": {"train-test": 0}, "examples": []}
    dataset = {
        "exact_duplicates": none_exact,
        "near_duplicates": {"correlation": 0.9, "test_images_with_one_in_train": 0},
    }
    content = replace(
        made.content,
        dataset={**made.content.dataset, **dataset},
        metrics={**made.content.metrics, "test_duplicates": 0},
    )
    text = Page(render(replace(made, content=content))).text
    assert text.count("No duplicates were found") == 1
    assert "accuracy without them" not in text


def test_metrics_of_other_predictions_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder / "artifacts", tmp_path / "artifacts")
    path = tmp_path / "artifacts/evaluate/metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"accuracy": 0.123}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"metrics\.json: not of the predictions in "):
        read_content()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("evaluate/metrics.json", "{}"),
        ("evaluate/metrics.json", "[]"),
        ("evaluate/calibration.json", '{"temperature": 1.0}'),
        ("evaluate/per_class.csv", "class,images\ncat,3\n"),
        ("train/history.csv", "epoch,train_loss\n1,0.5\n"),
        ("download/source.json", "[]"),
    ],
)
def test_a_file_of_an_earlier_version_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str
) -> None:
    shutil.copytree(folder / "artifacts", tmp_path / "artifacts")
    (tmp_path / "artifacts/download").mkdir(exist_ok=True)
    (tmp_path / "artifacts" / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"artifacts/{re.escape(name)}: lacks .*run `dvc repro`"):
        read_content()


@pytest.mark.parametrize(
    ("current", "has_report", "expected"), [("mine", True, True), ("other", False, True), ("other", True, False)]
)
def test_a_flow_run_with_a_cache_hit_keeps_the_page_of_the_run(
    monkeypatch: pytest.MonkeyPatch, current: str, has_report: bool, expected: bool
) -> None:
    monkeypatch.setenv("PIPELINE_EXPERIMENT", current)
    get_settings.cache_clear()
    assert report._is_its_page(replace(RUN, experiment="mine", has_report=has_report)) is expected


def test_gpu_hours_are_of_all_processes_and_unknown_without_a_record() -> None:
    assert RunFacts(RUN).gpu_hours(processes=2) == 4
    assert RunFacts(replace(RUN, hardware={"gpu": "none"})).gpu_hours(processes=2) == 0
    assert RunFacts().gpu_hours(processes=1) is None


@pytest.mark.parametrize("value", ["train", "train=x", "train=-1", "train=inf", "trian=1"])
def test_a_wrong_duration_is_refused(value: str) -> None:
    with pytest.raises(UserError, match="--seconds: found"):
        report.parse_seconds([value])


def test_a_missing_store_is_unknown_and_is_not_created(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    facts = report.collect(seconds={}).facts
    assert facts.recorded is None
    assert "none.db: no such file" in facts.problem
    assert not (tmp_path / "none.db").exists()


def test_a_failing_report_is_a_warning_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    monkeypatch.delenv("PIPELINE_FLOW_RUN_ID", raising=False)
    report_command.make_report()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("warning: the report was not made: params.yaml: ")
    assert lines[0].endswith("`.venv/bin/python -m pipeline.report` tries it again")


def test_a_report_that_is_not_in_mlflow_is_a_warning_of_the_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PIPELINE_FLOW_RUN_ID", raising=False)
    get_settings.cache_clear()
    code = "import sys; print('report x'); print('noise\\nwarning: the report is not in MLflow: y', file=sys.stderr)"
    monkeypatch.setattr(report_command, "COMMAND", ("-c", code))
    report_command.make_report()
    assert capsys.readouterr().out == "report x\nwarning: the report is not in MLflow: y\n"


def test_of_a_run_without_a_training_only_the_evaluation_is_known(made: Report, workspace: Path) -> None:
    run, _ = find_or_create_run("0" * 32, experiment="digits")
    found = find_run(run.run_id)
    assert found
    recorded = provenance_of(found)
    facts = RunFacts(recorded, experiment=recorded.experiment, flow_run_name=recorded.flow_run_name)
    html = render(replace(made, facts=facts))
    for name in ("train", "commit of the run", "uncommitted changes of the code", "flow run", "DVC experiment"):
        assert re.search(rf"<dt>{name}</dt><dd>(<bdi>)?unknown<", html), name


@pytest.mark.slow
def test_the_step_evaluate_makes_the_report_and_records_it(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_artifacts(workspace, classes=3, size=32, channels=1)
    done = run_step("evaluate")
    assert (done.returncode, done.stderr) == (0, "")
    path = workspace / "artifacts/report.html"
    assert f"report {path.as_uri()}\n" in done.stdout
    assert "MLflow run</dt><dd>unknown" not in path.read_text()
    recorded = list((workspace / "mlartifacts").rglob("report.html"))
    assert [each.read_bytes() for each in recorded] == [path.read_bytes()]
    connect()
    [run] = find_runs({"model.md5": file_md5(workspace / "artifacts/train/best.safetensors")})
    assert f"/runs/{run.run_id}/artifacts/report.html?workflowType=" in run.tags[NOTE]
