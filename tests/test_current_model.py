"""The model that a server answers with, and how a new champion replaces it."""

import gc
import shutil
import socket
import time
import weakref
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest

from pipeline.artifacts import file_md5
from pipeline.core.errors import UserError
from pipeline.core.settings import get_settings
from pipeline.serving.current import MAX_SKIPPED_POLLS, Follower, open_model
from pipeline.tracking import registry
from pipeline.tracking.models import fetch_model
from pipeline.tracking.store import connect
from tests.registered_models import register, write_model

ADDRESS = "models:/digits@champion"


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory, mlflow_store: Path) -> Path:
    """Return a folder with two models, and a store in which they are versions; tests copy both."""
    folder = tmp_path_factory.mktemp("registered")
    shutil.copy(mlflow_store / "mlflow.db", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        get_settings.cache_clear()
        connect()
        for seed in (1, 2):
            register(write_model(folder / f"model {seed}", seed=seed))
    get_settings.cache_clear()
    return folder


@pytest.fixture
def project(workspace: Path, registered: Path) -> Path:
    """Return a project with two registered models, without a champion."""
    shutil.copytree(registered, workspace, dirs_exist_ok=True)
    connect()
    return workspace


@pytest.fixture
def follower(project: Path) -> Follower:
    """Return a follower of the champion, which is the first version."""
    make_champion("1")
    return Follower(name="digits", alias="champion")


def make_champion(number: str, *, name: str = "digits") -> None:
    registry.set_alias(name, "champion", number)


def add_version(seed: int, **changes: Any) -> Path:
    """Register another version; return the folder in which MLflow has its files."""
    return fetch_model(register(write_model(Path(f"model {seed}"), seed=seed, **changes)).uri)


def test_without_a_name_the_only_champion_is_served(follower: Follower) -> None:
    with open_model(None) as current:
        served = current.get()
    assert (served.name, served.version, current.problem) == ("digits", "1", None)
    assert served.model.files.weights_md5 == file_md5(Path("model 1/best.safetensors"))


def test_several_champions_are_listed(project: Path) -> None:
    make_champion("1")
    make_champion(register(Path("model 1"), name="letters").number, name="letters")
    expected = "found 2 champions: models:/digits@champion, models:/letters@champion; .* MODEL="
    with pytest.raises(UserError, match=expected), open_model(None):
        pass


def test_without_a_champion_the_model_of_the_checkout_is_served(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        pytest.raises(
            UserError, match=r"found no model to serve: neither a champion .* nor the folder artifacts/train"
        ),
        open_model(None),
    ):
        pass
    write_model(Path("artifacts/train"), seed=1)
    with open_model(None) as current:
        assert (current.get().name, current.get().version) == ("artifacts/train", None)
    assert "no champion yet: serves artifacts/train" in capsys.readouterr().out


def test_the_first_champion_takes_over_from_the_folder(project: Path) -> None:
    write_model(Path("artifacts/train"), seed=3)
    follower = Follower(name=None, alias="champion")
    follower.poll()
    assert (follower.current.get().name, follower.current.problem) == ("artifacts/train", None)
    register(Path("model 1"), name="letters")
    for name in ("digits", "letters"):
        make_champion("1", name=name)
    follower.poll()
    assert follower.current.get().name == "artifacts/train"
    assert "the first champion: 2 models have a champion; name one" in str(follower.current.problem)
    registry.remove_alias("letters", "champion")
    follower.poll()
    assert (follower.current.get().name, follower.current.get().version) == ("digits", "1")
    assert follower.current.problem is None
    make_champion("2")
    follower.poll()
    assert follower.current.get().version == "2"


def test_a_server_without_a_champion_polls_for_one(project: Path) -> None:
    write_model(Path("artifacts/train"), seed=3)
    with open_model(None, poll_seconds=0.01) as current:
        make_champion("1")
        while current.get().version != "1":
            time.sleep(0.01)


def test_an_alias_that_no_version_has_is_refused(project: Path) -> None:
    with pytest.raises(UserError, match=f"--model {ADDRESS}: no version in MLflow's model registry has this alias"):
        Follower(name="digits", alias="champion")


def test_a_version_that_is_named_is_served_whatever_the_champion_is(follower: Follower) -> None:
    with open_model("models:/digits/2", poll_seconds=0.01) as current:
        assert (current.get().name, current.get().version) == ("digits", "2")
    with open_model("model 2") as current:
        assert (current.get().name, current.get().version) == ("model 2", None)


def test_the_thread_takes_over_a_new_champion_and_the_old_one_again(follower: Follower) -> None:
    with open_model(ADDRESS, poll_seconds=0.01) as current:
        before = current.get()
        for number in ("2", "1"):
            make_champion(number)
            while current.get().version != number:
                time.sleep(0.01)
            assert current.get().model.files.weights_md5 == file_md5(Path(f"model {number}/best.safetensors"))
    assert current.get().since > before.since


def test_a_request_keeps_the_model_that_it_got_and_then_its_memory_is_free(follower: Follower) -> None:
    image = np.full((1, 32, 32, 3), 99, np.uint8)
    served = follower.current.get()
    answer = served.model.quick_probabilities(image)
    network = weakref.ref(served.model.classifier)
    make_champion("2")
    follower.poll()
    assert (served.model.quick_probabilities(image) == answer).all()
    assert (follower.current.get().model.quick_probabilities(image) != answer).any()
    del served
    gc.collect()
    assert network() is None


def test_a_damaged_champion_is_not_taken_over_and_reported_once(
    follower: Follower, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = add_version(3) / "best.safetensors"
    weights.write_bytes(b"damaged")
    make_champion("3")
    for _ in range(2 * MAX_SKIPPED_POLLS):
        follower.poll()
    assert follower.current.get().version == "1"
    assert capsys.readouterr().out.count("version 3 cannot be served: ") == 1
    assert f"{ADDRESS}: version 3 cannot be served: " in str(follower.current.problem)
    shutil.copy("model 3/best.safetensors", weights)
    for _ in range(MAX_SKIPPED_POLLS + 1):
        follower.poll()
    assert (follower.current.get().version, follower.current.problem) == ("3", None)


def test_a_repaired_promotion_is_taken_over_at_once(follower: Follower) -> None:
    """The next try of the damaged version would be later."""
    shutil.rmtree(add_version(3))
    for number, served in (("3", "1"), ("2", "2"), ("3", "2"), ("1", "1")):
        make_champion(number)
        follower.poll()
        assert (follower.current.get().version, follower.current.problem is None) == (served, number == served)


@pytest.mark.parametrize("accepts_connections", [False, True], ids=["refused", "silent"])
def test_a_registry_that_does_not_answer_leaves_the_model(
    follower: Follower,
    accepts_connections: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # 20 seconds otherwise
    store = mlflow.get_tracking_uri()
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        if accepts_connections:
            bound.listen()
        mlflow.set_tracking_uri(f"http://127.0.0.1:{bound.getsockname()[1]}")
        for _ in range(4):
            follower.poll()
    assert "the model registry does not answer" in str(follower.current.problem)
    mlflow.set_tracking_uri(store)
    make_champion("2")
    for _ in range(4):
        follower.poll()
    assert (follower.current.get().version, follower.current.problem) == ("2", None)
    assert capsys.readouterr().out.count("warning: ") == 1


def test_a_deleted_alias_leaves_the_model(follower: Follower, capsys: pytest.CaptureFixture[str]) -> None:
    registry.remove_alias("digits", "champion")
    for _ in range(2):
        follower.poll()
    assert follower.current.get().version == "1"
    assert "no version has the alias any more" in str(follower.current.problem)
    make_champion("1")
    follower.poll()
    assert follower.current.problem is None
    assert capsys.readouterr().out.count("\n") == 2


def test_a_champion_with_other_classes_or_sizes_is_taken_over_with_a_warning(
    follower: Follower, capsys: pytest.CaptureFixture[str]
) -> None:
    add_version(3, class_names=("a", "d"), image_size=40)
    make_champion("3")
    follower.poll()
    assert follower.current.get().version == "3"
    reported = capsys.readouterr().out
    assert "version 3 has other classes: a, d instead of a, b, c" in reported
    assert "version 3 accepts arrays (N, 40, 40, 3) and no longer (N, 32, 32, 3)" in reported


def test_a_champion_without_the_threshold_of_the_server_is_not_taken_over(project: Path) -> None:
    add_version(3, thresholds={0.95: 0.5})
    make_champion("3")
    follower = Follower(name="digits", alias="champion", coverage=0.95)
    make_champion("2")
    follower.poll()
    assert "version 2 cannot be served: --coverage is 0.95, but the model has no thresholds" in str(
        follower.current.problem
    )
    assert follower.current.get().version == "3"


def test_a_champion_that_computes_no_numbers_is_not_taken_over(follower: Follower) -> None:
    add_version(3, mean=(1e300,) * 3)
    make_champion("3")
    follower.poll()
    assert "version 3 cannot be served: models:/digits/3: found a non-finite" in str(follower.current.problem)
