"""The automations of Prefect's server that watch the nightly run: which events they wait for, and what they send.

`flows.notifications` registers them. Only runs of the deployment `nightly` are watched: whoever starts another run
looks at it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from prefect.client.schemas.objects import StateType
from prefect.events.actions import ActionTypesOrUnknown, ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

from flows.flow_run import MLFLOW_LABEL, REASON_LABEL, STEP_LABEL

PREFIX = "classifier-pipeline"  # begins the name of each automation and block that is ours
HEARTBEAT = "prefect.flow-run.heartbeat"
# A flow run without a heartbeat for as long counts as killed; a restart of the server takes less.
MIN_SILENT_SECONDS = 300
HEARTBEATS_MISSED = 3
# A run must start within as long after Prefect marks it as late; a worker that systemd starts again takes less.
START_SECONDS = 300
ENDED = ("Completed", "Failed", "TimedOut", "Crashed", "Cancelled")

# Jinja templates that Prefect's server fills in; `labels` come from `flows.flow_run`.
DUE = 'due {{ flow_run.expected_start_time.strftime("%Y-%m-%d %H:%M") }} UTC'
FLOW_RUN = f"{{{{ flow_run.name }}}}, {DUE}"  # nights of the same parameters have the same name
REASON = f"""\
Step: {{{{ flow_run.labels["{STEP_LABEL}"] or "none has begun" }}}}
Reason: {{{{ flow_run.labels["{REASON_LABEL}"] or flow_run.state.message or "unknown" }}}}"""
LINKS = f"""\
Run: {{{{ flow_run|ui_url }}}}\
{{% if flow_run.labels["{MLFLOW_LABEL}"] %}}
MLflow: {{{{ flow_run.labels["{MLFLOW_LABEL}"] }}}}{{% endif %}}"""
LATE = f"""\
Reason: not started: no worker is running, or it is busy; `python -m flows.health` checks it
{LINKS}"""
OVERDUE = """\
Reason: no run of {{ deployment.name }} has completed within HOURS hours: nights fail or hang, or the schedule is off; \
`python -m flows.health` checks it
Last run that began or completed: {{ flow_run|ui_url }}"""


@dataclass(frozen=True)
class Message:
    """The subject and the text of a notification, as Jinja templates."""

    subject: str
    body: str


def nightly_automations(
    deployment: UUID, *, blocks: Mapping[str, UUID], hours: float, heartbeat_seconds: int
) -> list[AutomationCore]:
    """Return the automations for the runs of a deployment; each message goes to all blocks, which have these ids.

    `hours` is the longest time from one completed run to the next; `heartbeat_seconds` is the time between two
    heartbeats of a flow run.
    """
    silent = max(MIN_SILENT_SECONDS, HEARTBEATS_MISSED * heartbeat_seconds)
    ended = _events(*ENDED)
    failed = _trigger(deployment, expect=_events("Failed", "TimedOut"))
    crashed = _trigger(deployment, expect=_events("Crashed"))
    silence = _absence(
        deployment, after={HEARTBEAT}, expect={HEARTBEAT} | ended, seconds=silent, for_each="prefect.resource.id"
    )
    late = _absence(
        deployment,
        after=_events("Late"),
        expect=_events("Pending", "Running", "AwaitingRetry") | ended,
        seconds=START_SECONDS,
        for_each="prefect.resource.id",
    )
    overdue = _absence(  # its time begins again with each run that completes
        deployment,
        after=_events("Running", "Completed"),
        expect=_events("Completed"),
        seconds=hours * 3600,
        for_each="related:deployment:prefect.resource.id",
    )
    crash = ChangeFlowRunState(  # "crashed" then sends the message
        name="Crashed",
        state=StateType.CRASHED,
        force=False,
        message=f"no heartbeat for {silent} s: the run was killed or stopped, or its machine was down",
    )
    details = f"{REASON}\n{LINKS}"
    overdue_text = OVERDUE.replace("HOURS", f"{hours:g}")
    return [
        _automation("failed", failed, _send(Message(f"Nightly run failed: {FLOW_RUN}", details), blocks)),
        _automation("crashed", crashed, _send(Message(f"Nightly run crashed: {FLOW_RUN}", details), blocks)),
        _automation("silent", silence, [crash]),
        _automation("late", late, _send(Message(f"Nightly run missed: {FLOW_RUN}", LATE), blocks)),
        _automation("overdue", overdue, _send(Message("Nightly run overdue", overdue_text), blocks)),
    ]


def _events(*states: str) -> set[str]:
    """Return the events that Prefect emits when a flow run enters one of the states."""
    return {f"prefect.flow-run.{state}" for state in states}


def _runs_of(deployment: UUID) -> ResourceSpecification:
    related = {"prefect.resource.role": "deployment", "prefect.resource.id": f"prefect.deployment.{deployment}"}
    return ResourceSpecification.model_validate(related)


def _trigger(deployment: UUID, *, expect: set[str]) -> EventTrigger:
    """Return a trigger that fires at each of the events."""
    return EventTrigger(
        expect=expect,
        match=ResourceSpecification.model_validate({"prefect.resource.id": "prefect.flow-run.*"}),
        match_related=_runs_of(deployment),
        posture=Posture.Reactive,
        threshold=1,
        within=timedelta(0),
    )


def _absence(deployment: UUID, *, after: set[str], expect: set[str], seconds: float, for_each: str) -> EventTrigger:
    """Return a trigger that fires where, after one of `after`, none of `expect` comes within as many seconds.

    An event in both sets starts the time again.
    """
    return EventTrigger(
        after=after,
        expect=expect,
        for_each={for_each},
        match=ResourceSpecification.model_validate({"prefect.resource.id": "prefect.flow-run.*"}),
        match_related=_runs_of(deployment),
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(seconds=seconds),
    )


def _send(message: Message, blocks: Mapping[str, UUID]) -> list[ActionTypesOrUnknown]:
    """Return an action for each block that sends the message."""
    return [
        SendNotification(block_document_id=block, subject=message.subject, body=message.body)
        for block in blocks.values()
    ]


def _automation(name: str, trigger: EventTrigger, actions: list[ActionTypesOrUnknown]) -> AutomationCore:
    about = "Registered by `make worker` while a variable PIPELINE_NOTIFY_… is set; see docs/operations.md."
    return AutomationCore(name=f"{PREFIX}-{name}", description=about, enabled=True, trigger=trigger, actions=actions)
