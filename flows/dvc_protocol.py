"""The messages between a flow run (`dvc_client`) and its DVC process (`dvc_worker`): one JSON object a line.

The client writes a `Request` to the worker's standard input and reads the worker's standard output up to one `Answer`.
All other lines there are the output of the stages and of DVC, in order; MARK as the first character marks an answer.
The worker handles one request after the other, and ends when its standard input ends.

What a step itself reports (its MLflow run) does not pass through here: `pipeline.core.results`.
"""

import json
from dataclasses import asdict, dataclass
from typing import Literal

MARK = "\x1e"
"""ASCII's record separator."""
GRACE_SECONDS = 10
"""Between SIGTERM and SIGKILL, for a stage to save a checkpoint and to end its MLflow run."""

Action = Literal["reproduce", "remake", "restore", "save", "push"]
"""What the worker can do; `dvc_worker.ACTIONS` has a function for each."""
Outcome = Literal["ran", "restored", "unchanged", "missing"]
"""Of a stage: its command ran, its files came from DVC's cache, or they were there already. Of an output to restore:
restored, or missing in cache and remotes."""


@dataclass(frozen=True)
class Request:
    """One thing to do; `argument` is a stage, a path and its MD5, or the name of an experiment."""

    action: Action
    argument: str

    def to_line(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_line(cls, line: str) -> "Request":
        return cls(**json.loads(line))


@dataclass(frozen=True)
class Answer:
    """What came of a request: an outcome (save and push have none) or, where it failed, a status and a reason.

    `status` is None where all went well, else the exit status of the stage's command (negative: the signal that ended
    it) or one of `pipeline.core.errors`. `reason` is one line, or empty where the stage has printed it.
    """

    outcome: Outcome | None = None
    status: int | None = None
    reason: str = ""

    def to_line(self) -> str:
        """The answer on a line of its own, even where a stage's last line has no end."""
        return f"\n{MARK}{json.dumps(asdict(self))}\n"

    @classmethod
    def from_line(cls, line: str) -> "Answer | None":
        """The answer, or None where the line is output."""
        return cls(**json.loads(line.removeprefix(MARK))) if line.startswith(MARK) else None
