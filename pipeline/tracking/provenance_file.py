"""Write and read `provenance.json`, the artifact of a run with all values by which its model is traced.

Processes of one project change the file one after the other, and replace it atomically where the store keeps artifacts
in a local folder; an MLflow server receives it as a whole. A damaged file is kept as `provenance.damaged.json`, and the
values that are also tags are written anew.
"""

import fcntl
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.utils.file_utils import local_file_uri_to_path

from pipeline.artifacts import write_bytes
from pipeline.core.errors import UserError
from pipeline.core.git import UNKNOWN
from pipeline.core.network import is_server
from pipeline.core.project import artifact_folder, project_folder
from pipeline.tracking.description import REPORT_KEY
from pipeline.tracking.links import run_page
from pipeline.tracking.provenance import (
    CHANGED_FILES,
    COMMIT,
    DIFFERENT,
    EXPERIMENT,
    HARDWARE,
    RESULTS,
    TRAINING,
    Values,
    as_text,
    flat,
    nested,
    values_of,
)
from pipeline.tracking.search import Run, find_run, read_artifact
from pipeline.tracking.store import store_errors

FILE = "provenance.json"
DAMAGED_FILE = "provenance.damaged.json"


@dataclass(frozen=True)
class Provenance:
    """What is known about the run that made a model; texts that are not known are "unknown".

    `seconds` is from the start to the end of the run, interruptions included, and None while it is running. `page` is
    the address of the run's page, relative to that of an MLflow server. `experiment` (DVC's) and `flow_run_name` are
    empty where the run had none. All of these but the page are unknown where the run has only an evaluation.
    """

    run_id: str
    name: str
    commit: str
    is_dirty: str  # `true`, `false` or `unknown`
    seconds: float | None
    hardware: Mapping[str, str]
    page: str
    experiment: str
    flow_run_name: str
    has_report: bool


def provenance_of(run: Run) -> Provenance:
    """Return the provenance of a run, which an earlier version may have recorded; raises as `with_provenance`.

    A run without a training belongs to a model that was trained elsewhere: its values are those of an evaluation.
    """
    values = with_provenance(run).tags
    trained = TRAINING in values
    return Provenance(
        run.run_id,
        run.name,
        commit=values.get(COMMIT, UNKNOWN) if trained else UNKNOWN,
        is_dirty=values.get("git.dirty", UNKNOWN) if trained else UNKNOWN,
        seconds=(run.ended - run.started) / 1000 if trained and run.ended else None,
        hardware={name.removeprefix(HARDWARE): one for name, one in values.items() if name.startswith(HARDWARE)},
        page=run_page(run.run_id, experiment_id=run.experiment_id),
        experiment=values.get(EXPERIMENT, "") if trained else UNKNOWN,
        flow_run_name=values.get("prefect.flow_run_name", "") if trained else UNKNOWN,
        has_report=REPORT_KEY in values,
    )


def with_provenance(run: Run) -> Run:
    """Return the run with the values of its `provenance.json` among its tags, as text.

    A run of an earlier version has no such file, and all values as tags of the same names. Raises TemporaryError or
    UserError where the store cannot be read or the file is damaged.
    """
    with store_errors():
        values = read_provenance(run.run_id)
    return replace(run, tags={**run.tags, **{name: as_text(value) for name, value in values.items()}})


def read_provenance(run_id: str) -> dict[str, Any]:
    """Return the values in the run's `provenance.json`, empty where it has none; raises UserError if it is damaged."""
    try:
        return _read(run_id)
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"MLflow run {run_id}: its artifact {FILE} is damaged ({error}); restore it from a backup, or delete it"
        ) from None


def _read(run_id: str) -> dict[str, Any]:
    """Return the values in the run's file, empty where it has none; raises ValueError or AttributeError if damaged."""
    content = read_artifact(run_id, FILE)
    return flat(json.loads(content)) if content is not None else {}


def start_provenance(run_id: str, values: Values) -> None:
    """Write the values of a training that begins or is resumed; of an earlier process, only the results stay."""
    with exclusive():
        kept = {name: one for name, one in _read_or_restore(run_id).items() if name.startswith(RESULTS)}
        _write_values(run_id, kept | dict(values))


def add_provenance(run_id: str, values: Values, *, overwrite: bool = True) -> dict[str, Any]:
    """Add values to the run's `provenance.json`, and return all of its values.

    Without `overwrite`, a value that the file already has is not changed.
    """
    with exclusive():
        known = _read_or_restore(run_id)
        merged = known | {name: one for name, one in values.items() if overwrite or name not in known}
        if merged != known:
            _write_values(run_id, merged)
    return merged


def _read_or_restore(run_id: str) -> dict[str, Any]:
    """Return the values in the run's file; where it is damaged, write it anew from the run's tags, with a warning.

    The damaged file is kept under another name. What differed from the commit and from the recipe is then unknown.
    """
    try:
        return _read(run_id)
    except (ValueError, AttributeError) as error:
        print(
            f"warning: MLflow run {run_id}: its artifact {FILE} is damaged ({error}); it is kept as {DAMAGED_FILE}, "
            "and only the values that are also tags are restored",
            flush=True,
        )
    _write(run_id, DAMAGED_FILE, read_artifact(run_id, FILE) or b"")
    run = find_run(run_id)
    values = {CHANGED_FILES: UNKNOWN, DIFFERENT: UNKNOWN, **(values_of(run.tags) if run else {})}
    _write_values(run_id, values)
    return values


def _write_values(run_id: str, values: Values) -> None:
    """Replace the run's file."""
    text = json.dumps(nested(values), indent=2, ensure_ascii=False, allow_nan=False)
    _write(run_id, FILE, f"{text}\n".encode())


def _write(run_id: str, name: str, content: bytes) -> None:
    """Write or replace an artifact of the run."""
    location = MlflowClient().get_run(run_id).info.artifact_uri
    if location.startswith(("file:", "/")) and not is_server(mlflow.get_tracking_uri()):
        folder = Path(local_file_uri_to_path(location))  # type: ignore[no-untyped-call]
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / name, content)
        return
    with tempfile.TemporaryDirectory() as folder_name:
        write_bytes(Path(folder_name, name), content)
        MlflowClient().log_artifact(run_id, str(Path(folder_name, name)))


@contextmanager
def exclusive() -> Iterator[None]:
    """Let one process of this project at a time change such a file, or what follows from it; it cannot be nested."""
    folder = artifact_folder(project_folder())
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
