"""Register a model after its evaluation; what MLflow does not accept is queued for the next evaluation or promotion.

`.cache/registry/` has a JSON file for each queued registration.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from pipeline.artifacts import cache_folder, read_json, write_json
from pipeline.core.errors import TemporaryError, UserError, first_line
from pipeline.tracking.provenance import EXPERIMENT
from pipeline.tracking.provenance_file import with_provenance
from pipeline.tracking.registry import ACCURACY, TITLE, Version, register_version, registered_name
from pipeline.tracking.search import Run, find_run
from pipeline.tracking.store import store_md5

# values of the run that made the model which its version has as hidden tags
FROM_RUN = (
    *("git.commit", "git.dirty", "params.md5", "code.md5", "recipe", EXPERIMENT),
    *("prefect.flow_run_id", "prefect.flow_run_name"),
)
DATA = "data.md5"
METRICS = "metrics"  # hidden tag: all figures of the evaluation, as JSON
FIELDS = {"store", "name", "run_id", "model_md5", "test_md5", DATA, METRICS}


def register_evaluation(
    run_id: str, *, experiment: str, model_md5: str, test_md5: str, data_md5: str, metrics: Mapping[str, float]
) -> None:
    """Register the model of a run as it was evaluated, and what is queued; print the versions.

    `experiment` is the name of the experiment for the data set, `data_md5` the MD5 of `dataset.json`, `metrics` the
    content of `metrics.json`. The registration is queued first: where MLflow fails, or this process is killed, it stays
    queued, with a warning.
    """
    identity = {"run_id": run_id, "model_md5": model_md5, "test_md5": test_md5}
    registration = {
        "store": store_md5(),
        "name": registered_name(experiment),
        **identity,
        DATA: data_md5,
        METRICS: dict(metrics),
    }
    write_json(_queue() / f"{model_md5}-{test_md5}.json", registration)
    for version in register_pending():
        print(f"MLflow model {version.name} version {version.number}", flush=True)


def pending_registrations() -> list[Path]:
    """Return the file of each queued registration."""
    return sorted(_queue().glob("*.json"))


def register_pending() -> list[Version]:
    """Register what is queued for the connected store, and return the versions; print a warning for each failure."""
    versions = []
    for path in pending_registrations():
        try:
            version = _register(path)
        except (UserError, TemporaryError, OSError) as error:
            if path.exists():  # else another process has just registered it
                reason = first_line(error)
                print(f"warning: {path} stays queued for the next evaluation or promotion: {reason}", flush=True)
        else:
            versions += [version] if version else []
    return versions


def _register(path: Path) -> Version | None:
    """Register what is queued in a file, and delete the file; return None where MLflow no longer has the run.

    The file stays where it is for another store. Raises UserError where the file is damaged.
    """
    queued = read_json(path)
    if not isinstance(queued, dict) or queued.keys() != FIELDS:
        raise UserError(f"{path} is damaged; remove it, then `dvc repro --force evaluate`")
    version, run = None, find_run(queued["run_id"])
    if run:
        identity = {name: queued[name] for name in ("name", "run_id", "model_md5", "test_md5")}
        tags = {DATA: queued[DATA], **_tags(with_provenance(run), metrics=queued[METRICS])}
        version = register_version(**identity, tags=tags)
    elif queued["store"] != store_md5():
        return None
    path.unlink(missing_ok=True)  # another process may have registered it just now
    return version


def _tags(run: Run, *, metrics: Mapping[str, float]) -> dict[str, str]:
    """Return the tags of a version: accuracy and title, which people see, all metrics, and values of the run."""
    values = {name: run.tags[name] for name in FROM_RUN if run.tags.get(name)}
    accuracy = {ACCURACY: f"{metrics['accuracy']:.4f}"} if "accuracy" in metrics else {}
    return {**accuracy, TITLE: run.name, METRICS: json.dumps(metrics), **values}


def _queue() -> Path:
    return cache_folder("registry")
