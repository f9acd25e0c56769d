"""The results of several seeds: read from their DVC experiments, and summarized as mean and standard deviation.

An experiment has all that is needed, whichever process saved it: a parent flow run that resumes the work of a killed
one, or whose seeds ran elsewhere, finds their results in the same way.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.dvc_history import DvcExperiment, list_experiments
from flows.dvc_state import DAMAGED, cache_folder, cached_path, listing, outputs
from flows.git import Snapshot
from pipeline.artifacts import BEST_WEIGHTS, HISTORY, NORMALIZE, SELECTED_COLUMN, TRAIN, read_csv
from pipeline.core.errors import UserError
from pipeline.core.git import EXCLUDE_OUTPUTS, PARAMETER_FILES, git, read_committed
from pipeline.core.yaml import parse_yaml
from pipeline.params import PARAMS_FILE
from pipeline.reporting.baseline import METRICS_FILE
from pipeline.tracking.provenance import metrics_of_models

DVC_FILES = ".dvc/tmp"  # a folder whose files DVC adds to an experiment
VALIDATION = "validation_"  # the beginning of the columns of the history that have metrics of the validation split
ACCURACY = "accuracy"
WITHOUT_DUPLICATES = "accuracy_without_duplicates"


@dataclass(frozen=True)
class SeedResult:
    """The result of one seed, as its experiment has it.

    `created` is when it was saved, in seconds (UTC). `metrics` are those of `evaluate` on the test split, `validation`
    those of the selected epoch by name, as `accuracy`. `data_md5` is the hash of the normalized data; `model_md5` is
    None where the model is not known.
    """

    seed: int
    experiment: str
    created: int
    metrics: Mapping[str, Any]
    validation: Mapping[str, float]
    data_md5: str | None
    model_md5: str | None


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (divisor n - 1) of one figure over the seeds."""

    mean: float
    deviation: float


def find_result(
    project: Path, *, seed: int, params: Mapping[str, Any], snapshot: Snapshot, since: float
) -> SeedResult | None:
    """Return the newest result of these parameters and files that was saved after `since` (seconds, UTC), or None.

    A result that cannot be read, since its files are missing or damaged, counts as none.
    """
    for experiment in list_experiments(project):
        is_candidate = experiment.created >= int(since) and experiment.baseline == snapshot.head
        if is_candidate and _is_of(project, experiment, params=params, snapshot=snapshot):
            return _read(project, experiment, seed=seed)
    return None


def _is_of(project: Path, experiment: DvcExperiment, *, params: Mapping[str, Any], snapshot: Snapshot) -> bool:
    """Return whether the experiment has these parameters and, apart from its results, the files of the snapshot."""
    try:
        found = parse_yaml(read_committed(project, experiment.commit, str(PARAMS_FILE)) or "{}", origin=experiment.name)
    except UserError:
        return False
    if found != params:
        return False
    others = [f":(exclude){name}" for name in (*PARAMETER_FILES, DVC_FILES)]
    return not git(
        project, "diff", "--name-only", snapshot.commit, experiment.commit, "--", ".", EXCLUDE_OUTPUTS, *others
    )


def _read(project: Path, experiment: DvcExperiment, *, seed: int) -> SeedResult | None:
    """Return the result that an experiment has, or None where it cannot be read."""
    cache = cache_folder(project)
    try:
        hashes = outputs(read_committed(project, experiment.commit, "dvc.lock") or "")
        trained = listing(cache, hashes.get(str(TRAIN), ""))
        validation = selected_validation(cached_path(cache, trained[HISTORY]))
        metrics = json.loads(read_committed(project, experiment.commit, str(METRICS_FILE)) or "")
    except (*DAMAGED, OSError, StopIteration):
        return None
    return SeedResult(
        seed,
        experiment.name,
        experiment.created,
        metrics=metrics,
        validation=validation,
        data_md5=hashes.get(str(NORMALIZE)),
        model_md5=trained.get(BEST_WEIGHTS),
    )


def selected_validation(history: Path) -> dict[str, float]:
    """Return the metrics of the validation split by name, such as `accuracy`, of the selected epoch of a history.

    Raises StopIteration where no epoch is selected.
    """
    selected = next(row for row in read_csv(history) if row[SELECTED_COLUMN])
    return {
        name.removeprefix(VALIDATION): float(one)
        for name, one in selected.items()
        if name.startswith(VALIDATION) and one
    }


def spreads(results: Sequence[SeedResult]) -> dict[str, Spread]:
    """Return the spread of each metric that compares models and that all seeds have, accuracy first."""
    names = metrics_of_models(results[0].metrics)
    shared = [name for name in names if all(isinstance(one.metrics.get(name), float) for one in results)]
    return {
        name: spread([one.metrics[name] for one in results])
        for name in sorted(shared, key=lambda name: (name != ACCURACY, name))
    }


def spread(values: Sequence[float]) -> Spread:
    """Return mean and sample standard deviation of two values or more."""
    return Spread(statistics.fmean(values), statistics.stdev(values))


def charted(results: Sequence[SeedResult]) -> dict[str, float]:
    """Return the metrics of the MLflow run over the seeds: means, named as in single runs, and deviations in `sd/`."""
    found = {f"test/{name}": one for name, one in spreads(results).items()}
    validation = spread([one.validation[ACCURACY] for one in results])
    means = {name: one.mean for name, one in found.items()} | {"selected/validation_accuracy": validation.mean}
    deviations = {f"sd/{name.partition('/')[2]}": one.deviation for name, one in found.items()}
    return means | deviations | {"sd/validation_accuracy": validation.deviation}


def best_on_validation(results: Sequence[SeedResult], *, select_by: str) -> SeedResult:
    """Return the seed whose selected epoch is best on the validation split, by the metric that selects epochs.

    Of equal ones it is that of the lower validation loss, then of the lower seed.
    """
    return min(results, key=lambda one: (*validation_rank(one.validation, select_by=select_by), one.seed))


def validation_rank(validation: Mapping[str, float], *, select_by: str) -> tuple[float, float]:
    """Return the key by which seeds are sorted, the best first, from the validation metrics of the selected epoch."""
    loss = validation.get("loss", 0.0)
    return loss if select_by == "loss" else -validation[select_by], loss
