"""MLFLOW_TRACKING_URI and other variables of MLflow are honored or refused in one line."""

import base64
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from pipeline.core.errors import TemporaryError, UserError
from pipeline.core.settings import get_settings
from pipeline.tracking.logger import RunLogger
from pipeline.tracking.runs import describe_dataset, find_or_create_run, training_run
from pipeline.tracking.store import connect
from pipeline.tracking.store_uri import check_recording, check_tracking_uri, missing_package, tracking_uri, unreachable

GOOD = [
    "sqlite:///mlflow.db",
    "sqlite:////a/b c/mlflow.db",
    "sqlite+pysqlite:///mlflow.db",
    "postgresql://me:pa#s@host/mlflow",
    "postgresql+psycopg://host/mlflow",
    "mysql+pymysql://host/mlflow",
    "http://host:5000",
    "https://me:secret@host/path",
    "http://[::1]:5000",
]
BAD = {
    "sqlite:mlflow.db": "has no three slashes",
    "sqlite://mlflow.db": "has no three slashes",
    "sqlite:///": "in memory",
    "sqlite://": "in memory",
    "sqlite:///:memory:": "in memory",
    "sqlite:///file:x?mode=memory&uri=true": "in memory",
    "sqlite:///file::memory:?uri=true": "in memory",
    "sqlite:///mlflow.db?mode=memory&uri=true": "in memory",
    "sqlite:///mlflow.db?uri=true&vfs=memdb": "in memory",
    "sqlite:///file:/x.db?uri=true": "has `file:` before the path",
    "http://": "names no host",
    "http:/host": "names no host",
    "http://[bad": "names no host",
    "http://host:port": "names no host",
    "databricks": "is no store",
    "databricks://profile": "is no store",
    "uc:http://host": "is no store",
    "localhost:5000": "is no store",
    "postgres://me:secret@host/mlflow": "is no store",
    " http://host": "is no store",
    "nonsense://me:secret@host": "is no store",
}


@pytest.mark.parametrize("uri", GOOD)
def test_a_store_that_mlflow_supports_is_accepted(uri: str) -> None:
    check_tracking_uri(uri)


@pytest.mark.parametrize("uri", BAD)
def test_a_uri_that_is_not_a_store_is_refused_with_the_allowed_forms(uri: str) -> None:
    with pytest.raises(UserError, match=f"MLFLOW_TRACKING_URI: found .*{BAD[uri]}.*; allowed: sqlite:///PATH") as error:
        check_tracking_uri(uri)
    assert "secret" not in str(error.value)
    assert "start that server" not in str(error.value)


@pytest.mark.parametrize("uri", ["file:///none/mlruns", "file:mlruns", "./mlruns", "mlruns", "/none/mlruns"])
def test_a_file_store_is_refused_with_the_alternative(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    with pytest.raises(UserError, match=r"a file store, .*allowed: sqlite:///PATH.*unset it to record into mlflow.db"):
        check_tracking_uri(uri)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("mlflow.db", "sqlite:///mlflow.db"),
        ("./x.sqlite", "sqlite:///x.sqlite"),
        ("file:///a/x.db", "sqlite:////a/x.db"),
        ("my%20runs.db", "sqlite+pysqlite:///my%2520runs.db"),
    ],
)
def test_a_database_path_without_a_scheme_is_refused_with_the_right_uri(uri: str, expected: str) -> None:
    with pytest.raises(UserError, match=r"found '.*', a file without the type of the database; allowed: ") as error:
        check_tracking_uri(uri)
    assert str(error.value).endswith(f"; set it to {expected}")


def test_a_file_is_not_mistaken_for_a_file_store_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "mlruns").touch()
    (tmp_path / "runs.db").mkdir()
    with pytest.raises(UserError, match=f"set it to sqlite:///{tmp_path}/mlruns"):
        check_tracking_uri(f"{tmp_path}/mlruns")
    with pytest.raises(UserError, match="a file store"):
        check_tracking_uri(f"{tmp_path}/runs.db")


@pytest.mark.parametrize("uri", ["file://{}", "{}"])
def test_a_file_store_with_runs_is_refused_with_the_command_that_copies_them(tmp_path: Path, uri: str) -> None:
    folder = tmp_path / "my runs" / "mlruns"
    folder.mkdir(parents=True)
    with pytest.raises(UserError) as error:
        check_tracking_uri(uri.format(str(folder).replace(" ", "%20") if uri.startswith("file") else folder))
    command = f"`mlflow migrate-filestore --source '{folder}' --target 'sqlite:///{folder}.db'`"
    assert command in str(error.value)


