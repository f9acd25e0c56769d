"""What a step hands to the program that started it: a small JSON file, which PIPELINE_RESULT_FILE names.

A flow run sets the variable for its stages; without it (as in `dvc repro`) nothing is written. Steps of older commits
write no such file, and a step that is killed may not get to it: the reader then knows nothing, which is no error.
"""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.core.settings import get_settings

RESULT_FILE = "PIPELINE_RESULT_FILE"


@dataclass(frozen=True)
class StepResult:
    """The MLflow run into which a step records; None where it is unknown."""

    mlflow_run_id: str | None = None


def write_result(result: StepResult) -> None:
    """Write the result to the file that PIPELINE_RESULT_FILE names, if it names one; the file appears whole.

    Where it cannot be written, the reader finds no result; the step continues.
    """
    if name := get_settings().result_file:
        with suppress(OSError):
            temporary = Path(f"{name}.tmp")
            temporary.write_text(json.dumps(asdict(result)), encoding="utf-8")
            temporary.replace(name)


def read_result(path: Path) -> StepResult:
    """Read what a step wrote; a missing, damaged or unknown file gives an empty result."""
    try:
        run_id = json.loads(path.read_text(encoding="utf-8"))["mlflow_run_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return StepResult()
    return StepResult(run_id if isinstance(run_id, str) else None)
