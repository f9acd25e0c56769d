"""Send a message when a nightly run fails, crashes or is missed, by automations of Prefect's server.

`flows.worker` calls `register` at its start. PIPELINE_NOTIFY_WEBHOOK, PIPELINE_NOTIFY_SLACK and PIPELINE_NOTIFY_EMAIL
name where messages go; where none of them is set, the automations and blocks of an earlier start are removed.
docs/operations.md describes what is sent, and what cannot be.
"""

import math
import re
from contextlib import suppress
from uuid import UUID

from apprise import Apprise
from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.notifications import CustomWebhookNotificationBlock, SlackWebhook
from prefect.client.orchestration import SyncPrefectClient
from prefect.events.schemas.automations import Automation, AutomationCore
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from prefect.types import SecretDict
from pydantic import SecretStr

from flows.automations import PREFIX, nightly_automations
from flows.deployments import NIGHTLY
from flows.prefect_server import MAX_RECORDS_PER_REQUEST, prefect_client
from flows.settings import NOTIFY_ADDRESSES
from pipeline.core.errors import UserError
from pipeline.core.network import has_host, is_server
from pipeline.core.settings import get_settings

WEBHOOK, SLACK, EMAIL = NOTIFY_ADDRESSES
HOURS = "PIPELINE_NOTIFY_HOURS"
BLOCKS: dict[str, type[NotificationBlock]] = {
    "webhook": CustomWebhookNotificationBlock,
    "slack": SlackWebhook,
    "email": SlackWebhook,  # see `_email`
}
SLACK_ADDRESS = re.compile(r"https://hooks\.slack(-gov)?\.com/services/[^/\s]+/[^/\s]+/[^/\s]+/?")
DEFAULT_HOURS = 36.0  # a day, and 12 hours in which a night may take longer than the one before
MIN_HOURS, MAX_HOURS = 0.1, 10_000.0
HEARTBEAT_SECONDS = 60  # Prefect's default, 180, would find a killed run only after nine minutes


def register(api_url: str) -> list[str]:
    """Register what is configured on the Prefect server, remove what is not, and return the names of the blocks used.

    Raises UserError for a variable with a bad value, or where the deployment does not exist, TemporaryError where a
    request to the server fails.
    """
    blocks, hours = configured_blocks(), expected_hours()
    with prefect_client(api_url) as client:
        ids = {name: UUID(str(block.save(f"{PREFIX}-{name}", overwrite=True))) for name, block in blocks.items()}
        wanted: list[AutomationCore] = []
        if ids:
            deployment = _nightly(client)
            wanted = nightly_automations(deployment, blocks=ids, hours=hours, heartbeat_seconds=heartbeat_seconds())
        _replace(client, wanted)
        for name in BLOCKS.keys() - blocks.keys():
            _remove_block(client, name)
    return list(blocks)


def configured_blocks() -> dict[str, NotificationBlock]:
    """Return a block for each address that is configured; raises UserError for a value that is no such address.

    An address may be a secret, so the error does not have it.
    """
    settings = get_settings()
    makers = {"webhook": _webhook, "slack": _slack, "email": _email}
    urls = {"webhook": settings.notify_webhook, "slack": settings.notify_slack, "email": settings.notify_email}
    return {name: makers[name](url) for name, url in urls.items() if url}


def _webhook(url: str) -> NotificationBlock:
    """Return a block that sends `{"text": …}` by POST; its field `url` would be no secret, but `secrets` are."""
    if not (is_server(url) and has_host(url)):
        raise _bad_address(WEBHOOK, "http://HOST/… or https://HOST/…")
    return CustomWebhookNotificationBlock(
        name=f"{PREFIX}-webhook",
        url="{{address}}",
        json_data={"text": "{{subject}}\n{{body}}"},
        headers=None,
        cookies=None,
        secrets=SecretDict({"address": url}),
    )


