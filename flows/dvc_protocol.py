"""The messages between a flow run (`dvc_client`) and its DVC process (`dvc_worker`): one JSON object a line.

The client writes a `Request` to the worker's standard input, and reads the worker's standard output until an `Answer`
comes, a line that starts with ANSWER_MARK. The other lines are the output of the stages and of DVC, in order.
The worker handles one request after the other, and ends when its standard input ends.

A stage reports its MLflow run in a file instead (`pipeline.core.results`).
"""

import json
from dataclasses import asdict, dataclass
from typing import Literal

ANSWER_MARK = "\x1e"  # ASCII's record separator, which no output of a stage starts with
GRACE_SECONDS = 10  # between SIGTERM and SIGKILL: a stage saves a checkpoint and ends its MLflow run

Action = Literal["reproduce", "rerun", "restore", "save", "push"]  # `dvc_worker.ACTIONS` has a function for each
# of a stage: its command ran, its outputs were restored from DVC's cache, or they were unchanged;
# of an output to restore: it was restored, or it is missing in the cache and the remotes
Outcome = Literal["ran", "restored", "unchanged", "missing"]


@dataclass(frozen=True)
class Request:
    """A request to the worker; `argument` is a stage, a path and its MD5, or the name of an experiment."""

    action: Action
    argument: str

    def to_line(self) -> str:
        """Return the request as one line of JSON."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_line(cls, line: str) -> "Request":
        """Return the request that `to_line` wrote."""
        return cls(**json.loads(line))


@dataclass(frozen=True)
class Answer:
    """The result of a request: an outcome (save and push have none) or, after a failure, a status and a reason.

    `status` is None after success, else the exit status of the stage's command (negative: the signal that ended it) or
    one of `pipeline.core.errors`. `reason` is one line, or empty where the stage has printed it.
    """

    outcome: Outcome | None = None
    status: int | None = None
    reason: str = ""

    def to_line(self) -> str:
        """Return the answer as one line; it starts with a line break, since a stage's last line may have none."""
        return f"\n{ANSWER_MARK}{json.dumps(asdict(self))}\n"

    @classmethod
    def from_line(cls, line: str) -> "Answer | None":
        """Return the answer in the line, or None where the line is output of a stage or of DVC."""
        return cls(**json.loads(line.removeprefix(ANSWER_MARK))) if line.startswith(ANSWER_MARK) else None
