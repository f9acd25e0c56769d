"""Retention, with real experiments of DVC, and real runs, models and registered versions in MLflow."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from sqlite3 import connect as open_sqlite
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from flows import cleanup
from flows.cleanup import clean_up
from flows.dvc_history import list_experiments
from flows.dvc_state import cache_folder, is_cached, missing_outputs, outputs
from flows.ports import free_port
from pipeline.core.errors import TemporaryError
from pipeline.core.processes import HOST
from pipeline.core.settings import get_settings
from pipeline.tracking.provenance import PROJECT, tag_name
from pipeline.tracking.registry import find_versions
from pipeline.tracking.search import Run, find_runs
from pipeline.tracking.store import connect
from tests import test_dvc_experiments
from tests.test_dvc_experiments import command
from tests.test_outage import Server

pytestmark = pytest.mark.slow

baseline = test_dvc_experiments.project  # a fixture: a committed project with one training
CHANGES = {
    "branched": ["evaluate.top_k=3"],
    "first": ["train.seed=1"],
    "champion": ["train.seed=3"],
    "shared": ["train.seed=5"],
    "newest": ["train.seed=5", "evaluate.top_k=2"],
}
"""The experiments, oldest first. `newest` takes its model from the cache: MLflow has one run for both."""
MODEL = "images"  # named after the folder of the images; `evaluate` registers its versions


@pytest.fixture(scope="module")
def template(baseline: Path) -> Path:
    """A project with five experiments, whose models are registered; one has an alias."""
    for name, changes in CHANGES.items():
        options = [word for change in changes for word in ("-S", change)]
        command("dvc", "exp", "run", "-n", name, *options, folder=baseline)
    command("git", "checkout", "-q", ".", folder=baseline)
    command("dvc", "checkout", folder=baseline)
    command("dvc", "exp", "branch", "branched", "a-branch", folder=baseline)
    with working_in(baseline):
        MlflowClient().set_registered_model_alias(MODEL, "champion", version_of(runs_by_name()["champion"]))
    return baseline


@pytest.fixture
def project(template: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the template, which is the current folder."""
    copy_with_runs(template, tmp_path / "project")
    with working_in(tmp_path / "project"):
        yield tmp_path / "project"


def copy_with_runs(template: Path, project: Path) -> None:
    """Copy the template as if the copy had made the runs in its store."""
    shutil.copytree(template, project, symlinks=True)
    with closing(open_sqlite(project / "mlflow.db")) as store:
        store.execute("UPDATE tags SET value = ? WHERE key = ?", (str(project.resolve()), tag_name(PROJECT)))
        store.commit()


