"""MLflow's model registry: one version for each model and test split, with aliases and tags."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.tracking import registry
from pipeline.tracking.store import connect


@pytest.fixture
def run_id(workspace: Path) -> str:
    """Return a run with a model, in the empty store of a new project."""
    connect()
    return make_run()


def make_run() -> str:
    """Return the id of a new run with a recorded model, whose files do not exist."""
    client = MlflowClient()
    run = client.create_run("0")
    model = client.create_logged_model("0", name="model", source_run_id=run.info.run_id)
    client.finalize_logged_model(model.model_id, "READY")
    return run.info.run_id


def register(run_id: str, *, model: str = "a", test: str = "b", name: str = "digits") -> registry.Version:
    return registry.register_version(
        name=name, run_id=run_id, model_md5=model * 32, test_md5=test * 32, tags={"accuracy": "0.9", "git.commit": "c"}
    )


def test_a_version_has_its_identity_and_hides_the_tags_that_only_programs_read(run_id: str) -> None:
    made = register(run_id)
    assert (made.number, made.run_id, made.model_md5, made.test_md5) == ("1", run_id, "a" * 32, "b" * 32)
    assert made.tags == {"accuracy": "0.9", "git.commit": "c", "model.md5": "a" * 32, "test.md5": "b" * 32}
    shown = {key for key in MlflowClient().get_model_version("digits", "1").tags if not key.startswith("mlflow.")}
    assert shown == {"accuracy"}
    assert registry.find_names() == ["digits"]


def test_a_model_is_one_version_for_each_test_split(run_id: str) -> None:
    numbers = [register(run_id, model=model, test=test).number for model in "ac" for test in "bd" for _ in range(2)]
    assert numbers == ["1", "1", "2", "2", "3", "3", "4", "4"]
    assert [one.number for one in registry.find_versions("digits")] == ["4", "3", "2", "1"]
    assert [one.number for one in registry.versions_of_model("digits", "a" * 32)] == ["2", "1"]


def test_a_version_that_exists_gets_only_the_tags_that_it_lacks(run_id: str) -> None:
    register(run_id)
    tags = {"accuracy": "0.1", "title": "digits lr=1"}
    again = registry.register_version(name="digits", run_id=run_id, model_md5="a" * 32, test_md5="b" * 32, tags=tags)
    assert (again.tags["accuracy"], again.tags["title"]) == ("0.9", "digits lr=1")
