"""Each setting of MLflow and Prefect is honored, refused in one line, or irrelevant, as docs/settings.md states."""

import fnmatch
import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import mlflow.cli
import mlflow.environment_variables
import pytest
from prefect.context import root_settings_context
from prefect.settings import PREFECT_API_URL, Settings, get_current_settings, temporary_settings
from prefect.settings.legacy import _get_settings_fields

from flows import server, settings, ui
from flows.ports import free_port
from flows.prefect_server import current_server, ensure_server
from flows.settings import PrefectServer, check_own_server, configured_server, named_port, own_server_environment
from pipeline.core.errors import TemporaryError, UserError
from pipeline.core.settings import get_settings, read_settings
from tests.conftest import PROJECT

# Patterns in the names of variables that change where something is recorded or served.
MLFLOW_NAMES = (
    r"_URI$|_STORE|EXPERIMENT|RUN_ID|RUN_NAME|RUN_CONTEXT|MLFLOW_TRACKING|_HOST|_PORT$|WORKSPACE|REGISTRY|ACTIVE_MODEL"
    "|ENABLE_ASYNC_LOGGING|_ENDPOINT_URL|_DESTINATION"
)
PREFECT_NAMES = (
    r"API_(URL|KEY|AUTH|BASE|HOST|PORT)|_HOST$|_PORT$|DATABASE_|HOME|PROFILE|UI_|RESULT|WORK_POOL|EPHEMERAL|STORAGE"
    "|CUSTOM_HEADERS|LOGGING|TEST_MODE|CLOUD_(API|UI)|DOCKET|MESSAGING|RETRIES|RETRY_DELAY|SSL|TLS|CACHE"
)
PROBE = """
from flows.settings import configured_server
from pipeline.core.errors import report_errors
with report_errors():
    print(configured_server())
"""
Enter = Callable[..., AbstractContextManager[object]]


def mlflow_variables() -> set[str]:
    kind = mlflow.environment_variables._EnvironmentVariable
    found = {value.name for value in vars(mlflow.environment_variables).values() if isinstance(value, kind)}
    return {name for name in found if re.search(MLFLOW_NAMES, name)} | mlflow_server_variables()


def mlflow_server_variables() -> set[str]:
    return {str(option.envvar) for option in mlflow.cli.server.params if option.envvar}


def prefect_settings() -> set[str]:
    names = {name for name in _get_settings_fields(Settings) if name.startswith("PREFECT_")}
    return {name for name in names if re.search(PREFECT_NAMES, name)}