def _slack(url: str) -> NotificationBlock:
    if not SLACK_ADDRESS.fullmatch(url):
        raise _bad_address(SLACK, "https://hooks.slack.com/services/…/…/…, as Slack shows it")
    return SlackWebhook(url=SecretStr(url))


def _email(url: str) -> NotificationBlock:
    """Return a block that sends mail by SMTP.

    Prefect has no block for that: its only block for mail needs an account of SendGrid. The one for Slack passes an
    address that is not Slack's on to Apprise, which sends the message.
    """
    if not url.startswith(("mailto://", "mailtos://")) or Apprise.instantiate(url) is None:
        raise _bad_address(EMAIL, "mailtos://USER:PASSWORD@HOST:PORT?from=ADDRESS&to=ADDRESS, or mailto:// without TLS")
    if "format=" not in url:  # Apprise would send the text as HTML, all in one line
        url += f"{'&' if '?' in url else '?'}format=text"
    return SlackWebhook(url=SecretStr(url))


def _bad_address(variable: str, allowed: str) -> UserError:
    return UserError(f"{variable}: found another kind of address; allowed: {allowed}; correct or unset it")


def expected_hours() -> float:
    """Return the longest time in hours from one completed night to the next; raises UserError for a bad value."""
    text = get_settings().notify_hours
    try:
        hours = float(text or DEFAULT_HOURS)
    except ValueError:
        hours = math.nan
    if not MIN_HOURS <= hours <= MAX_HOURS:
        raise UserError(
            f"{HOURS}: found {text!r}; allowed: a number of hours from {MIN_HOURS:g} to {MAX_HOURS:g}; correct or "
            "unset it"
        )
    return hours


def heartbeat_seconds() -> int:
    """Return the time in seconds between two heartbeats of a flow run: Prefect's setting where it is set, else ours."""
    flows = get_current_settings().flows
    chosen = flows.heartbeat_frequency if "heartbeat_frequency" in flows.model_fields_set else None
    return chosen or HEARTBEAT_SECONDS


def _nightly(client: SyncPrefectClient) -> UUID:
    """Return the id of the nightly deployment; raises UserError where it does not exist."""
    try:
        return client.read_deployment_by_name(NIGHTLY).id
    except ObjectNotFound:
        raise UserError(
            f"prefect.yaml: no deployment {NIGHTLY}, whose runs are to be notified of; add it, or unset {WEBHOOK}, "
            f"{SLACK} and {EMAIL}"
        ) from None


def _replace(client: SyncPrefectClient, wanted: list[AutomationCore]) -> None:
    """Make the server's automations of ours equal those wanted.

    One that is equal stays untouched, since a change would restart the times that it measures. One that the user has
    paused stays paused.
    """
    existing: dict[str, list[Automation]] = {}
    for automation in _ours(client):
        existing.setdefault(automation.name, []).append(automation)
    for one in wanted:
        found = existing.pop(one.name, [])
        existing[one.name] = found[1:]  # two workers that started at once may have made two
        if not found:
            client.create_automation(one)
            continue
        changed = one.model_copy(update={"enabled": found[0].enabled})
        if found[0].model_dump(exclude={"id"}) != changed.model_dump():
            client.update_automation(found[0].id, changed)
    for automation in [one for rest in existing.values() for one in rest]:
        client.delete_automation(automation.id)


def _ours(client: SyncPrefectClient) -> list[Automation]:
    """Return the automations on the server whose names are ours."""
    names = {f"{PREFIX}-{name}" for name in ("failed", "crashed", "silent", "late", "overdue")}
    found: list[Automation] = []
    while page := client.read_automations(limit=MAX_RECORDS_PER_REQUEST, offset=len(found)):
        found += page
    return [one for one in found if one.name in names]


def _remove_block(client: SyncPrefectClient, name: str) -> None:
    with suppress(ObjectNotFound):
        found = client.read_block_document_by_name(
            f"{PREFIX}-{name}", BLOCKS[name].get_block_type_slug(), include_secrets=False
        )
        client.delete_block_document(found.id)
