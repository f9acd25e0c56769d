"""Deployments run with a real Prefect server, work pool and worker on loopback, and with stages that take no time."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from prefect.states import Crashed, Scheduled
from prefect.types._datetime import now

from flows import deployments, health, server, train_classifier
from flows.form import Overrides
from flows.ports import free_port
from flows.seed_values import seed_of_day
from pipeline.core.errors import UserError
from pipeline.core.stage_code import stage_names
from pipeline.core.yaml import read_yaml
from pipeline.params import Params
from tests.conftest import PROJECT
from tests.test_flows import dvc, make_project, running_in, wait_until

DEPLOYMENT = "train-classifier/on-demand"
RECIPES = sorted(path.stem for path in (PROJECT / "recipes").glob("*.yaml"))


class Site:
    """A project in which a worker runs."""

    def __init__(self, project: Path, api_url: str) -> None:
        self.project = project
        self.environment = {**os.environ, "PREFECT_API_URL": api_url, "PREFECT_HOME": str(project / ".prefect")}

    def cli(self, *arguments: str) -> tuple[int, str]:
        """Run the prefect command, and return its exit status and its output as one line."""
        command = [sys.executable, "-m", "prefect", *arguments]
        done = subprocess.run(command, cwd="/", env=self.environment, capture_output=True, text=True, check=False)
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    def start(self, **overrides: Any) -> UUID:
        """Start a run of the deployment, and return its id; `train__epochs=3` sets train.epochs."""
        values = json.dumps({name.replace("__", "."): value for name, value in overrides.items()})
        status, text = self.cli("deployment", "run", DEPLOYMENT, "-p", "recipe=digits", "-p", f"overrides={values}")
        assert status == 0, text
        return UUID(text.partition("UUID: ")[2].split()[0])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, stores: Path) -> Iterator[Site]:
    """Run `python -m flows.worker`, which starts a server, in a project with toy stages, and yield that project."""
    folder = tmp_path_factory.mktemp("site")
    project = make_project(folder)
    shutil.copy(PROJECT / "prefect.yaml", project)
    (project / ".prefect").mkdir()
    shutil.copy(stores / "prefect.db", project / ".prefect")
    environment = {**os.environ, "TOY": str(folder), "PREFECT_HOME": str(project / ".prefect")}
    environment |= {"PREFECT_PORT": str(free_port()), "PREFECT_API_URL": ""}
    environment.pop("MLFLOW_TRACKING_URI", None)
    with (folder / "worker.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.worker"], cwd=project, env=environment, stdout=log, stderr=log
        )
    try:
        wait_until(lambda: "started!" in (folder / "worker.log").read_text() or process.poll() is not None)
        found = server.running(project)
        assert found, (folder / "worker.log").read_text()
        with temporary_settings({PREFECT_API_URL: found.api_url, PREFECT_HOME: project / ".prefect"}):
            yield Site(project, found.api_url)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()
        server.stop(project)
    assert not running_in(project)


def flow_run(run_id: UUID) -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(run_id)


def wait_for_end(run_id: UUID) -> FlowRun:
    wait_until(lambda: bool((state := flow_run(run_id).state) and state.is_final()))
    return flow_run(run_id)


def has_begun(site: Site, stage: str) -> bool:
    ran = site.project.parent / "ran"
    return ran.exists() and stage in ran.read_text().split()


def test_a_deployment_run_applies_overrides_and_saves_an_experiment(site: Site) -> None:
    run = wait_for_end(site.start(train__epochs=9, train__weights=None))
    assert run.state
    assert run.state.name == "Completed", run.state.message
    assert run.parameters == {"recipe": "digits", "overrides": {"train.epochs": 9, "train.weights": None}}
    [name] = dvc(site.project, "exp", "list", "--name-only").split()
    assert run.name == "digits epochs=9"
    assert name == f"digits-epochs-9-{str(run.id)[-6:]}"
    dvc(site.project, "exp", "apply", name)
    assert read_yaml(site.project / "artifacts/train/out.txt")["train"]["epochs"] == 9


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"overrides": {"train.epochs": 0}}, "0 is less than the minimum of 1"),
        ({"overrides": {"train.optimizer": "sdg"}}, "'sdg' is not one of ['sgd', 'adam', 'adamw', 'rmsprop', 'muon']"),
        ({"overrides": {"train.epoch": 3}}, "'train.epoch' was unexpected"),
        ({"recipe": "digit"}, "'digits' was expected"),
    ],
)
def test_the_server_refuses_a_bad_value(site: Site, parameters: dict[str, Any], message: str) -> None:
    with get_client(sync_client=True) as client, pytest.raises(PrefectHTTPStatusError) as refusal:
        client.create_flow_run_from_deployment(client.read_deployment_by_name(DEPLOYMENT).id, parameters=parameters)
    assert refusal.value.response.is_client_error
    assert message in refusal.value.response.json()["detail"]


def test_the_prefect_command_reports_why_a_value_is_refused(site: Site) -> None:
    status, text = site.cli("deployment", "run", DEPLOYMENT, "-p", 'overrides={"train.epochs": 0}')
    assert status == 1
    assert "0 is less than the minimum of 1" in text


def test_canceling_a_run_ends_its_training_and_saves_nothing(site: Site) -> None:
    before = dvc(site.project, "exp", "list", "--name-only")
    (site.project.parent / "ran").unlink(missing_ok=True)
    (site.project.parent / "train.wait").touch()
    run_id = site.start(train__epochs=11)
    wait_until(lambda: has_begun(site, "train"))
    assert site.cli("flow-run", "cancel", str(run_id))[0] == 0
    wait_until(lambda: not [line for line in running_in(site.project) if "toy.py" in line])
    assert (site.project.parent / "train.terminated").exists()
    run = wait_for_end(run_id)
    assert run.state
    assert run.state.name == "Cancelled"
    (site.project.parent / "train.wait").unlink()
    assert dvc(site.project, "exp", "list", "--name-only") == before


def test_the_nightly_schedule_is_off_until_enabled(site: Site) -> None:
    with get_client(sync_client=True) as client:
        nightly = client.read_deployment_by_name("train-classifier/nightly")
    assert not nightly.schedules[0].active
    assert nightly.parameters["vary_seed"]


def test_a_schedule_that_was_switched_on_stays_on(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployments, "PROJECT", site.project)
    with get_client(sync_client=True) as client:
        found = client.read_deployment_by_name("train-classifier/nightly")
        client.update_deployment_schedule(found.id, found.schedules[0].id, active=True)
        names = deployments.deploy_all(site.environment["PREFECT_API_URL"])
        [schedule] = client.read_deployment_by_name("train-classifier/nightly").schedules
        assert schedule.active
        client.update_deployment_schedule(found.id, schedule.id, active=False)
    assert "train-classifier/nightly" in names


def test_the_environment_for_the_prefect_command_is_printed(site: Site) -> None:
    environment = {**site.environment, "PREFECT_API_URL": ""}
    command = [sys.executable, "-m", "flows.worker", "--env"]
    done = subprocess.run(command, cwd=site.project, env=environment, capture_output=True, text=True, check=True)
    assert f"export PREFECT_API_URL={site.environment['PREFECT_API_URL']}\n" in done.stdout
    assert f"export PREFECT_HOME={site.project / '.prefect'}\n" in done.stdout


def test_the_prefect_command_uses_the_server_of_the_users_profile(site: Site, tmp_path: Path) -> None:
    profiles = tmp_path / "profiles.toml"
    profiles.write_text('active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "http://127.0.0.1:9/api"\n')
    environment = {**site.environment, "PREFECT_PROFILES_PATH": str(profiles), "DO_NOT_TRACK": "1"}
    environment.pop("PREFECT_API_URL")
    environment |= {"ALL_PROXY": "socks5://127.0.0.1:9", "NO_PROXY": "corp.example"}
    command = [sys.executable, "-m", "flows.worker", "--env"]
    done = subprocess.run(command, cwd=site.project, env=environment, capture_output=True, text=True, check=True)
    for name in ("NO_PROXY", "no_proxy"):
        assert f"export {name}=corp.example,127.0.0.1,localhost,::1\n" in done.stdout
    assert "export PREFECT_API_URL=http://127.0.0.1:9/api\n" in done.stdout
    assert f"export PREFECT_PROFILES_PATH={profiles}\n" in done.stdout
    assert "export DO_NOT_TRACK=1\n" in done.stdout


def test_the_form_has_every_parameter_with_its_description_and_bounds() -> None:
    schema = train_classifier.train_classifier.parameters.model_dump()
    assert schema["properties"]["recipe"]["enum"] == RECIPES
    fields = schema["definitions"]["Overrides"]["properties"]
    sections = {name: field.annotation for name, field in Params.model_fields.items() if name != "promote"}
    assert list(fields) == [f"{name}.{field}" for name, section in sections.items() for field in section.model_fields]  # type: ignore[union-attr]
    assert all(field["description"] and "default" not in field for field in fields.values())
    assert fields["train.optimizer"]["enum"] == ["sgd", "adam", "adamw", "rmsprop", "muon"]
    assert (fields["train.epochs"]["type"], fields["train.epochs"]["minimum"]) == ("integer", 1)
    assert fields["train.nesterov"]["enum"] == [True, False]
    assert "type" not in fields["train.nesterov"]  # the form would show a switch, which cannot stay empty
    assert fields["train.input_size"]["anyOf"][0]["maximum"] == 1024
    assert not schema["definitions"]["Overrides"]["additionalProperties"]


def test_overrides_contain_only_the_values_that_were_set() -> None:
    values = {"train.epochs": 3, "train.weights": None}
    assert Overrides.model_validate(values).flat() == values
    assert Overrides().flat() == {}


def test_a_worker_without_a_checkout_gets_code_from_git_and_files_from_the_remote(site: Site, tmp_path: Path) -> None:
    url, remote = f"file://{site.project}", tmp_path / "remote"
    remote.mkdir()
    deployments.deploy_from_git(url, deployments.resolve_remote_revision(url, "HEAD"))
    environment = {**site.environment, "TOY": str(tmp_path), "PIPELINE_DVC_REMOTE": str(remote)}
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "git", "--type", "process", "--run-once"]
    for attempt in (1, 2):  # each attempt runs in a clone with its own cache
        status, text = site.cli(
            "deployment", "run", "train-classifier/from-git", "-p", 'overrides={"train.epochs": 13}'
        )
        assert status == 0
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
        run = wait_for_end(UUID(text.partition("UUID: ")[2].split()[0]))
        assert run.state
        assert run.state.name == "Completed", run.state.message
        assert (tmp_path / "ran").read_text().split() == stage_names(), attempt
        assert f"digits-epochs-13-{str(run.id)[-6:]}" in dvc(site.project, "exp", "list", "--name-only")


def test_a_password_in_the_address_is_refused_and_not_printed() -> None:
    with pytest.raises(UserError, match="--git: found a password") as error:
        deployments.resolve_remote_revision("https://user:secret@host/repository.git", "0" * 40)
    assert "secret" not in str(error.value)


def test_an_unknown_revision_is_reported_in_one_line(site: Site) -> None:
    with pytest.raises(UserError, match=r"--revision: .* has no 'nothing'; allowed: a branch"):
        deployments.resolve_remote_revision(str(site.project), "nothing")


def test_health_knows_the_worker_and_the_last_nightly_run(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(name: str) -> tuple[str, str]:
        result = health.run_check(name, health.CHECKS[name], site.project)
        return result.state, result.text

    def run_nightly(hours_ago: float) -> UUID:
        planned: State[Any] = Scheduled(scheduled_time=now("UTC") - timedelta(hours=hours_ago))
        return client.create_flow_run_from_deployment(nightly.id, state=planned).id

    assert [check(name)[0] for name in ("prefect", "worker")] == ["ok", "ok"]
    assert check("nightly")[1].startswith("the schedule of train-classifier/nightly is off")
    with get_client(sync_client=True) as client:
        nightly = client.read_deployment_by_name("train-classifier/nightly")
        client.update_deployment_schedule(nightly.id, nightly.schedules[0].id, active=True)
        assert check("nightly") == ("unknown", "its schedule is on, and no run was due yet")
        wait_for_end(run_nightly(hours_ago=30))
        assert check("nightly")[0] == "wrong"
        assert "is Completed; 30 hours ago, allowed: 1 day, 2:00:00" in check("nightly")[1]
        latest = run_nightly(hours_ago=0)
        name = f"digits seed={seed_of_day(now('UTC'))}"
        assert wait_for_end(latest).name == name  # that of a scheduled run is random until it starts
        assert check("nightly")[0] == "ok"
        client.set_flow_run_state(latest, Crashed(), force=True)
        assert (check("nightly")[0], "is Crashed" in check("nightly")[1]) == ("wrong", True)
        client.update_deployment_schedule(nightly.id, nightly.schedules[0].id, active=False)
    monkeypatch.setattr(health, "HEARTBEATS_MISSED", -1)
    assert check("worker")[1].startswith("no worker of the pool local is online")