@pytest.mark.parametrize("find", [mlflow_variables, prefect_settings])
def test_every_variable_that_changes_a_location_is_documented(find: object) -> None:
    text = (PROJECT / "docs/settings.md").read_text(encoding="utf-8")
    patterns = [name for row in re.findall(r"(?m)^\| ([^|]*) \|", text) for name in re.findall(r"`([^`]+)`", row)]
    assert callable(find)
    assert not [name for name in find() if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def test_the_test_files_that_the_table_names_exist() -> None:
    text = (PROJECT / "docs/settings.md").read_text(encoding="utf-8")
    assert all((PROJECT / "tests" / name).exists() for name in re.findall(r"`(test_\w+\.py)`", text))


@pytest.fixture
def prefect_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Enter:
    """Return a context manager that loads Prefect's settings as a process in the temporary folder, with variables."""
    for name in [name for name in os.environ if name.upper().startswith("PREFECT_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(settings, "_SETTINGS_FOLDER", tmp_path)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / ".prefect"))

    @contextmanager
    def enter(**variables: str) -> Iterator[None]:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        # the first context sets the path of the profiles, and the second reads them
        with root_settings_context(), root_settings_context():
            yield

    return enter


def start_in(folder: Path, **variables: str) -> tuple[int, str]:
    """Start a process in the folder that prints the configured server, and return its exit status and output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(PROJECT), "HOME": str(folder), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


URL = "http://127.0.0.1:4298/api"
FILES = {
    ".prefect/profiles.toml": f'active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "{URL}"\n',
    ".env": f"PREFECT_API_URL={URL}\n",
    "prefect.toml": f'[api]\nurl = "{URL}"\n',
    "pyproject.toml": f'[tool.prefect.api]\nurl = "{URL}"\n',
}
SOURCES = {
    ".prefect/profiles.toml": "PREFECT_API_URL in profile 'mine' of {file}",
    ".env": "PREFECT_API_URL in {file}",
    "prefect.toml": "api.url in {file}",
    "pyproject.toml": "tool.prefect.api.url in {file}",
}


@pytest.mark.parametrize("name", FILES)
def test_the_file_that_names_the_server_is_reported(tmp_path: Path, prefect_in: Enter, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(FILES[name])
    with prefect_in():
        assert configured_server() == PrefectServer(URL, SOURCES[name].format(file=path))
    with prefect_in(prefect_api_url="http://elsewhere/api"):
        assert configured_server() == PrefectServer("http://elsewhere/api", "PREFECT_API_URL")


def test_the_projects_own_server_is_used_if_none_is_configured(tmp_path: Path, prefect_in: Enter) -> None:
    with prefect_in():
        assert configured_server() is None
    (tmp_path / ".prefect").mkdir(exist_ok=True)
    (tmp_path / ".prefect/profiles.toml").write_text(FILES[".prefect/profiles.toml"])
    with prefect_in(PREFECT_PROFILE="ephemeral"):
        assert configured_server() is None


def test_a_url_printed_by_make_prefect_env_is_not_assumed_to_be_our_server(
    tmp_path: Path, prefect_in: Enter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_OWN_PREFECT_API_URL", URL)
    with prefect_in(PREFECT_API_URL=URL):  # the URL may be of another checkout
        assert configured_server() == PrefectServer(URL, "PREFECT_API_URL")
        monkeypatch.setattr(settings, "PROJECT", tmp_path)
        assert configured_server() is None
        assert current_server(tmp_path) is None  # whatever server answers there


def test_a_profile_that_prefect_ships_is_honored(prefect_in: Enter) -> None:
    with prefect_in(PREFECT_PROFILE="local"):
        found = configured_server()
    assert found
    assert (found.api_url, "profile 'local'" in str(found.source)) == ("http://127.0.0.1:4200/api", True)


def test_the_users_profile_is_used_unless_prefect_home_names_another_folder(tmp_path: Path) -> None:
    (tmp_path / ".prefect").mkdir()
    (tmp_path / ".prefect/profiles.toml").write_text(FILES[".prefect/profiles.toml"])
    assert f"PREFECT_API_URL in profile 'mine' of {tmp_path}/.prefect/profiles.toml" in start_in(tmp_path)[1]
    assert start_in(tmp_path, PREFECT_HOME=str(tmp_path / "home")) == (0, "None\n")


def test_a_server_that_does_not_answer_is_reported_in_one_line_with_its_source(prefect_in: Enter) -> None:
    address = f"http://me:secret@127.0.0.1:{free_port()}/api"
    message = "^PREFECT_API_URL: no server answers at http://127.0.0.1:.*; start it, or unset it to use our own$"
    with prefect_in(PREFECT_API_URL=address), pytest.raises(TemporaryError, match=message):
        ensure_server()


class UnusableServer(http.server.BaseHTTPRequestHandler):
    """A server that is healthy but unusable: no Prefect API, an old version, or a refused login, as its path states."""

    def do_GET(self) -> None:
        _, kind, *rest = self.path.split("/")
        refuses = kind == "login" and rest != ["health"]
        self.send_response(401 if refuses else 200)
        self.end_headers()
        self.wfile.write({"html": b"<html></html>", "old": b'"2.0.0"', "login": b'{"detail": "Unauthorized"}'}[kind])

    def log_message(self, *_: object) -> None:
        pass


UNUSABLE = {
    "html": "does not answer as Prefect's API does",
    "old": "incompatible versions",
    "login": "refuses the login",
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_an_unusable_server_is_reported_in_one_line(prefect_in: Enter, kind: str) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), UnusableServer) as unusable:
        threading.Thread(target=unusable.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{unusable.server_address[1]}/{kind}"
        with (
            prefect_in(PREFECT_API_URL=address),
            pytest.raises(UserError, match=f"PREFECT_API_URL: .*{UNUSABLE[kind]}"),
        ):
            ensure_server()
        unusable.shutdown()


@pytest.mark.parametrize("address", ["localhost:4200/api", "ftp://host/api", "http://host:port/api", "http:///api"])
def test_an_invalid_url_is_refused(prefect_in: Enter, address: str) -> None:
    message = "PREFECT_API_URL: found .*, no address of a server; allowed: the address of Prefect's API"
    with prefect_in(PREFECT_API_URL=address), pytest.raises(UserError, match=message):
        ensure_server()


REFUSED = {
    "PREFECT_PROFILE": ("gone", "PREFECT_PROFILE: found 'gone', which is no Prefect profile; allowed: "),
    "PREFECT_SERVER_API_HOST": ("0.0.0.0", "PREFECT_SERVER_API_HOST: found '0.0.0.0'; allowed: 127.0.0.1"),
    "PREFECT_SERVER_API_AUTH_STRING": ("me:secret", "PREFECT_SERVER_API_AUTH_STRING: .* differs; set both alike"),
    "PREFECT_SERVER_DATABASE_CONNECTION_URL": ("sqlite+aiosqlite:///:memory:", "found a database in memory"),
    "ALL_PROXY": ("socks4://127.0.0.1:9", "ALL_PROXY: found a proxy of the kind socks4://"),
    "http_proxy": ("ftp://127.0.0.1:9", "http_proxy: found a proxy of the kind ftp://"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_cannot_be_honored_is_refused_in_one_line(prefect_in: Enter, name: str) -> None:
    value, message = REFUSED[name]
    with prefect_in(**{name: value}), pytest.raises(UserError, match=message) as error:
        configured_server()
        check_own_server()
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_value_that_prefect_cannot_read_is_reported_in_one_line(tmp_path: Path) -> None:
    status, text = start_in(tmp_path, PREFECT_SERVER_API_PORT="abc")
    assert status == 2
    assert re.search("^error: Prefect's settings: .*'abc'", text.splitlines()[-1])
    assert "Traceback" not in text


def test_the_port_in_the_setting_of_prefect_is_used(prefect_in: Enter) -> None:
    with prefect_in():
        assert named_port() == (None, "PREFECT_PORT")
    with prefect_in(PREFECT_SERVER_API_PORT="4321"):
        assert named_port() == (4321, "PREFECT_SERVER_API_PORT")
    with prefect_in(PREFECT_PORT="4322"):
        assert named_port() == (4322, "PREFECT_PORT")


def test_links_lead_to_our_server() -> None:
    assert PrefectServer("http://127.0.0.1:4201/api", None).environment()["PREFECT_UI_URL"] == "http://127.0.0.1:4201"
    assert "PREFECT_UI_URL" not in PrefectServer("http://host/api", "PREFECT_API_URL").environment()


def test_make_ui_shows_the_server_that_the_profile_names(tmp_path: Path) -> None:
    with temporary_settings({PREFECT_API_URL: "http://me:secret@host:4298/api"}), ui.prefect_server(tmp_path) as found:
        assert found.startswith("http://host:4298 (yours, from ")


def test_our_mlflow_server_stays_on_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HOST", "0.0.0.0")
    with (
        pytest.raises(UserError, match=r"MLFLOW_HOST: found '0\.0\.0\.0'; allowed: 127\.0\.0\.1"),
        ui.mlflow_server(tmp_path),
    ):
        pass


def test_settings_that_change_the_location_of_mlflows_server_are_not_passed_on() -> None:
    harmless = r"MLFLOW_SERVER_|MLFLOW_EXPOSE_PROMETHEUS|MLFLOW_TRACE_ARCHIVAL_CONFIG"
    left = {name for name in mlflow_server_variables() if not re.match(harmless, name)}
    assert left <= set(ui.MLFLOW_VARIABLES_NOT_PASSED_ON)


def test_settings_do_not_change_the_location_of_our_prefect_server(prefect_in: Enter) -> None:
    port = free_port()
    elsewhere = {
        "PREFECT_SERVER_API_BASE_PATH": "/x",
        "PREFECT_UI_API_URL": "http://host",
        "PREFECT_UI_SERVE_BASE": "/y",
    }
    with prefect_in(**{**elsewhere, **own_server_environment(port, home=Path("/x"))}):
        found = get_current_settings()
    assert found.server.api.base_path == "/api"
    assert found.api.url == found.server.ui.api_url == server.Server(1, "", port).api_url
    assert (found.server.ui.serve_base, found.server.api.port) == ("/", port)


def test_an_empty_name_of_the_experiment_hides_that_of_dvc() -> None:
    assert read_settings({"DVC_EXP_NAME": "a"}).experiment == "a"
    assert read_settings({"DVC_EXP_NAME": "a", "PIPELINE_EXPERIMENT": ""}).experiment == ""


def test_variables_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = get_settings()
    monkeypatch.setenv("PIPELINE_FLOW_RUN_ID", "f-1")
    assert get_settings() is found
    get_settings.cache_clear()
    assert (get_settings().in_flow_clone, get_settings().flow_run_id) == (True, "f-1")
