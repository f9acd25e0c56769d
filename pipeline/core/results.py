"""Pass a step's result to the program that started it, in the small JSON file that PIPELINE_RESULT_FILE names.

A flow run sets the variable for its stages; without it, as in `dvc repro`, nothing is written. A missing file is not an
error: steps of older commits do not write it, and a step may be killed before it does.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.core.settings import get_settings

RESULT_FILE = "PIPELINE_RESULT_FILE"


@dataclass(frozen=True)
class StepResult:
    """The result of a step: the MLflow run that it logs to and the experiment of that run; None where unknown."""

    mlflow_run_id: str | None = None
    mlflow_experiment_id: str | None = None


def write_result(result: StepResult) -> None:
    """Write the result atomically to the file that PIPELINE_RESULT_FILE names, if the variable is set.

    A failure to write is ignored: the reader then finds no result.
    """
    if name := get_settings().result_file:
        write_json_file(name, asdict(result))


def write_json_file(name: str, values: Mapping[str, Any]) -> None:
    """Replace the file atomically by one with the values as JSON; a failure to write is ignored."""
    with suppress(OSError):
        temporary = Path(f"{name}.tmp")
        temporary.write_text(json.dumps(values), encoding="utf-8")
        temporary.replace(name)


def read_result(path: Path) -> StepResult:
    """Read the result of a step; a missing or damaged file gives an empty result."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        ids = [values.get(field) for field in ("mlflow_run_id", "mlflow_experiment_id")]
    except (OSError, ValueError, AttributeError):
        return StepResult()
    return StepResult(*(value if isinstance(value, str) else None for value in ids))