def test_the_flow_refuses_a_file_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    with pytest.raises(UserError, match="a file store"):
        tracking_uri(tmp_path)


def test_the_advice_in_an_error_fits_the_kind_of_store() -> None:
    assert "start that server" in unreachable("http://host:5000", "x")
    assert "start that database" in unreachable("postgresql://me:secret@host/mlflow", "x")
    assert "folder exists" in unreachable("sqlite:////none/mlflow.db", "x")
    assert "make install EXTRAS=postgresql" in missing_package("postgresql://me:secret@host/mlflow", "psycopg")
    assert "secret" not in missing_package("postgresql://me:secret@host/mlflow", "psycopg")


@pytest.mark.parametrize("name", ["MLFLOW_WORKSPACE", "MLFLOW_ENABLE_WORKSPACES"])
def test_a_workspace_needs_a_server(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "true")
    check_recording("http://host:5000")
    with pytest.raises(UserError, match=f"{name}: found 'true'; allowed only with an MLflow server"):
        check_recording("sqlite:///mlflow.db")


def test_an_mlflow_run_id_of_the_user_is_refused(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with pytest.raises(UserError, match=r"MLFLOW_RUN_ID: found '0+'; not allowed: .*unset it"):
        find_or_create_run("0" * 32, experiment="digits")
    with (
        pytest.raises(UserError, match="MLFLOW_RUN_ID"),
        training_run(
            experiment="digits", params={}, dataset=describe_dataset("digits", source=None, digest="0"), training="0"
        ),
    ):
        pass


def experiment_of(run: RunLogger) -> str:
    client = MlflowClient()
    return str(client.get_experiment(client.get_run(run.run_id).info.experiment_id).name)


def test_new_runs_belong_to_the_experiment_that_the_user_names(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect()
    mine = mlflow.create_experiment("mine")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", mine)
    get_settings.cache_clear()
    assert experiment_of(find_or_create_run("0" * 32, experiment="digits")[0]) == "mine"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    get_settings.cache_clear()
    assert experiment_of(find_or_create_run("1" * 32, experiment="digits")[0]) == "mine"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "other")
    get_settings.cache_clear()
    with pytest.raises(UserError, match=r"MLFLOW_EXPERIMENT_ID: found .*, the experiment mine, but .* is other"):
        find_or_create_run("2" * 32, experiment="digits")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID")
    get_settings.cache_clear()
    assert experiment_of(find_or_create_run("3" * 32, experiment="digits")[0]) == "other"


@pytest.mark.parametrize("value", ["99", "mine"])
def test_an_experiment_that_does_not_exist_is_refused(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", value)
    with pytest.raises(UserError, match=f"MLFLOW_EXPERIMENT_ID: found '{value}'; allowed: the id of an experiment in"):
        find_or_create_run("0" * 32, experiment="digits")


def test_metrics_are_sent_synchronously_whatever_the_setting(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "true")
    run, _ = find_or_create_run("0" * 32, experiment="digits")
    run.log({"loss": 1.0}, step=1)
    assert run.flush()
    assert MlflowClient().get_run(run.run_id).data.metrics == {"loss": 1.0}


class ServerWithLogin(http.server.BaseHTTPRequestHandler):
    """A server that answers with the status in its attribute, and keeps the logins that it receives."""

    def do_GET(self) -> None:
        self.server.logins.append(self.headers.get("Authorization"))  # type: ignore[attr-defined]
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server_with_login(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[http.server.ThreadingHTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), ServerWithLogin) as found:
        found.logins, found.status = [], 200  # type: ignore[attr-defined]
        threading.Thread(target=found.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{found.server_address[1]}")
        yield found
        found.shutdown()


def test_the_check_of_a_server_logs_in_as_mlflow_does(
    server_with_login: http.server.ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "token")
    connect()
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    connect()
    assert server_with_login.logins == ["Bearer token", f"Basic {base64.b64encode(b'me:secret').decode()}"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("status", "answers"), [(200, True), (401, True), (403, True), (404, False), (502, False)])
def test_a_server_that_refuses_the_login_counts_as_reachable(
    server_with_login: http.server.ThreadingHTTPServer, status: int, answers: bool
) -> None:
    server_with_login.status = status  # type: ignore[attr-defined]
    if answers:
        connect()
        return
    with pytest.raises(TemporaryError, match="does not answer"):
        connect()
