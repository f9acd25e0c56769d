import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
import requests
from safetensors.torch import load_file, save_file

from flows.ports import free_port
from pipeline.arrays import DatasetInfo
from pipeline.artifacts import TRAIN, file_md5, read_csv, read_json, read_split, replace_folder, verify, write_csv
from pipeline.core.errors import TemporaryError, UserError
from pipeline.core.yaml import dump_yaml
from pipeline.models.files import load_config, load_model
from pipeline.tracking import model_code
from pipeline.tracking.logger import RunLogger
from pipeline.tracking.model_files import find_model_files
from pipeline.tracking.models import SERVED_PACKAGES, fetch_model, log_model
from pipeline.tracking.provenance import selected_epoch_values
from pipeline.tracking.provenance_file import read_provenance
from pipeline.tracking.runs import find_or_create_run
from pipeline.tracking.store import connect
from tests.conftest import DEFAULTS, PROJECT, colored_images, run_step, start_repository, write_normalized
from tests.test_architecture import MODULES, imports, reached


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, mlflow_store: Path) -> Path:
    """Run train and evaluate in a git repository with an uncommitted change, and return its folder."""
    folder = tmp_path_factory.mktemp("trained")
    write_normalized(folder)
    text = (
        (PROJECT / "params.yaml")
        .read_text()
        .replace("epochs: 20", "epochs: 2")
        .replace("log_every_steps: 20", "log_every_steps: 2")
    )
    (folder / "params.yaml").write_text("")
    (folder / "flows").mkdir()
    (folder / "flows/notes.txt").write_text("")
    start_repository(folder, "params.yaml", "flows/notes.txt")
    (folder / "params.yaml").write_text(text)
    (folder / "flows/notes.txt").write_bytes(b"caf\xe9\n")
    shutil.copy(mlflow_store / "mlflow.db", folder)
    environment = os.environ | {"PIPELINE_EXPERIMENT": "bold-name", "PIPELINE_FLOW_RUN_ID": "f-1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    for step in ("train", "evaluate"):
        done = run_step(step, folder=folder, environment=environment)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return folder


@pytest.fixture
def store(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{trained}/mlflow.db")
    return trained


def only_run() -> mlflow.entities.Run:
    connect()
    runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert len(runs) == 1
    return runs[0]


def test_a_run_has_parameters_losses_and_test_metrics(store: Path) -> None:
    run = only_run()
    assert run.info.status == "FINISHED"
    assert (run.data.params["train.epochs"], run.data.params["download.dataset"]) == ("2", "digits")
    wanted = {
        "step/loss",
        "step/learning_rate",
        "train/loss",
        "train/accuracy",
        "validation/accuracy",
        "validation/loss",
        "validation/macro_f1",
        "selected/epoch",
        "selected/validation_accuracy",
        "speed/images_per_second",
        "test/accuracy",
        "test/accuracy_without_duplicates",
        "test/balanced_accuracy",
        "test/expected_calibration_error",
        "test/expected_calibration_error_calibrated",
        "test/loss",
        "test/macro_f1",
    }
    assert {name for name in run.data.metrics if not name.startswith("system/")} == wanted


def test_the_first_metric_is_the_accuracy_before_the_training(store: Path) -> None:
    run = only_run()
    assert next(iter(run.data.metrics)) == "validation/accuracy"
    accuracies = mlflow.MlflowClient().get_metric_history(run.info.run_id, "validation/accuracy")
    assert min(accuracies, key=lambda point: point.step).step == 0
    assert [row["epoch"] for row in read_csv(Path("artifacts/train/history.csv"))] == ["1", "2"]


def test_losses_are_recorded_by_step_and_by_epoch(store: Path) -> None:
    client, run_id = mlflow.MlflowClient(), only_run().info.run_id
    assert [point.step for point in client.get_metric_history(run_id, "step/loss")] == [2, 4, 6]
    assert [point.step for point in client.get_metric_history(run_id, "validation/loss")] == [0, 1, 2]


def test_tags_and_provenance_name_code_data_experiment_and_flow_run(store: Path) -> None:
    tags, values = only_run().data.tags, read_provenance(only_run().info.run_id)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert (tags["mlflow.source.git.commit"], tags["git.dirty"]) == (head, "true")
    assert (tags["dvc.experiment"], tags["prefect.flow_run_id"]) == ("bold-name", "f-1")
    assert values["data.md5"] == DatasetInfo.read().md5
    assert tags["model.md5"] == file_md5(Path("artifacts/train/best.safetensors"))


def test_a_finished_run_has_few_tags_and_a_description_with_its_result(store: Path) -> None:
    run = only_run()
    visible = [name for name in run.data.tags if not name.startswith("mlflow.")]
    assert sorted(visible) == ["dvc.experiment", "git.dirty", "model.md5", "prefect.flow_run_id"]
    accuracy = read_json(Path("artifacts/evaluate/metrics.json"))["accuracy"]
    text = run.data.tags["mlflow.note.content"]
    assert text.startswith(f"**Test accuracy {accuracy:.2%}** (95% interval ")
    assert "report" not in text  # none was made, as the process believes to be in the clone of a flow run
    assert "`dvc exp apply bold-name`" in text


def test_provenance_has_the_hashes_of_all_outputs_in_sections(store: Path) -> None:
    content = json.loads(mlflow.artifacts.load_text(f"runs:/{only_run().info.run_id}/provenance.json"))
    assert content["outputs"]["train"]["history.csv"] == file_md5(Path("artifacts/train/history.csv"))
    assert content["outputs"]["evaluate"]["metrics.json"] == file_md5(Path("artifacts/evaluate/metrics.json"))
    assert content["git"]["changed"] == ["flows/notes.txt", "params.yaml"]
    assert set(content["hardware"]) == {"cpu", "cpu_kernels", "gpu", "threads"}


def test_uncommitted_changes_and_package_versions_are_stored_with_the_run(store: Path) -> None:
    run_id = only_run().info.run_id
    difference = Path(mlflow.artifacts.download_artifacts(f"runs:/{run_id}/uncommitted.diff")).read_bytes()
    assert b"+  model: lenet" in difference
    assert b"+caf\xe9" in difference
    assert "\ntorch==" in mlflow.artifacts.load_text(f"runs:/{run_id}/packages.txt")


def test_the_data_set_is_recorded_with_its_digest(store: Path) -> None:
    (dataset_input,) = only_run().inputs.dataset_inputs  # type: ignore[union-attr]
    assert (dataset_input.dataset.name, dataset_input.dataset.digest) == ("imagefolder", DatasetInfo.read().md5)


def test_the_table_of_runs_has_a_view_with_columns_of_metrics(store: Path) -> None:
    experiment = mlflow.MlflowClient().get_experiment(only_run().info.experiment_id)
    columns = json.loads(experiment.tags["mlflow.sharedViewState.results"])["selectedColumns"]
    assert columns[:2] == ["metrics.`selected/validation_accuracy`", "metrics.`test/accuracy`"]
    assert {column.split("`")[1] for column in columns} <= set(only_run().data.metrics)


def test_plots_are_stored_with_the_run(store: Path) -> None:
    names = {file.path for file in mlflow.MlflowClient().list_artifacts(only_run().info.run_id, "plots")}
    assert names == {"plots/curves.png", "plots/confusion_matrix.png"}


def test_history_and_run_name_the_selected_epoch_and_the_reason(store: Path) -> None:
    rows = read_csv(Path("artifacts/train/history.csv"))
    [marked] = [row for row in rows if row["selected"]]
    order = ("validation_accuracy", "validation_loss", "epoch")
    results = [tuple(float(row[name]) for name in order) for row in rows]
    best = max(results, key=lambda found: (found[0], -found[1], found[2]))
    assert float(marked["epoch"]) == best[2]
    run = only_run()
    values = read_provenance(run.info.run_id)
    assert (values["selected.epoch"], values["selected.reason"]) == (marked["epoch"], marked["selected"])
    assert run.data.metrics["selected/epoch"] == best[2]
    assert run.data.metrics["selected/validation_accuracy"] == best[0]


def recorded_metrics(run_id: str) -> list[mlflow.entities.Metric]:
    """Return the metrics of the run's models, in the order of the columns on MLflow's Models page."""
    client = mlflow.MlflowClient()
    experiment = client.get_run(run_id).info.experiment_id
    models = client.search_logged_models([experiment], filter_string=f"source_run_id = '{run_id}'")
    return [metric for model in models for metric in model.metrics or []]


def test_validation_and_test_of_the_selected_epoch_are_linked_to_the_model(store: Path) -> None:
    run, digest = only_run(), DatasetInfo.read().md5
    [selected] = [row for row in read_csv(Path("artifacts/train/history.csv")) if row["selected"]]
    found = {metric.key: metric for metric in recorded_metrics(run.info.run_id)}
    assert next(iter(found)) == "validation/accuracy"
    assert list(found)[3] == "test/accuracy"
    assert found["validation/accuracy"].value == float(selected["validation_accuracy"])
    assert found["test/accuracy"].value == read_json(Path("artifacts/evaluate/metrics.json"))["accuracy"]
    assert {(metric.dataset_name, metric.dataset_digest) for metric in found.values()} == {("imagefolder", digest)}
    assert {metric.run_id for metric in found.values()} == {run.info.run_id}


def test_a_training_that_is_recorded_again_links_nothing_twice(store: Path) -> None:
    run = only_run()
    before, client = recorded_metrics(run.info.run_id), mlflow.MlflowClient()
    RunLogger(run.info.run_id).log_training(Path("artifacts/train"))
    assert recorded_metrics(run.info.run_id) == before
    assert len(client.get_metric_history(run.info.run_id, "validation/accuracy")) == 3


def test_the_metrics_of_other_weights_are_neither_linked_to_the_model_nor_the_result_of_the_run(
    workspace: Path,
) -> None:
    write_normalized(workspace)
    changes = {"train": {"epochs": 1}, "evaluate": {"checkpoint": "last"}}
    values = DEFAULTS | {section: DEFAULTS[section] | changed for section, changed in changes.items()}
    (workspace / "params.yaml").write_text(dump_yaml(values))
    assert run_step("train").returncode == 0
    files = {path.name: path.read_bytes() for path in (workspace / "artifacts/train").iterdir()}
    with replace_folder(workspace / "artifacts/train") as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        weights = load_file(folder / "last.safetensors")
        save_file({name: tensor * 2 for name, tensor in weights.items()}, folder / "last.safetensors")
    done = run_step("evaluate")
    assert done.returncode == 0, done.stderr
    assert "test/accuracy" in only_run().data.metrics
    assert not [found for found in recorded_metrics(only_run().info.run_id) if found.key.startswith("test/")]
    assert not [name for name in read_provenance(only_run().info.run_id) if name.startswith("result.")]
    text = only_run().data.tags["mlflow.note.content"]
    assert text.startswith("Validation accuracy ")
    assert "Test accuracy" not in text


def test_metrics_are_linked_to_no_model_where_the_run_has_none(workspace: Path) -> None:
    run, _ = find_or_create_run("0" * 32, experiment="digits")
    run.log({"test/accuracy": 0.5}, step=0)
    assert run.flush()
    run.link_to_model("test/", step=0)
    assert recorded_metrics(run.run_id) == []


def test_the_history_of_an_earlier_version_gives_no_values_of_the_selected_epoch(tmp_path: Path) -> None:
    write_csv(tmp_path / "history.csv", [{"epoch": 1, "kept": ""}, {"epoch": 2, "kept": "highest validation accuracy"}])
    assert selected_epoch_values(tmp_path) == {}


def test_the_recorded_model_predicts_and_contains_no_pickle(store: Path) -> None:
    model = mlflow.pyfunc.load_model(f"runs:/{only_run().info.run_id}/model")
    images, _ = colored_images(12, seed=5)
    table = model.predict(images)
    assert list(table.columns) == ["predicted_class", "class 0", "class 1", "class 2"]
    np.testing.assert_allclose(table.iloc[:, 1:].sum(axis=1), 1, rtol=1e-5)
    assert not [path for path in (store / "mlartifacts").rglob("*") if path.suffix in {".pkl", ".pth", ".pickle"}]


def test_the_recorded_model_reports_an_unknown_class_below_the_threshold_of_a_coverage(store: Path) -> None:
    model, config = mlflow.pyfunc.load_model(f"runs:/{only_run().info.run_id}/model"), load_config(store / TRAIN)
    images, _ = read_split("validation")
    plain, table = model.predict(images), model.predict(images, params={"coverage": 0.5})
    assert config.thresholds
    is_unknown = (plain.iloc[:, 1:].max(axis=1) < config.thresholds[0.5]).tolist()
    assert (table["is_unknown"].tolist(), sum(is_unknown)) == (is_unknown, len(images) // 2)
    expected = ["unknown" if is_below else name for name, is_below in zip(plain.iloc[:, 0], is_unknown, strict=True)]
    assert table["predicted_class"].tolist() == expected
    assert table.iloc[:, 1:-1].equals(plain.iloc[:, 1:])


APPLICATION = """
import sys
import pipeline, model, flows
import mlflow, numpy as np
mlflow.set_tracking_uri(sys.argv[1])
models = [mlflow.pyfunc.load_model(uri) for uri in sys.argv[2:]]
print(*(found.predict(np.zeros((1, 32, 32, 3), np.uint8)).iloc[0, 0] for found in models))
print(pipeline.__file__, sorted(name for name in sys.modules if name.startswith("pipeline.")))
"""


def test_an_application_with_modules_named_like_ours_loads_models_of_two_versions(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = f"runs:/{only_run().info.run_id}/model"
    package = tmp_path / "changed"
    shutil.copytree(PROJECT / "pipeline", package)
    served = package / "tracking/served_model.py"
    changed = 'table.insert(0, "predicted_class", ["another version"'
    served.write_text(served.read_text().replace('table.insert(0, "predicted_class", [names[index]', changed))
    monkeypatch.setattr(model_code, "PACKAGE", package)
    with mlflow.start_run() as other:
        log_model(Path("artifacts/train"))
    for name in ("pipeline.py", "model.py", "flows.py"):
        (tmp_path / name).touch()
    (tmp_path / "application.py").write_text(APPLICATION)
    command = [sys.executable, "application.py", os.environ["MLFLOW_TRACKING_URI"], first]
    command.append(f"runs:/{other.info.run_id}/model")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    mlflow.delete_run(other.info.run_id)
    assert done.returncode == 0, done.stderr
    classes, modules = done.stdout.splitlines()
    assert classes.startswith("class ")
    assert classes.endswith("another version")
    assert modules == f"{tmp_path}/pipeline.py []"


def test_the_requirements_of_a_recorded_model_are_all_that_its_code_imports() -> None:
    files = [MODULES[name] for name in reached("tracking.served_model")]
    imported = {name.partition(".")[0] for file in files for name in imports(file)} - set(sys.stdlib_module_names)
    required = {name.partition(".")[0] for name in SERVED_PACKAGES} | {"pipeline"}
    assert imported - {"timm", "huggingface_hub"} == required  # which only networks of timm need


def test_the_recorded_weights_can_be_fetched(store: Path) -> None:
    folder = fetch_model(f"runs:/{only_run().info.run_id}/model")
    assert file_md5(folder / "best.safetensors") == file_md5(Path("artifacts/train/best.safetensors"))
    assert load_model(folder)[1].class_names == ("class 0", "class 1", "class 2")
    verify(folder, ["best.safetensors", "model.json"], allow_unlisted=True)


def test_a_model_is_found_by_the_name_of_its_dvc_experiment(store: Path) -> None:
    mlflow.MlflowClient().set_tag(only_run().info.run_id, "dvc.experiment", "digits-lr-1-abcdef")
    found = find_model_files("digits-lr-1-abcdef")
    assert found.weights_md5 == file_md5(Path("artifacts/train/best.safetensors"))
    with pytest.raises(UserError, match="no folder, file, MLflow run or DVC experiment of this name"):
        find_model_files("digits-lr-1-%")


def test_an_unknown_model_is_refused_in_one_line(store: Path) -> None:
    with pytest.raises(UserError, match="--model runs:/nothing/model: MLflow cannot provide it") as error:
        fetch_model("runs:/nothing/model")
    assert "\n" not in str(error.value)


def test_a_model_without_a_run_gets_a_new_run(workspace: Path) -> None:
    run, made = find_or_create_run("0" * 32, experiment="digits")
    again, made_again = find_or_create_run("0" * 32, experiment="digits")
    assert (made, made_again, again.run_id) == (True, False, run.run_id)


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "sqlite:////proc/nowhere/mlflow.db"])
def test_an_unreachable_store_is_reported_in_one_line(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(
        (UserError, TemporaryError), match=r"MLFLOW_TRACKING_URI is .*, which does not answer .*unset the variable"
    ) as error:
        find_or_create_run("0" * 32, experiment="digits")
    assert "\n" not in str(error.value)


def test_a_password_in_the_tracking_uri_is_not_shown(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    with pytest.raises(TemporaryError) as error:
        connect()
    assert "secret" not in str(error.value)


@pytest.fixture
def served(store: Path) -> Iterator[str]:
    port = free_port()
    uri = f"runs:/{only_run().info.run_id}/model"
    command = ["mlflow", "models", "serve", "-m", uri, "--env-manager", "local", "-h", "127.0.0.1", "-p", str(port)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with subprocess.Popen(
        command, env=os.environ | {"PATH": path}, start_new_session=True, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, 15)


def response_of(url: str, body: bytes | None = None) -> bytes:
    """Return the response of the server once it runs; if it never does, pytest's timeout ends the test."""
    while True:
        try:
            request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=300) as response:
                return response.read()  # type: ignore[no-any-return]
        except OSError:
            time.sleep(0.25)


def test_the_recorded_model_can_be_served(served: str) -> None:
    response_of(f"{served}/ping")
    images, _ = colored_images(2)
    body = json.dumps({"inputs": images.tolist()}).encode()
    predictions = json.loads(response_of(f"{served}/invocations", body))["predictions"]
    assert [set(row) for row in predictions] == [{"predicted_class", "class 0", "class 1", "class 2"}] * 2
    floats = json.dumps({"instances": images.astype(float).tolist()}).encode()
    assert json.loads(response_of(f"{served}/invocations", floats))["predictions"] == predictions
    body = json.dumps({"inputs": images.tolist(), "params": {"coverage": 0.95}}).encode()
    reported = json.loads(response_of(f"{served}/invocations", body))["predictions"]
    assert [set(row) for row in reported] == [{"is_unknown", *predictions[0]}] * 2
    for wrong, message in (
        ({"inputs": (images / 255).tolist()}, "inputs: found the value 0."),
        ({"instances": (images.astype(int) - 128).tolist()}, "inputs: found the value -"),
        (
            {"inputs": images[0].tolist()},
            "inputs: found one image of shape (32, 32, 3), without a batch axis: send it",
        ),
        ({"inputs": images.tolist(), "params": {"coverage": 2}}, "params: coverage is 2.0; allowed: 0.5, 0.6, 0.7, 0."),
        ({"inputs": []}, "inputs: found no image"),
        ({"inputs": ["aGVsbG8="]}, "inputs: found text instead of numbers"),
        ({"dataframe_split": {"columns": ["a", "b"], "data": [[1, 2]]}}, "inputs: found a table of 2 columns"),
    ):
        found = requests.post(f"{served}/invocations", json=wrong, timeout=60)
        assert (found.status_code, len(found.json()["message"].splitlines())) == (400, 1), found.text
        assert found.json()["message"].startswith(message)
