"""Health checks without servers; `test_deployments.py` has those with a real Prefect server and worker."""

import json
import shutil
import sqlite3
from collections import namedtuple
from contextlib import closing
from pathlib import Path

import pynvml
import pytest

from flows import doctor, health
from flows.health import Result, exit_status, run_check
from flows.settings import PrefectServer
from pipeline.core.errors import TemporaryError, UserError
from pipeline.tracking.sqlite_store import MLFLOW, revisions


@pytest.fixture
def project(tmp_path: Path, no_servers: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".dvc").mkdir()
    return tmp_path


def check(name: str, project: Path) -> Result:
    return run_check(name, health.CHECKS[name], project)


def test_without_a_server_worker_and_nightly_run_are_unknown(project: Path) -> None:
    result = check("prefect", project)
    assert (result.state, result.text[:43]) == ("wrong", "no server of this project is running; `pyth")
    assert [check(name, project).state for name in ("worker", "nightly")] == ["unknown", "unknown"]


def test_a_server_that_does_not_answer_is_wrong(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = PrefectServer("http://127.0.0.1:9/api", "PREFECT_API_URL")
    monkeypatch.setattr(health, "current_server", lambda _project: nobody)
    result = check("prefect", project)
    assert result.state == "wrong"
    assert "no server answers at http://127.0.0.1:9/api" in result.text
    assert check("worker", project).state == "unknown"


def test_a_store_is_unknown_before_the_first_run_and_counted_later(project: Path, mlflow_store: Path) -> None:
    assert check("mlflow", project).state == "unknown"
    shutil.copy(mlflow_store / "mlflow.db", project)
    with closing(sqlite3.connect(project / "mlflow.db")) as store, store:
        store.execute("INSERT INTO runs (run_uuid) VALUES ('a')")
    assert check("mlflow", project) == Result("mlflow", "ok", f"{project}/mlflow.db has 1 runs")


@pytest.mark.parametrize("content", [b"no database", None])
def test_a_damaged_store_or_one_of_another_version_is_wrong(
    project: Path, mlflow_store: Path, content: bytes | None
) -> None:
    shutil.copy(mlflow_store / "mlflow.db", project)
    if content:
        (project / "mlflow.db").write_bytes(content)
    else:
        with closing(sqlite3.connect(project / "mlflow.db")) as store, store:
            store.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    assert check("mlflow", project).state == "wrong"


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:9", "sqlite:////nowhere/mlflow.db", "postgresql://a:secret@127.0.0.1:9/x"]
)
def test_a_store_that_cannot_be_reached_is_not_ok(project: Path, monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    result = check("mlflow", project)
    assert result.state == ("unknown" if uri.startswith("sqlite") else "wrong")
    assert "secret" not in result.text


def test_little_room_on_the_disk_is_wrong(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", ["free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(9.5 * 2**30))
    result = check("disk", project)
    assert (result.state, result.text[:12]) == ("wrong", "9.5 GiB free")
    assert health.check_disk(project, min_free_gib=9).startswith("9.5 GiB free")


def fail(error: Exception) -> str:
    raise error


@pytest.mark.parametrize("error", [pynvml.NVMLError_LibraryNotFound(), pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)])
def test_a_missing_or_broken_gpu_is_wrong(project: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(health, "OTHER_GPUS", ())
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: fail(error))
    assert check("gpu", project).state == "wrong"


def test_a_gpu_of_another_kind_is_unknown(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "OTHER_GPUS", (project,))
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: fail(pynvml.NVMLError_LibraryNotFound()))
    assert check("gpu", project).state == "unknown"


@pytest.mark.parametrize(
    ("findings", "state"),
    [
        ([], "ok"),
        ([doctor.Finding("left", "removed", lambda: True)], "wrong"),
        ([doctor.Finding("damaged", "remove it")], "wrong"),
        ([doctor.Finding("not looked at"), doctor.Finding("left", "removed", lambda: True)], "wrong"),
        ([doctor.Finding("on another host")], "unknown"),
    ],
)
def test_what_killed_runs_left_is_found_and_not_fixed(
    project: Path, monkeypatch: pytest.MonkeyPatch, findings: list[doctor.Finding], state: str
) -> None:
    monkeypatch.setattr(health, "LEFTOVERS", (lambda _project: iter(findings),))
    assert check("leftovers", project).state == state


@pytest.mark.parametrize("error", [UserError("a"), TemporaryError("b"), OSError("c")])
def test_a_check_that_fails_is_never_ok(project: Path, error: Exception) -> None:
    assert run_check("disk", lambda _project: fail(error), project).state == "unknown"


@pytest.mark.parametrize("change", ["none", "moved", "of another version"])
def test_the_store_is_not_changed(
    project: Path, mlflow_store: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path = Path(shutil.copy(mlflow_store / "mlflow.db", project))
    with closing(sqlite3.connect(path)) as store, store:
        if change == "moved":
            place = "file:///nowhere/mlartifacts/1/a/artifacts"
            store.execute("INSERT INTO runs (run_uuid, experiment_id, artifact_uri) VALUES ('a', 0, ?)", (place,))
        elif change == "of another version":
            store.execute("UPDATE alembic_version SET version_num = ?", (sorted(revisions(MLFLOW)[0])[0],))
    before = path.read_bytes()
    monkeypatch.setattr(health, "LEFTOVERS", [one for one in health.LEFTOVERS if one.__name__ == "mlflow_runs"])
    result = check("leftovers", project)
    assert result.state == ("ok" if change == "none" else "unknown"), result.text
    check("mlflow", project)
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["-1", "x", "nan", "inf"])
def test_an_amount_of_free_space_that_is_not_allowed_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    monkeypatch.setattr("sys.argv", ["health", f"--min-free={text}"])
    with pytest.raises(SystemExit) as ended:
        health.main()
    assert ended.value.code == 2
    assert f"found '{text}'; allowed: a number of GiB, 0 or more; correct it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("states", "status"), [("ok ok", 0), ("ok unknown", 3), ("unknown wrong ok", 1), ("wrong", 1), ("unknown", 3)]
)
def test_the_exit_status_has_the_worst_state(states: str, status: int) -> None:
    assert exit_status([Result("disk", state, "") for state in states.split()]) == status  # type: ignore[arg-type]


def test_programs_get_json(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(health, "PROJECT", project)
    others = [name for name in health.CHECKS if name != "disk"]
    monkeypatch.setattr("sys.argv", ["health", "--json", "--min-free", "0", "--skip", *others])
    with pytest.raises(SystemExit) as ended:
        health.main()
    [result] = json.loads(capsys.readouterr().out)
    assert (ended.value.code, result["check"], result["state"]) == (0, "disk", "ok")
