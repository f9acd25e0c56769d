"""Models are found by every name, and compared on the images that allow it; the exit status states the result."""

import json
import re
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from flows import compare, compare_text
from flows.candidates import Group, best_model, candidate, find_models
from flows.comparison import compare as compare_groups
from flows.lineage import Sources, trace
from flows.reports import reports_without
from pipeline.comparison import models
from pipeline.core.errors import UserError
from pipeline.params import PARAMS_FILE, load_params
from pipeline.tracking import registry
from pipeline.tracking.search import find_runs_of_model
from pipeline.tracking.seeds import seeds_run
from pipeline.tracking.store import connect
from tests.conftest import PROJECT
from tests.planted_models import NUM_IMAGES, plant, right_on, start_project

GOOD, POOR = right_on(0, 360), right_on(40, 320)  # of 400 images: 90 %, and 70 %


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_servers: None) -> Path:
    """Return a project with the experiments `good` and `poor`, and without an MLflow store."""
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "project"
    folder.mkdir()
    start_project(folder)
    plant(folder, "good", GOOD, params={"learning_rate": 0.05})
    plant(folder, "poor", POOR, params={"learning_rate": 0.005})
    monkeypatch.setattr(compare, "PROJECT", folder)
    monkeypatch.setattr(models, "RESAMPLES", 50)  # the bootstrap is most of the time, and other tests are about it
    monkeypatch.setenv("DVC_ROOT", str(folder))
    monkeypatch.chdir(folder)
    return folder


def groups(project: Path, *names: str) -> list[Group]:
    sources = Sources(project)
    return [find_models(project, name, sources=sources) for name in names]


def text_of(project: Path, *names: str, level: float = 0.05, **options: Any) -> str:
    found = compare_text.as_text(compare_groups(groups(project, *names), level=level, **options))
    return re.sub(r"\s+", " ", found)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command, and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["compare", *arguments])
    with pytest.raises(SystemExit) as stopped:
        compare.main()
    return int(stopped.value.code or 0)


@pytest.mark.parametrize(
    ("names", "status"),
    [
        (("good", "poor"), 0),
        (("good", "good"), 3),
        (("poor", "good"), 4),
        (("good", "poor", "good"), 3),
        (("poor", "poor", "good"), 4),
        (("good", "nothing"), 2),
        (("good", "poor", "--question", "recipe"), 2),
        (("good",), 2),
        (("good", "poor", "--level", "0"), 2),
    ],
)
def test_the_exit_status_states_the_result(
    project: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], status: int
) -> None:
    assert run(monkeypatch, *names, "--no-mlflow", "--page", "page.html") == status
    assert (project / "page.html").exists() == (status != 2)


def test_the_default_page_is_kept_by_a_cleanup_of_reports(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "good", "poor") == 0
    assert (project / "artifacts" / "reports" / "compare-good-poor.html").is_file()
    assert reports_without(project, experiments=["good", "poor"]) == []
    assert "warning: the comparison is not recorded in MLflow: MLflow has no runs yet" in capsys.readouterr().err


def test_the_text_has_differences_figures_images_and_the_limit(project: Path) -> None:
    text = text_of(project, "good", "poor")
    assert "train.learning_rate: A 0.05, B 0.005" in text
    assert "code the same data the same" in text
    assert "Model A is better than model B on images like these" in text
    assert "400 test images, the same test split; left out: none" in text
    assert "280 images by both, 80 by A only, 0 by B only, 40 by neither" in text
    assert "A is better on cat, dog (recall; corrected for looking at 2 classes, Holm)" in text
    assert "the smallest difference that this test set can show at the 5 % level with 80 % power: 6.2 points" in text
    assert "By the question about models: A is better than B" in text


def test_leaked_and_trained_images_and_those_of_one_split_are_left_out(project: Path) -> None:
    hashes = [f"{index + 10:016x}" for index in range(NUM_IMAGES)]  # 390 of them are in the split of `good` too
    plant(
        project, "other", POOR, hashes=hashes, leaked=[0, 1, 2], trained_on=[f"{index:016x}" for index in (5, 20, 21)]
    )
    text = text_of(project, "good", "other")
    assert "385 test images, different test splits: only images in both are compared; left out: " in text
    assert "left out: 10 are only in the test split of A, 10 are only in the test split of B, 2 were used" in text
    assert "2 were used to train one of them, 3 have a duplicate or near-duplicate" in text


