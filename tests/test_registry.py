"""MLflow's model registry: one version for each model and test split, with aliases and tags."""

import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.core.errors import UserError
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
    return str(run.info.run_id)


def register(run_id: str, *, model: str = "a", test: str = "b", name: str = "digits") -> registry.Version:
    return registry.register_version(
        name=name, run_id=run_id, model_md5=model * 32, test_md5=test * 32, tags={"accuracy": "0.9", "git.commit": "c"}
    )


def test_a_version_has_its_identity_and_one_hidden_tag_for_programs(run_id: str) -> None:
    made = register(run_id)
    assert (made.number, made.run_id, made.model_md5, made.test_md5) == ("1", run_id, "a" * 32, "b" * 32)
    assert made.tags == {"accuracy": "0.9", "git.commit": "c", "model.md5": "a" * 32, "test.md5": "b" * 32}
    assert {*MlflowClient().get_model_version("digits", "1").tags} == {"accuracy", "mlflow.pipeline.record"}
    assert registry.find_names() == ["digits"]


def test_a_model_is_one_version_for_each_test_split(run_id: str) -> None:
    numbers = [register(run_id, model=model, test=test).number for model in "ac" for test in "bd" for _ in range(2)]
    assert numbers == ["1", "1", "2", "2", "3", "3", "4", "4"]
    assert [one.number for one in registry.find_versions("digits")] == ["4", "3", "2", "1"]
    assert [one.number for one in registry.versions_of_model("digits", "a" * 32)] == ["2", "1"]


def test_a_version_that_exists_keeps_its_tags(run_id: str) -> None:
    made = register(run_id)
    registry.set_version_tags("digits", made.number, {"promote.decision": "{}", "decision": "refused"})
    again = registry.register_version(
        name="digits", run_id=run_id, model_md5="a" * 32, test_md5="b" * 32, tags={"accuracy": "0.1"}
    )
    assert again.tags == {**made.tags, "promote.decision": "{}", "decision": "refused"}


def test_an_alias_moves_from_one_version_to_another(run_id: str) -> None:
    first, second = register(run_id), register(run_id, model="c")
    assert registry.version_of_alias("digits", "champion") is None
    for version in (first, second):
        registry.set_alias("digits", "champion", version.number)
        found = registry.version_of_alias("digits", "champion")
        assert found
        assert (found.number, found.aliases) == (version.number, ("champion",))
        assert registry.number_of_alias("digits", "champion") == version.number
    assert registry.find_versions("digits")[1].aliases == ()
    for _ in range(2):
        registry.remove_alias("digits", "champion")
        assert registry.version_of_alias("digits", "champion") is None


def test_tags_of_the_registered_model_are_read_as_they_were_set(run_id: str) -> None:
    register(run_id)
    before = registry.read_tags("digits")
    registry.set_tag("digits", "promote.look.0123456789ab.0001", "x" * registry.MAX_TAG_LENGTH)
    assert registry.read_tags("digits") == {**before, "promote.look.0123456789ab.0001": "x" * registry.MAX_TAG_LENGTH}
    assert not [key for key in MlflowClient().get_registered_model("digits").tags if not key.startswith("mlflow.")]
    for _ in range(2):
        registry.remove_tag("digits", "promote.look.0123456789ab.0001")
        assert registry.read_tags("digits") == before
    with pytest.raises(UserError, match=r"tag x of .* digits: found 5,001 characters; allowed: 5,000"):
        registry.set_tag("digits", "x", "x" * 5001)


def test_what_does_not_exist_is_empty_or_refused(run_id: str) -> None:
    assert registry.find_names() == []
    assert registry.find_versions("digits") == []
    assert registry.read_tags("digits") == {}
    assert registry.version_of_alias("digits", "champion") is None
    assert registry.number_of_alias("digits", "champion") is None
    with pytest.raises(UserError, match="model registry: found no digits version 7"):
        registry.set_alias("digits", "champion", "7")
    without_model = MlflowClient().create_run("0").info.run_id
    with pytest.raises(UserError, match=f"MLflow run {without_model}: found no complete model to register"):
        register(without_model)


def test_a_model_that_others_register_at_the_same_time_is_one_version(
    run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the lock of the project, as from several machines."""
    monkeypatch.setattr(registry, "exclusive", nullcontext)
    with ThreadPoolExecutor(4) as pool:
        numbers = {one.number for one in pool.map(lambda _: register(run_id), range(8))}
    assert numbers == {"1"}
    assert [one.number for one in registry.find_versions("digits")] == ["1"]


def test_a_damaged_record_is_reported_with_the_remedy(run_id: str) -> None:
    register(run_id)
    MlflowClient().set_model_version_tag("digits", "1", registry.RECORD, "{")
    with pytest.raises(UserError, match=r"digits version 1: its tag .* is damaged .*; delete the version, then"):
        registry.find_versions("digits")


@pytest.mark.parametrize(
    ("experiment", "pattern"),
    [
        ("digits", "digits"),
        ("digits (images)", r"digits \(images\)"),
        ("日本 1", "日本 1"),
        ("a:b/c@d", "a-b-c-d-[0-9a-f]{6}"),
        ("Bob's", "Bob-s-[0-9a-f]{6}"),
        ("..", "--[0-9a-f]{6}"),
        ("x" * 300, "x{200}-[0-9a-f]{6}"),
    ],
)
def test_the_name_of_a_registered_model_is_that_of_the_data_set(run_id: str, experiment: str, pattern: str) -> None:
    name = registry.registered_name(experiment)
    assert re.fullmatch(pattern, name)
    version = register(run_id, name=name)
    registry.set_alias(name, "champion", version.number)
    assert str(MlflowClient().get_model_version_by_alias(name, "champion").version) == version.number
    assert registry.find_names() == [name]
