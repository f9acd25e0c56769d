"""A night that fails, crashes or is missed is reported by Prefect's server to a real webhook receiver."""

import json
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from uuid import UUID

import pytest
from prefect import get_client
from prefect.blocks.notifications import SlackWebhook
from prefect.events import emit_event
from prefect.events.schemas.automations import AutomationCore, EventTrigger
from prefect.settings import PREFECT_API_SSL_CERT_FILE, PREFECT_API_URL, temporary_settings
from prefect.states import Running
from pydantic import SecretStr

from flows import automations, flow_run, notifications, workspace
from pipeline.core.errors import UserError
from pipeline.core.settings import get_settings
from tests.conftest import PROJECT
from tests.nights import TOKEN, MailReceiver, Receiver, Site, kill_worker, open_site
from tests.test_flows import wait_until

FAST = {
    "PREFECT_SERVER_SERVICES_LATE_RUNS_AFTER_SECONDS": "1",
    "PREFECT_SERVER_SERVICES_LATE_RUNS_LOOP_SECONDS": "1",
    "PREFECT_SERVER_EVENTS_PROACTIVE_GRANULARITY": "PT1S",
}
DUE = r"due \d{4}-\d\d-\d\d \d\d:\d\d UTC"
NIGHT = rf"digits epochs=\d+ seed=\d+, {DUE}"
PAGE = r"http://127\.0\.0\.1:\d+/runs/flow-run/[0-9a-f-]{36}"


@pytest.fixture(scope="module")
def receiver() -> Receiver:
    return Receiver()


@pytest.fixture(scope="module")
def mailbox() -> MailReceiver:
    return MailReceiver()


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, receiver: Receiver, mailbox: MailReceiver, stores: Path
) -> Iterator[Site]:
    """Yield a project with toy stages whose worker runs, and whose server marks a run as late after a second."""
    addresses = {notifications.WEBHOOK: receiver.url, notifications.EMAIL: mailbox.url}
    with open_site(tmp_path_factory.mktemp("site"), FAST | addresses, stores=stores) as site:
        yield site