def test_models_that_cannot_be_compared_are_refused(project: Path) -> None:
    plant(project, "elsewhere", GOOD, hashes=[f"{index + 1000:016x}" for index in range(NUM_IMAGES)])
    plant(project, "birds", GOOD, class_names=("cat", "bird"))
    with pytest.raises(UserError, match="good and elsewhere have no test image on which all can be compared"):
        compare_groups(groups(project, "good", "elsewhere"), level=0.05)
    with pytest.raises(UserError, match="good and birds know different classes: bird, dog"):
        compare_groups(groups(project, "good", "birds"), level=0.05)


def test_several_comparisons_share_the_level(project: Path) -> None:
    found = compare_groups(groups(project, "good", "poor", "good", "good"), level=0.06)
    assert [each.model.level for each in found.against if each.model] == pytest.approx([0.02] * 3)
    assert "level 6 %, divided by the 3 comparisons: 2 % each (Bonferroni)" in compare_text.outcome(found).replace(
        "\u00a0", " "
    )


def seeds(project: Path, name: str, accuracies: list[int], **params: Any) -> Group:
    """Return the group of several seeds, whose models get the first images right; the last is best on validation."""
    for seed, number in enumerate(accuracies):
        right = right_on(seed, seed + number)
        plant(project, f"{name}-{seed}", right, params={**params, "seed": seed}, validation_accuracy=0.5 + seed / 10)
    found = [group.models[0] for group in groups(project, *(f"{name}-{seed}" for seed in range(len(accuracies))))]
    return Group(name, tuple(found), True, tuple(map(str, range(len(accuracies)))))


def test_groups_of_seeds_are_compared_as_recipes_and_by_their_best_models(project: Path) -> None:
    a, b = seeds(project, "a", [350, 352, 351], epochs=9), seeds(project, "b", [300, 301, 302], epochs=1)
    found = compare_groups([a, b], level=0.05)
    assert (found.question, found.exit_status) == ("recipe", 0)
    assert [model.label for model in found.models] == ["a-2", "b-2"]
    assert found.parameters
    assert {row.what: row.values for row in found.parameters} == {"train.epochs": ["9", "1"]}
    assert compare_groups([a, b], level=0.05, question="model").question == "model"
    assert "3 seeds; the best on validation is seed 2" in compare_text.as_text(found)


def test_the_best_seed_without_a_record_is_chosen_as_by_the_parent(project: Path) -> None:
    """Of equal accuracies the loss decides; a recipe that selects by loss looks at the loss only."""
    for name, accuracy, loss in (("x", 0.9, 0.3), ("y", 0.9, 0.2), ("z", 0.8, 0.1)):
        plant(project, name, GOOD, validation_accuracy=accuracy, validation_loss=loss)
    models = tuple(group.models[0] for group in groups(project, "x", "y", "z"))
    assert best_model(Group("several", models, True)).label == "y"
    by_loss = tuple(replace(one, params={**one.params, "train.select_by": "loss"}) for one in models)
    assert best_model(Group("several", by_loss, True)).label == "z"


def test_models_of_the_same_name_are_told_apart(project: Path) -> None:
    good, poor = groups(project, "good", "poor")
    [a], [b] = ([replace(model, label="digits seed=0") for model in group.models] for group in (good, poor))
    assert compare_groups([Group("digits", (a,)), Group("digits", (b,))], level=0.05).exit_status == 0


def test_a_single_seed_leaves_the_question_about_recipes_open(project: Path) -> None:
    a, [b] = seeds(project, "a", [350, 352, 351]), groups(project, "poor")
    found = compare_groups([a, b], level=0.05)
    assert (found.question, found.against[0].recipe) == ("model", None)
    text = re.sub(r"\s+", " ", compare_text.as_text(found))
    assert "recipe A is better than recipe B is not answered: found one seed of poor" in text
    with pytest.raises(UserError, match=r"--question recipe: found one seed of poor, .*`make run RECIPE=… SEEDS=5`"):
        compare_groups([a, b], level=0.05, question="recipe")


