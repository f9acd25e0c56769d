"""Publish the progress of a flow run in Prefect: one Markdown artifact, which a thread updates while the stages run.

The stages report their progress in a file (`pipeline.core.step_progress`). Where the server does not answer, an update
is skipped: the progress must not fail the run. `doctor` marks the artifact of a flow run that SIGKILL ended.
"""

import contextvars
import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey

from flows.dvc_protocol import Outcome
from flows.prefect_server import REQUEST_SECONDS, SERVER_ERRORS, brief_client
from flows.progress_page import (
    DONE,
    RESTORED,
    RUNNING,
    UP_TO_DATE,
    WAITING,
    Page,
    RunState,
    StageState,
    as_interrupted,
    as_line,
    as_markdown,
)
from pipeline.artifacts import DOWNLOAD, EVALUATE, NORMALIZE, TRAIN
from pipeline.core.errors import first_line
from pipeline.core.step_progress import read_progress

SECONDS_BETWEEN_UPDATES = 2.0
MAX_SECONDS_BETWEEN_UPDATES = 30.0  # Prefect stores each update as an event: a long run is updated less often
UPDATES_PER_RUN_TIME = (
    100  # the time between two updates is the time since the start divided by this, within the limits
)
KIND = "progress"
STAGES = tuple(folder.name for folder in (DOWNLOAD, NORMALIZE, TRAIN, EVALUATE))
SHOWN_OUTCOMES = {"ran": DONE, "restored": RESTORED, "unchanged": UP_TO_DATE}


def artifact_key(recipe: str, kind: str) -> str:
    """Return the key under which Prefect keeps the history of a recipe's artifacts, such as `cifar10-lenet-summary`.

    A key has lowercase letters, digits and dashes only.
    """
    return re.sub(r"[^a-z0-9]+", "-", f"{recipe.lower()}-{kind}").strip("-")


@dataclass
class ShownStage:
    """A stage in progress; the caller sets the outcome with which it ends."""

    outcome: Outcome | None = None


class LiveProgress:
    """A publisher of the progress of one flow run, whose stages write theirs into the file `path`.

    As a context manager it starts the thread, and publishes how the flow run ended: finished, failed or interrupted.
    """

    def __init__(self, path: Path, *, recipe: str, flow_run_id: str) -> None:
        self._path, self._key = path, artifact_key(recipe, KIND)
        self._flow_run_id = UUID(flow_run_id)
        self._artifact_id: UUID | None = None
        self._page = Page("running", [StageState(name) for name in STAGES])
        self._start, self._ended = time.monotonic(), threading.Event()
        context = contextvars.copy_context()  # Prefect's settings, such as the server's address, are in the context
        self._thread = threading.Thread(target=context.run, args=[self._publish_until_end], daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        state: RunState = "finished"
        if error:
            state = "failed" if isinstance(error, Exception) else "interrupted"
        stages = [replace(stage, state="not run") if stage.state == WAITING else stage for stage in self._page.stages]
        self._page = replace(
            self._page,
            state=state,
            stages=stages,
            reason=first_line(error) if isinstance(error, Exception) else "",
            seconds=time.monotonic() - self._start,
        )
        self._ended.set()
        self._thread.join(timeout=2 * REQUEST_SECONDS)  # the thread is a daemon: a request that hangs delays no exit

    @contextmanager
    def stage(self, name: str) -> Iterator[ShownStage]:
        """Show a stage as running in the block, and how it ended after it; only an `Exception` is a failure."""
        self._path.unlink(missing_ok=True)  # that of the stage before, or of an earlier attempt
        start, shown, state = time.monotonic(), ShownStage(), "interrupted"
        self._show(StageState(name, RUNNING, start=start - self._start))
        try:
            yield shown
            state = SHOWN_OUTCOMES.get(shown.outcome or "ran", DONE)
        except Exception:
            state = "failed"
            raise
        finally:
            self._page = self._current_page()
            self._show(StageState(name, state, time.monotonic() - start))

    def _show(self, stage: StageState) -> None:
        """Replace the stage of this name on the page."""
        stages = [stage if each.name == stage.name else each for each in self._page.stages]
        self._page = replace(self._page, stages=stages)

    def _current_page(self) -> Page:
        """Return the page with the progress that the stage has written last."""
        page, progress = self._page, read_progress(self._path)
        training = progress.training if progress else None
        return replace(page, progress=progress, training=training or page.training)

    def _publish_until_end(self) -> None:
        """Publish the page when it has changed, and a last time at the end; this is what the thread runs."""
        published, due = None, 0.0
        with ExitStack() as stack:
            try:
                client = stack.enter_context(brief_client())
            except SERVER_ERRORS:
                return  # the run continues without published progress
            while True:
                has_ended = self._ended.is_set()
                page, now = self._current_page(), time.monotonic()
                is_due = has_ended or published is None or page.stages != published.stages or now >= due
                if page != published and is_due and self._publish(page, client):
                    published, due = page, now + seconds_between_updates(now - self._start)
                if has_ended:
                    return
                self._ended.wait(SECONDS_BETWEEN_UPDATES)

    def _publish(self, page: Page, client: SyncPrefectClient) -> bool:
        """Create or update the artifact, and return whether the server accepted it."""
        description, text = as_line(page), as_markdown(page, elapsed=time.monotonic() - self._start)
        try:
            self._artifact_id = self._artifact_id or self._find_artifact(client)
            if self._artifact_id:
                client.update_artifact(self._artifact_id, ArtifactUpdate(data=text, description=description))
            else:
                artifact = ArtifactCreate(
                    key=self._key,
                    type="markdown",
                    description=description,
                    data=text,
                    flow_run_id=self._flow_run_id,
                )
                self._artifact_id = client.create_artifact(artifact).id
        except SERVER_ERRORS:
            return False
        return True

    def _find_artifact(self, client: SyncPrefectClient) -> UUID | None:
        """Return the id of the artifact of an earlier attempt of this flow run, or None."""
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(
                key=ArtifactFilterKey(any_=[self._key]), flow_run_id=ArtifactFilterFlowRunId(any_=[self._flow_run_id])
            ),
            limit=1,
        )
        return found[0].id if found else None


def mark_interrupted(client: SyncPrefectClient, flow_run_id: UUID) -> None:
    """Show the progress of a killed flow run as interrupted."""
    found = client.read_artifacts(
        artifact_filter=ArtifactFilter(
            key=ArtifactFilterKey(like_=f"%-{KIND}"), flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id])
        )
    )
    for artifact in found:
        text = as_interrupted(str(artifact.data))
        if text != artifact.data:
            client.update_artifact(artifact.id, ArtifactUpdate(data=text, description="Interrupted: it was killed"))


def seconds_between_updates(run_time: float) -> float:
    """Return the seconds between two updates, `run_time` seconds after the start of the flow run."""
    return min(max(SECONDS_BETWEEN_UPDATES, run_time / UPDATES_PER_RUN_TIME), MAX_SECONDS_BETWEEN_UPDATES)