@contextmanager
def working_in(project: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(project)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{project}/mlflow.db"
    get_settings.cache_clear()
    connect()
    yield
    os.chdir(before)
    os.environ.pop("MLFLOW_TRACKING_URI")


def runs_by_name() -> dict[str, Run]:
    return {run.tags["dvc.experiment"]: run for run in find_runs({"dvc.experiment": "%"})}


def version_of(run: Run) -> str:
    """Return the number of the version that `evaluate` has registered."""
    return next(one.number for one in find_versions(MODEL) if one.run_id == run.run_id)


def experiments(project: Path) -> set[str]:
    return {one.name for one in list_experiments(project)}


def state(project: Path) -> dict[str, Any]:
    """What there is of experiments, of files in DVC's cache and run cache, of artifacts, and of rows in MLflow."""
    rows = {}
    with closing(open_sqlite(project / "mlflow.db")) as store:
        versions = "SELECT version FROM model_versions WHERE current_stage != 'Deleted_Internal'"
        rows["model_versions"] = {row[0] for row in store.execute(versions)}
        for table, column in {"runs": "run_uuid", "logged_models": "model_id"}.items():
            rows[table] = {row[0] for row in store.execute(f"SELECT {column} FROM {table}")}
        for table in ("metrics", "params", "tags"):
            rows[table] = {row[0] for row in store.execute(f"SELECT DISTINCT run_uuid FROM {table}")}
    places = {".dvc/cache": "files/md5/??/*", ".dvc/cache/runs": "*/*/*", "mlartifacts": "**/*"}
    files = {
        place: {str(path.relative_to(project)) for path in (project / place).glob(pattern) if path.is_file()}
        for place, pattern in places.items()
    }
    return {"experiments": experiments(project), **rows, **files}


def size(project: Path) -> int:
    folders = (project / ".dvc/cache", project / "mlartifacts")
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def run_module(project: Path, name: str, *arguments: str, status: int = 0) -> str:
    return command(sys.executable, "-m", name, *arguments, folder=project, status=status)


def test_what_is_old_goes_and_all_else_still_works(project: Path) -> None:
    before, bytes_before, runs = state(project), size(project), runs_by_name()
    removed_version = int(version_of(runs["first"]))
    reports = project / "artifacts/reports"
    reports.mkdir()
    for name in ("first", "newest", "removed-by-hand"):
        (reports / f"{name}.html").touch()
    planned = run_module(project, "flows.cleanup", "--keep", "1", "--dry-run").splitlines()
    assert (state(project), size(project)) == (before, bytes_before)
    done = run_module(project, "flows.cleanup", "--keep", "1").splitlines()
    assert done[:-1] == planned[:-1]
    assert planned[-1] == f"would {done[-1].replace('freed', 'free')}; nothing was removed"
    assert float(done[-1].split()[1]) == pytest.approx((bytes_before - size(project)) / 1e6, abs=0.05)
    assert any("champion" in line and "has the alias champion" in line for line in done)
    assert {"report      first.html, 0.0 MB", "report      removed-by-hand.html, 0.0 MB"} < {*done}
    assert [path.name for path in reports.iterdir()] == ["newest.html"]

    after = state(project)
    assert after["experiments"] == {"branched", "champion", "newest"}
    assert before["model_versions"] - after["model_versions"] == {removed_version}
    for table in ("runs", "metrics", "params", "tags"):
        assert before[table] - after[table] == {runs["first"].run_id}, table
    assert len(before["logged_models"] - after["logged_models"]) == 1
    assert not (project / "mlartifacts" / runs["first"].run_id).exists()
    assert len(after[".dvc/cache"]) < len(before[".dvc/cache"])
    assert len(after[".dvc/cache/runs"]) < len(before[".dvc/cache/runs"])
    assert run_module(project, "flows.cleanup", "--keep", "1").splitlines()[-1] == "nothing to remove"

    assert "up to date" in command("dvc", "status", folder=project)
    assert "up to date" in command("dvc", "repro", folder=project)
    assert "- newest" in run_module(project, "flows.experiments")
    assert "found" not in run_module(project, "flows.doctor")
    picture = "artifacts/evaluate/confusion_matrix.png"
    assert "class " in run_module(project, "pipeline.predict", "--model", f"models:/{MODEL}@champion", picture)
    assert runs["shared"].run_id in run_module(project, "flows.trace", "newest")
    for name in ("newest", "champion", "branched"):
        command("dvc", "exp", "apply", name, folder=project)
        assert "Running stage" not in command("dvc", "repro", folder=project)
        command("git", "checkout", "-q", ".", folder=project)
    said = command("dvc", "exp", "run", "-n", "again", "-S", "train.seed=1", folder=project)
    assert "Running stage 'train'" in said
    assert size(project) == pytest.approx(bytes_before, rel=0.3)


def test_a_model_taken_from_the_cache_goes_with_the_last_experiment_that_has_it(project: Path) -> None:
    shared = runs_by_name()["shared"].run_id
    clean_up(project, keep=1, dry_run=False)
    assert shared in state(project)["runs"]
    clean_up(project, keep=0, dry_run=False)
    assert state(project)["experiments"] == {"branched", "champion"}
    assert shared not in state(project)["runs"]


def add_tag(run: Run) -> None:
    MlflowClient().set_tag(run.run_id, "keep", "for the paper")


def add_version_with_alias(run: Run) -> None:
    version = mlflow.register_model(f"runs:/{run.run_id}/model", "other")
    MlflowClient().set_registered_model_alias("other", "fallback", version.version)


def add_version_with_tag(run: Run) -> None:
    version = mlflow.register_model(f"runs:/{run.run_id}/model", "other")
    MlflowClient().set_model_version_tag("other", version.version, "keep", "")


def set_running(run: Run) -> None:
    client = MlflowClient()
    client.set_tag(run.run_id, tag_name(HOST), "another-host")
    client.update_run(run.run_id, status="RUNNING")


def add_git_tag(run: Run) -> None:
    [ref] = [one.ref for one in list_experiments(Path.cwd()) if one.name == run.tags["dvc.experiment"]]
    command("git", "tag", "of-an-experiment", ref, folder=Path.cwd())


@pytest.mark.parametrize("use", [add_tag, add_version_with_alias, add_version_with_tag, set_running, add_git_tag])
def test_an_old_experiment_that_is_in_use_stays_whole(project: Path, use: Callable[[Run], None]) -> None:
    use(runs_by_name()["first"])
    before = state(project)
    [first] = [one for one in list_experiments(project) if one.name == "first"]
    clean_up(project, keep=3, dry_run=False)
    after = state(project)
    assert {name: after[name] for name in after if "cache" not in name} == {
        name: before[name] for name in before if "cache" not in name
    }
    assert missing_outputs(project, first.commit) == []


def mlflow_row(project: Path, run: Run) -> bool:
    return run.run_id in state(project)["runs"]


def test_a_run_without_project_in_a_store_outside_the_project_stays(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = runs_by_name()["first"]
    MlflowClient().delete_tag(first.run_id, tag_name(PROJECT))
    shutil.move(project / "mlflow.db", tmp_path / "shared.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/shared.db")
    get_settings.cache_clear()
    clean_up(project, keep=1, dry_run=False)
    assert f"kept        MLflow run {first.run_id} ({first.name}): it is not certain" in capsys.readouterr().out
    assert "first" not in experiments(project)
    assert first.run_id in {run.run_id for run in find_runs({"model.md5": "%"})}
    assert (project / "mlartifacts" / first.run_id).is_dir()


@pytest.mark.parametrize("experiment", ["first", "of another machine"])
@pytest.mark.parametrize("tag", [HOST, PROJECT])
def test_a_run_that_another_machine_or_project_recorded_here_stays(project: Path, tag: str, experiment: str) -> None:
    first = runs_by_name()["first"]
    MlflowClient().set_tag(first.run_id, tag_name(tag), "another")
    MlflowClient().set_tag(first.run_id, "dvc.experiment", experiment)
    clean_up(project, keep=1, dry_run=False)
    assert "first" not in experiments(project)
    assert mlflow_row(project, first)
    assert (project / "mlartifacts" / first.run_id).is_dir()


def test_a_run_without_project_of_an_experiment_that_is_not_known_stays(project: Path) -> None:
    first = runs_by_name()["first"]
    MlflowClient().delete_tag(first.run_id, tag_name(PROJECT))
    MlflowClient().set_tag(first.run_id, "dvc.experiment", "unknown here")
    clean_up(project, keep=1, dry_run=False)
    assert mlflow_row(project, first)


def test_a_run_whose_files_are_elsewhere_stays(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = runs_by_name()["first"]
    elsewhere = tmp_path / "elsewhere" / first.run_id
    shutil.move(project / "mlartifacts" / first.run_id, elsewhere)
    with closing(open_sqlite(project / "mlflow.db")) as store:
        values = (f"{elsewhere.as_uri()}/artifacts", first.run_id)
        store.execute("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", values)
        store.commit()
    clean_up(project, keep=1, dry_run=False)
    assert f"its files are in {elsewhere}, not in mlartifacts here" in capsys.readouterr().out
    assert mlflow_row(project, first)
    assert (elsewhere / "artifacts").is_dir()


def test_on_a_server_a_run_is_only_marked_as_deleted(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = runs_by_name()["first"], runs_by_name()["shared"]
    (project / "mlflow.db").rename(project / "server.db")  # as `Server` names it
    served = Server(project)
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", served.uri)
        get_settings.cache_clear()
        connect()
        clean_up(project, keep=1, dry_run=False)
        client = MlflowClient()
        assert client.get_run(first.run_id).info.lifecycle_stage == "deleted"
        assert client.get_run(other.run_id).info.lifecycle_stage == "active"
        assert (project / "mlartifacts" / first.run_id).is_dir()
    finally:
        served.kill()


POINTS: dict[str, tuple[Any, str, int]] = {
    "the version is deleted": (MlflowClient, "delete_logged_model", 1),
    "the model is marked": (MlflowClient, "delete_run", 1),
    "the run is marked": (shutil, "rmtree", 1),
    "the run's files are gone": (shutil, "rmtree", 2),
    "all files are gone": (SqlAlchemyStore, "_hard_delete_logged_model", 1),
    "the model is gone": (SqlAlchemyStore, "_hard_delete_run", 1),
    "the run is gone": (cleanup, "remove_experiments", 1),
    "the experiments are gone": (cleanup, "remove_entries", 1),
    "an entry of the run cache is moved": (shutil, "rmtree", 3),
    "the run cache is clean": (cleanup, "remove_files", 2),
    "some files are gone": (Path, "unlink", 4),
}
"""Where a cleanup is killed: before the n-th call of a function."""


@pytest.fixture(scope="module")
def cleaned(template: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The state after a cleanup that nothing disturbs."""
    project = tmp_path_factory.mktemp("cleaned") / "project"
    copy_with_runs(template, project)
    with working_in(project):
        clean_up(project, keep=1, dry_run=False)
        return state(project)


@pytest.mark.parametrize("point", POINTS)
def test_what_a_killed_cleanup_left_the_next_one_removes(project: Path, cleaned: dict[str, Any], point: str) -> None:
    child = os.fork()
    if not child:
        kill_at(*POINTS[point])
        clean_up(project, keep=1, dry_run=False)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert state(project) != cleaned
    assert all(any(key.iterdir()) for key in (project / ".dvc/cache/runs").glob("*/*")), "DVC fails at an empty folder"
    for run in runs_by_name().values():
        assert (project / "mlartifacts" / run.run_id).is_dir(), "an active run without its files"
    clean_up(project, keep=1, dry_run=False)
    assert state(project) == cleaned


def kill_at(owner: Any, name: str, number: int) -> None:
    original, calls = getattr(owner, name), []

    def counted(*values: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*values, **options)

    setattr(owner, name, counted)


def damage_ref(project: Path) -> None:
    ref = project / ".git" / list_experiments(project)[-1].ref
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text("1" * 40)


def damage_listing(project: Path) -> None:
    newest = list_experiments(project)[0].commit
    lock = command("git", "show", f"{newest}:dvc.lock", folder=project)
    [md5] = {word for word in lock.split("artifacts/train\n")[1].split() if word.endswith(".dir")}
    path = cache_folder(project) / md5[:2] / md5[2:]
    path.chmod(0o644)
    path.write_text("{")


def damage_store(project: Path) -> None:
    (project / "mlflow.db").write_bytes(b"SQLite format 3\0" + b"x" * 2000)


@pytest.mark.parametrize("damage", [damage_ref, damage_listing, damage_store])
def test_a_question_without_an_answer_stops_before_anything_is_removed(
    project: Path, damage: Callable[[Path], None]
) -> None:
    damage(project)
    before = size(project)
    said = run_module(project, "flows.cleanup", "--keep", "1", status=2)
    assert len(said.splitlines()) == 1, said
    assert size(project) == before
    assert command("git", "for-each-ref", "--format=%(refname)", "refs/exps", folder=project).count("first") == 1


def test_a_server_that_does_not_answer_stops_it_too(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = state(project)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    get_settings.cache_clear()
    with pytest.raises(TemporaryError, match="which does not answer"):
        clean_up(project, keep=0, dry_run=False)
    assert state(project) == before


def test_files_of_stashes_kept_clones_and_the_checkout_stay(project: Path) -> None:
    for name in ("first", "branched"):
        command("dvc", "exp", "apply", name, folder=project)
        command("git", "stash", folder=project)
    command("dvc", "exp", "apply", "newest", folder=project)
    (project / ".dvc/tmp/kept/clone").mkdir(parents=True)
    shutil.copy(project / "dvc.lock", project / ".dvc/tmp/kept/clone")
    command("dvc", "exp", "apply", "branched", folder=project)  # DVC keeps a ref to the last one applied
    command("dvc", "exp", "remove", "--all-commits", folder=project)
    clean_up(project, keep=0, dry_run=False)
    assert missing_outputs(project) == []
    assert missing_outputs(project, "stash@{0}") == []
    assert missing_outputs(project, "stash@{1}") == []
    locked = outputs((project / ".dvc/tmp/kept/clone/dvc.lock").read_text())
    assert [path for path, md5 in locked.items() if not is_cached(cache_folder(project), md5)] == []


def test_a_cache_that_other_projects_may_use_stays(project: Path, tmp_path: Path) -> None:
    shutil.move(project / ".dvc/cache", tmp_path / "cache")
    command("dvc", "cache", "dir", "--local", str(tmp_path / "cache"), folder=project)
    before = {path for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    said = run_module(project, "flows.cleanup", "--keep", "1")
    assert "other projects may use this cache" in said
    assert {path for path in (tmp_path / "cache").rglob("*") if path.is_file()} == before