def test_two_seeds_of_one_recipe_are_named_as_such(project: Path) -> None:
    plant(project, "again", right_on(20, 380), params={"learning_rate": 0.05, "seed": 1})
    assert "so they are seeds of one recipe" in text_of(project, "good", "again")
    assert "so they are the same model" in text_of(project, "good", "good")
    plant(project, "changed", GOOD, params={"learning_rate": 0.05}, code="2" * 32)
    assert "code pipeline/train.py: A 11111111, B 22222222" in text_of(project, "good", "changed")


def test_commits_and_the_checkout_are_found(project: Path) -> None:
    commit = plant(project, "third", GOOD)
    [by_commit, by_digits] = groups(project, commit, commit[:9])
    assert by_commit.models[0].experiment == by_digits.models[0].experiment == "third"
    with pytest.raises(UserError, match=r"the checkout: its dvc.lock has no model; .*dvc repro"):
        find_models(project, ".")
    lock = compare_lock(project, commit)
    (project / "dvc.lock").write_text(lock)
    found = find_models(project, ".").models[0]
    assert (found.model_md5, found.commit) == (by_commit.models[0].model_md5, None)  # no commit has this dvc.lock


def compare_lock(project: Path, commit: str) -> str:
    return Sources(project).committed_file(commit, "dvc.lock")


def test_a_missing_file_names_the_command_that_fetches_or_makes_it(project: Path) -> None:
    plant(project, "old", GOOD, leave_out=["validation_predictions.parquet"])
    old = find_models(project, "old").models[0]
    assert candidate(old).label == "old"
    with pytest.raises(UserError, match=r"old: found no artifacts/evaluate/validation_predictions.parquet, since"):
        candidate(old, "validation")
    good = find_models(project, "good").models[0]
    good.files["artifacts/evaluate/predictions.parquet"].unlink()
    with pytest.raises(UserError, match=r"good: found no artifacts/evaluate/predictions.parquet in DVC's cache"):
        candidate(good)


def test_the_candidate_of_validation_knows_only_the_train_images_as_seen(project: Path) -> None:
    plant(project, "third", GOOD, leaked=[3], trained_on=["00000000000000ff"])
    model = find_models(project, "third").models[0]
    assert candidate(model).leaked == {"0000000000000003"}
    assert candidate(model, "validation").leaked == frozenset()
    assert candidate(model, "validation").trained_on == {"00000000000000ff"}


@pytest.fixture
def recorded(project: Path, mlflow_store: Path) -> Path:
    """Return the project with an MLflow store that has a run of each experiment."""
    shutil.copy(mlflow_store / "mlflow.db", project)
    connect(f"sqlite:///{project}/mlflow.db")
    experiment = MlflowClient().create_experiment("digits", artifact_location=(project / "mlartifacts").as_uri())
    for name in ("good", "poor"):
        model = find_models(project, name).models[0]
        tags = {"dvc.experiment": name, "model.md5": model.model_md5, "recipe": "digits"}
        made = MlflowClient().create_run(experiment, run_name=f"digits {name}", tags=tags)
        MlflowClient().set_terminated(made.info.run_id)
    return project


def test_a_comparison_is_recorded_as_a_run_that_is_no_training(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "digits good", "digits poor") == 0
    [found] = [one for one in MlflowClient().search_runs(["1"]) if one.info.run_name == "compare good with poor"]
    run_id = found.info.run_id
    assert run_id in capsys.readouterr().out
    assert found.info.status == "FINISHED"
    assert found.data.metrics["compare/a_minus_b_accuracy"] == pytest.approx(0.2)
    assert {file.path for file in MlflowClient().list_artifacts(run_id)} == {"comparison.json", "comparison.html"}
    note = found.data.tags["mlflow.note.content"]
    assert all(one.info.run_id in note for one in MlflowClient().search_runs(["1"], "run_name LIKE 'digits%'"))
    good = find_models(recorded, "good").models[0]
    assert run_id not in {one.run_id for one in find_runs_of_model(good.model_md5)}
    for wanted in (run_id, run_id[:9], "compare good with poor"):
        with pytest.raises(UserError, match="no training belongs to it"):
            trace(recorded, wanted)


def test_the_table_of_results_leaves_comparisons_out(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "good", "poor") == 0
    view = json.loads(MlflowClient().get_experiment("1").tags["mlflow.sharedViewState.results"])
    shown = MlflowClient().search_runs(["1"], view["searchFilter"])
    assert {one.info.run_name for one in shown} == {"digits good", "digits poor"}