@pytest.fixture
def register(site: Site, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Return a function that registers notifications with these variables, by default the address of `receiver`."""

    def register(**variables: str) -> list[str]:
        for name in (notifications.WEBHOOK, notifications.SLACK, notifications.EMAIL, notifications.HOURS):
            monkeypatch.delenv(name, raising=False)
        for name, value in (variables or {notifications.WEBHOOK: receiver.url}).items():
            monkeypatch.setenv(name, value)
        get_settings.cache_clear()
        return notifications.register(PREFECT_API_URL.value() or "")

    return register


def ours() -> dict[str, UUID]:
    """Return the names and ids of all automations and blocks on the server that are ours."""
    with get_client(sync_client=True) as client:
        found = [(one.name, one.id) for one in client.read_automations()]
        found += [(one.name or "", one.id) for one in client.read_block_documents()]
    return {name: key for name, key in found if name.startswith(automations.PREFIX)}


def last_changes() -> list[str]:
    """Return when each automation was last changed: a change would restart the time that it measures."""
    with get_client(sync_client=True) as client:
        return [one["updated"] for one in client.request("POST", "/automations/filter", json={}).json()]


def test_a_failed_night_is_reported_and_a_run_that_a_person_starts_is_not(
    site: Site, receiver: Receiver, mailbox: MailReceiver
) -> None:
    site.hold("train", status=2)
    by_hand = site.start_run(deployment="train-classifier/on-demand")
    wait_until(lambda: state_of(by_hand) == "Failed")
    site.start_run()
    lines = receiver.next().splitlines()
    assert re.fullmatch(f"Nightly run failed: {NIGHT}", lines[0])
    assert lines[1:3] == ["Step: train", "Reason: train: train.device is 'cuda'; allowed: cpu"]
    assert re.fullmatch(f"Run: {PAGE}", lines[3])
    mail = mailbox.messages.get(timeout=600)
    assert re.search(f"(?m)^Subject: Nightly run failed: {NIGHT}$", mail)
    assert "\nReason: train: train.device is 'cuda'; allowed: cpu\nRun: http" in mail


def test_the_message_links_the_mlflow_run_where_it_is_known(site: Site, receiver: Receiver) -> None:
    site.hold("evaluate", status=2)
    (site.folder / "train.result").write_text(json.dumps({"mlflow_run_id": "r-1"}))
    site.hold("train")
    site.start_run()
    text = receiver.next()
    assert "Step: evaluate" in text
    assert re.search(r"(?m)^MLflow: http://127\.0\.0\.1:\d+/.*r-1", text)


def test_neither_prefects_page_nor_a_log_shows_an_address(site: Site) -> None:
    with get_client(sync_client=True) as client:
        blocks = client.read_block_documents(include_secrets=False)  # as Prefect's page asks
        answers = [one.model_dump_json() for one in [*blocks, *client.read_automations()]]
    logs = [path.read_text() for path in [site.folder / "worker.log", *(site.project / ".prefect").glob("*.log")]]
    assert len(logs) > 1
    assert not [text for text in answers + logs if TOKEN in text]


def test_registering_again_changes_nothing(register: Callable[..., list[str]]) -> None:
    register()
    before, changes = ours(), last_changes()
    assert len(before) == 6
    for _ in range(2):
        assert register() == ["webhook"]
    assert (ours(), last_changes()) == (before, changes)


def test_a_paused_automation_stays_paused_also_where_it_changes(register: Callable[..., list[str]]) -> None:
    register()
    with get_client(sync_client=True) as client:
        client.pause_automation(ours()["classifier-pipeline-overdue"])
        register(**{notifications.WEBHOOK: "http://127.0.0.1:9", notifications.HOURS: "50"})
        [found] = client.read_automations_by_name("classifier-pipeline-overdue")
    assert (found.enabled, "within 50 hours" in str(found.actions)) == (False, True)


def test_without_an_address_ours_are_removed_and_no_others(register: Callable[..., list[str]]) -> None:
    register()
    with get_client(sync_client=True) as client:
        SlackWebhook(url=SecretStr("https://hooks.slack.com/services/T/B/X")).save("users-own")
        [failed] = client.read_automations_by_name(f"{automations.PREFIX}-failed")
        own = client.create_automation(AutomationCore.model_validate({**failed.model_dump(), "name": "users-own"}))
        assert register(NOTHING="") == []
        assert ours() == {}
        assert [one.id for one in client.read_automations()] == [own]
        assert [one.name for one in client.read_block_documents()] == ["users-own"]
        client.delete_automation(own)


def test_a_killed_worker_a_silent_run_and_a_missed_night_are_reported(
    site: Site, receiver: Receiver, register: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    register()
    site.hold("train", waits=True)
    site.start_run()
    site.begins("train")
    kill_worker(site)
    text = receiver.next()
    assert re.match(f"Nightly run crashed: {NIGHT}\nStep: train\nReason: its worker was killed", text)

    for name, value in {"MIN_SILENT_SECONDS": 10, "HEARTBEATS_MISSED": 0, "START_SECONDS": 10}.items():
        monkeypatch.setattr(automations, name, value)
    monkeypatch.setattr(notifications, "MIN_HOURS", 0)
    register(**{notifications.WEBHOOK: receiver.url, notifications.HOURS: f"{10 / 3600}"})
    texts: dict[str, tuple[str, str]] = {}
    # Prefect's server loads changed automations a while after it has stored them, and misses the events before that
    while len(texts) < 3:
        silent = site.start_run("silent", state=Running())
        site.start_run("missed")
        send_heartbeat(silent)
        end = time.monotonic() + 90
        with suppress(queue.Empty):
            while len(texts) < 3:
                # the message "overdue" is repeated, so that this does not wait for the absence of messages
                subject, _, body = receiver.next(seconds=max(0, end - time.monotonic())).partition("\n")
                texts[subject.partition(":")[0]] = subject, body  # more than one run may be missed
    crashed, missed, overdue = (texts[f"Nightly run {what}"] for what in ("crashed", "missed", "overdue"))
    assert re.fullmatch(f"Nightly run crashed: silent, {DUE}", crashed[0])
    assert re.fullmatch(f"Nightly run missed: missed, {DUE}", missed[0])
    assert "Reason: no heartbeat for 10 s: the run was killed" in crashed[1]
    assert missed[1].startswith("Reason: not started: no worker is running")
    assert overdue[0] == "Nightly run overdue"
    assert "Reason: no run of nightly has completed within" in overdue[1]
    assert all(re.search(PAGE, body) for _, body in texts.values())


def state_of(run_id: UUID) -> str | None:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(run_id).state_name


def send_heartbeat(run_id: UUID) -> None:
    """Send the event that Prefect sends from the process of a flow run."""
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(run_id)
    deployment = {"prefect.resource.id": f"prefect.deployment.{run.deployment_id}"}
    deployment["prefect.resource.role"] = "deployment"
    resource = {"prefect.resource.id": f"prefect.flow-run.{run_id}", "prefect.resource.name": run.name}
    emit_event("prefect.flow-run.heartbeat", resource, related=[deployment])


def test_a_label_for_the_message_ends_no_run_where_no_client_can_be_opened(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.pem")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_API_SSL_CERT_FILE: missing}):
        flow_run._label(str(UUID(int=1)), {flow_run.STEP_LABEL: "train"})


def test_a_label_for_the_message_is_sent_three_times_at_most_where_the_server_is_overloaded() -> None:
    requests: list[str] = []

    class Overloaded(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(503)
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Overloaded) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{server.server_port}/api"}):
            flow_run._label(str(UUID(int=1)), {flow_run.STEP_LABEL: "train"})
        server.shutdown()
    assert len(requests) == 3


def test_no_stage_gets_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (notifications.WEBHOOK, notifications.SLACK, notifications.EMAIL):
        monkeypatch.setenv(name, TOKEN)
    environment = workspace.stage_environment(PROJECT, tmp_path, variables={})
    assert TOKEN not in environment.values()


def test_the_time_to_the_next_completed_night_begins_again_with_each() -> None:
    made = automations.nightly_automations(UUID(int=1), blocks={}, hours=30, heartbeat_seconds=60)
    trigger = next(one.trigger for one in made if one.name.endswith("overdue"))
    assert isinstance(trigger, EventTrigger)
    assert "prefect.flow-run.Completed" in trigger.after & trigger.expect
    assert trigger.within == timedelta(hours=30)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PIPELINE_NOTIFY_WEBHOOK", "hooks.example.org/secret"),
        ("PIPELINE_NOTIFY_WEBHOOK", "http:///secret"),
        ("PIPELINE_NOTIFY_SLACK", "https://example.org/services/a/b/secret"),
        ("PIPELINE_NOTIFY_EMAIL", "secret@example.org"),
        ("PIPELINE_NOTIFY_EMAIL", "mailtos://"),
    ],
)
def test_a_bad_address_is_refused_and_not_printed(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"{variable}: found another kind of address; allowed: ") as error:
        notifications.configured_blocks()
    assert "secret" not in str(error.value) + repr(get_settings())


@pytest.mark.parametrize("value", ["a day", "0", "nan", "inf", "-3"])
def test_a_bad_number_of_hours_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(notifications.HOURS, value)
    with pytest.raises(UserError, match=f"PIPELINE_NOTIFY_HOURS: found '{value}'; allowed: a number of hours"):
        notifications.expected_hours()


def test_nothing_is_sent_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (notifications.WEBHOOK, notifications.SLACK, notifications.EMAIL):
        monkeypatch.delenv(name, raising=False)
    assert notifications.configured_blocks() == {}


def test_a_slack_address_makes_a_slack_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        notifications.SLACK, "https://hooks.slack.com/services/T00000000/B00000000/XXXXXXXXXXXXXXXXXXXXXXXX"
    )
    assert isinstance(notifications.configured_blocks()["slack"], SlackWebhook)
