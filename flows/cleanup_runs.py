"""Decide which MLflow runs go with an old DVC experiment, and which experiments MLflow's runs and versions need."""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.dvc_history import HASH, DvcExperiment
from flows.dvc_state import DAMAGED, cache_folder, listing, outputs
from flows.workspace import existing_store
from pipeline.artifacts import BEST_WEIGHTS, TRAIN
from pipeline.core.git import read_committed
from pipeline.tracking.provenance import COMMIT, EXPERIMENT
from pipeline.tracking.provenance_file import with_provenance
from pipeline.tracking.retention import (
    KEEP,
    StoredRun,
    Version,
    read_stored_run,
    reason_in_use,
    reason_not_ours,
    registered_versions,
)
from pipeline.tracking.search import Run, find_run, find_runs
from pipeline.tracking.store import connect


@dataclass(frozen=True)
class Records:
    """What MLflow has: all registered versions, the runs of experiments, and the runs that must stay.

    The runs of experiments include those that are marked as deleted. `experiments` has the names of those that DVC has.
    """

    experiments: Collection[str]
    versions: Sequence[Version] = ()
    runs: Sequence[Run] = ()
    in_use: Sequence[Run] = ()

    def read(self, run: Run) -> StoredRun:
        """Return the run with all that goes with it."""
        return read_stored_run(run, versions=self.versions)

    def hashes_in_use(self) -> set[str]:
        """Return the hashes that the runs in use record of their data and results; some have no experiment."""
        texts = [text for run in self.in_use for text in run.tags.values()]
        return {match[0] for text in texts for match in re.finditer(HASH, text)}


def read_records(project: Path, *, experiments: Collection[str]) -> Records:
    """Read what MLflow has; nothing where its store does not exist."""
    uri = existing_store(project)
    if uri is None:
        return Records(experiments)
    connect(uri)
    versions = registered_versions()
    registered = [find_run(run_id) for run_id in {one.run_id for one in versions if one.use}]
    in_use = [with_provenance(run) for run in (*find_runs({KEEP: "%"}), *filter(None, registered))]
    return Records(experiments, versions, find_runs({EXPERIMENT: "%"}, with_deleted=True), in_use)


def reason_needed(experiment: DvcExperiment, records: Records, *, commits: Collection[str]) -> str:
    """Return the reason why the experiment must be kept whatever its age, or an empty text.

    `commits` are those of branches, tags, champions and stashes.
    """
    if experiment.commit in commits:
        return "a branch, a tag, a champion, a stash or the last `dvc exp apply` has it"
    runs = [run for run in records.runs if run.tags[EXPERIMENT] == experiment.name]
    uses = ((run, reason_in_use(records.read(run))) for run in runs)
    return next((f"MLflow run {run.run_id}: {use}" for run, use in uses if use), "")


def runs_of(
    experiment: DvcExperiment, records: Records, *, project: Path, needed: Collection[str]
) -> Iterator[tuple[StoredRun, str]]:
    """Yield the runs that may belong to the experiment alone, each with a reason to keep it or an empty text.

    `needed` has the MD5 of each file that stays.
    """
    trained, model = _model_of(project, experiment)
    for run in records.runs:
        model_md5, name = run.tags.get("model.md5"), run.tags[EXPERIMENT]
        is_own = name == experiment.name and run.tags.get(COMMIT) == experiment.baseline
        # the run's own experiment was removed earlier, and this experiment took the model from DVC's cache
        is_orphan = model is not None and model_md5 == model and name not in records.experiments
        if not (is_own or is_orphan):
            continue
        stored = records.read(run)
        reason = reason_in_use(stored) or reason_not_ours(stored, project, is_orphan=is_orphan)
        if model_md5 and (model_md5 in needed or trained in needed):
            reason = reason or "it made a model that is still needed"
        if model_md5 and model_md5 != model:
            reason = reason or "it is not certain that its model is the experiment's"
        yield stored, reason


def _model_of(project: Path, experiment: DvcExperiment) -> tuple[str | None, str | None]:
    """Return the hashes of the experiment's training and of its model; None where they are not known."""
    try:
        trained = outputs(read_committed(project, experiment.commit, "dvc.lock") or "").get(str(TRAIN))
        return trained, listing(cache_folder(project), trained or "").get(BEST_WEIGHTS)
    except DAMAGED:
        return None, None