def test_the_json_of_a_comparison_has_the_figures_and_no_predictions(
    recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, "poor", "good") == 4
    [found] = MlflowClient().search_runs(["1"], "run_name LIKE 'compare%'")
    path = MlflowClient().download_artifacts(found.info.run_id, "comparison.json")
    values = json.loads(Path(path).read_text())
    assert (values["result"], values["question"], values["level"]) == ("worse", "model", 0.05)
    assert values["against"][0]["model"]["only_b"] == 80
    assert [one["models"][0]["experiment"] for one in values["compared"]] == ["poor", "good"]
    assert len(json.dumps(values)) < 5000


def test_runs_are_found_by_name_and_short_id_and_an_ambiguous_name_is_refused(recorded: Path) -> None:
    [by_name] = groups(recorded, "digits good")
    assert by_name.run_id
    assert find_models(recorded, by_name.run_id[:9]).models == by_name.models
    model = find_models(recorded, "poor").models[0]
    other = MlflowClient().create_run("1", run_name="digits good", tags={"model.md5": model.model_md5})
    with pytest.raises(UserError, match=f"digits good: names 2 models; .*MLflow run {other.info.run_id[:8]}"):
        find_models(recorded, "digits good")
    failed = MlflowClient().create_run("1", run_name="stopped")
    MlflowClient().set_terminated(failed.info.run_id, "FAILED")
    with pytest.raises(UserError, match=r"stopped: found no model \(MLflow run FAILED\)"):
        find_models(recorded, "stopped")


def test_the_parent_of_several_seeds_is_a_recipe(recorded: Path) -> None:
    both = [find_models(recorded, name).models[0] for name in ("good", "poor")]
    accuracies = {"test_accuracy": 0.9, "validation_accuracy": 0.9}
    rows = [
        {"seed": seed, "experiment": model.experiment, "model_md5": model.model_md5, **accuracies}
        for seed, model in enumerate(both)
    ]
    download = load_params(PROJECT / PARAMS_FILE).download
    open_run = partial(seeds_run, data_params=download, title="both", seeds=[0, 1], params={}, values={})
    with open_run(command_md5="0") as parent:
        parent.record_children(rows)
        assert find_models(recorded, "both").best is None  # as long as a seed may be missing
        parent.finish({}, values={"best.experiment": "poor", "result.spread": "90.00% ± 0.00%", "result.record": "| |"})
    group = find_models(recorded, "both")
    assert find_models(recorded, parent.run_id[:9]) == group
    assert (group.is_recipe, group.seeds, group.run_id) == (True, ("0", "1"), parent.run_id)
    assert [model.experiment for model in group.models] == ["good", "poor"]
    assert best_model(group).experiment == "poor"
    with open_run(command_md5="1"), pytest.raises(UserError, match="both: names 2 runs over several seeds; allowed: "):
        find_models(recorded, "both")


def test_registered_versions_and_aliases_are_found(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = find_models(recorded, "good").models[0]
    number = register("digits", model)
    registry.set_alias("digits", "champion", number)
    for text in ("champion", f"digits/{number}", f"models:/digits/{number}", "models:/digits@champion"):
        assert find_models(recorded, text).models[0].experiment == "good", text
    assert run(monkeypatch, "poor", "champion", "--no-mlflow") == 4
    with pytest.raises(
        UserError, match=f"previous: digits has no such version or alias; allowed: digits/{number} champion"
    ):
        find_models(recorded, "previous")
    register("photos", model)
    with pytest.raises(UserError, match=r"champion: found 2 registered models \(digits, photos\); .*NAME@champion"):
        find_models(recorded, "champion")
    assert find_models(recorded, "champion", registered="digits").models[0].experiment == "good"


def register(name: str, model: Any) -> str:
    """Register a model without its files, and return the number of its version."""
    MlflowClient().create_registered_model(name, tags={registry.DATA_SET: name})
    values = {registry.MODEL_MD5: model.model_md5, registry.TEST_MD5: model.test_md5}
    tags = {registry.RECORD: json.dumps(values)}
    source = f"runs:/{model.run_id}/model"
    return str(MlflowClient().create_model_version(name, source, model.run_id, tags=tags).version)
