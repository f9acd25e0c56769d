"""Find the models that a text names, for a comparison or a promotion."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.lineage import Sources, find_parents, find_traces
from flows.lineage_records import Trace
from flows.seeds_results import selected_validation, validation_rank
from flows.stored_models import SHORT_ID, Model, candidate, file_of, of_checkout, of_commit, of_experiment, of_trace
from pipeline.artifacts import HISTORY, TRAIN
from pipeline.core.errors import UserError
from pipeline.core.git import find_commit
from pipeline.tracking.registry import CHALLENGER, CHAMPION, PREVIOUS, Version, find_names, find_versions
from pipeline.tracking.search import Run
from pipeline.tracking.seeds import best_experiment, children

__all__ = ["Group", "Model", "best_model", "candidate", "find_models"]  # a caller needs no other module
CHECKOUT = (".", "HEAD")
ALIASES = (CHAMPION, CHALLENGER, PREVIOUS)
MAX_LISTED = 8
_VERSION = re.compile(r"(?P<scheme>models:/)?(?P<name>[^@]+?)(@(?P<alias>[^@/]+)|/(?P<number>\d+))")


@dataclass(frozen=True)
class Group:
    """What a text names: one model, or those of several seeds of a recipe (`is_recipe`) in the order of `seeds`.

    `run_id` is the MLflow run of the model, or the parent of the runs of the seeds; None if unknown. `best` is the
    model that the parent has recorded as the best on validation, None where it has recorded none.
    """

    label: str
    models: tuple[Model, ...]
    is_recipe: bool = False
    seeds: tuple[str, ...] = ()
    run_id: str | None = None
    best: Model | None = None


def best_model(group: Group) -> Model:
    """Return the model of a group that is best on validation: the recorded one, else by the rule that records it."""

    def rank(model: Model) -> tuple[float, float]:
        validation = selected_validation(file_of(model, str(TRAIN / HISTORY)))
        return validation_rank(validation, select_by=model.params.get("train.select_by", "accuracy"))

    return group.best or (group.models[0] if len(group.models) == 1 else min(group.models, key=rank))


def find_models(project: Path, text: str, *, registered: str | None = None, sources: Sources | None = None) -> Group:
    """Return the models that a text names.

    `text` is an id or a name of an MLflow run, the name of a DVC experiment, a git commit, `.` or `HEAD` for the
    checkout, a registered version (`digits/3`, `models:/digits@champion`), or one of the aliases `champion`,
    `challenger` and `previous` of the registered model `registered`, by default of the only one. Raises UserError where
    the text names no model or several.
    """
    sources = sources or Sources(project)
    if text in CHECKOUT:
        return _single(of_checkout(sources, text))
    if version := _find_version(sources, text, registered=registered):
        return _single(_of_version(sources, version, text=text))
    for experiment in sources.experiments:
        if text == experiment.name:
            return _single(of_experiment(sources, experiment))
    commit = find_commit(project, text)
    if commit and str(TRAIN) in sources.outputs(commit):
        return _single(of_commit(sources, commit, text=text))
    if parents := find_parents(sources, text):
        return _of_parents(sources, parents, text=text)
    return _of_traces(sources, find_traces(sources, text), text=text)


def _single(model: Model) -> Group:
    return Group(model.label, (model,), run_id=model.run_id)


def _of_traces(sources: Sources, traces: Sequence[Trace], *, text: str) -> Group:
    """Return the model of the traces of one id or name; raises UserError where they have none or several."""
    trained = {found.model_md5: found for found in reversed(traces) if found.model_md5}  # the newest of each model
    if len(trained) == 1:
        [found] = trained.values()
        return _single(of_trace(sources, found, text=text))
    if trained:
        listed = [_describe(found) for found in traces if found.model_md5]
        more = f", and {len(listed) - MAX_LISTED} more" if len(listed) > MAX_LISTED else ""
        raise UserError(
            f"{text}: names {len(trained)} models; allowed: the name of one; name one of "
            f"{', '.join(listed[:MAX_LISTED])}{more}"
        )
    states = ", ".join(sorted({f"MLflow run {found.run.status}" for found in traces if found.run}))
    raise UserError(
        f"{text}: found no model ({states or 'no MLflow run'}); allowed: a training that has ended; "
        "`make experiments` lists them"
    )


def _describe(found: Trace) -> str:
    """Return the names by which the model of a trace can be named."""
    names = [one.name for one in found.experiments if one.commit][:1]
    names += [f"MLflow run {found.run.run_id[:SHORT_ID]}"] if found.run else []
    return " = ".join(names) or f"commit {found.commit}"


def _of_parents(sources: Sources, parents: Sequence[Run], *, text: str) -> Group:
    """Return the models of the seeds of the only parent; raises UserError where there are several, or no model."""
    if len(parents) > 1:
        ids = ", ".join(run.run_id[:SHORT_ID] for run in parents[:MAX_LISTED])
        raise UserError(f"{text}: names {len(parents)} runs over several seeds; allowed: one; name one of {ids}")
    [parent] = parents
    found, best = children(parent.run_id), best_experiment(parent.run_id)
    by_name = {one.name: one for one in sources.experiments}
    models = []
    for child in found:
        label = f"{parent.name} seed={child.seed}"
        if child.experiment in by_name:
            models.append(of_experiment(sources, by_name[child.experiment], label=label))
        else:
            found_traces = find_traces(sources, child.run_id or child.experiment)
            models.append(of_trace(sources, found_traces[0], text=child.experiment, label=label))
    if not models:
        raise UserError(f"{parent.name}: no seed of it has ended; the command that started it completes it")
    return Group(
        parent.name,
        tuple(models),
        is_recipe=True,
        seeds=tuple(str(child.seed) for child in found),
        run_id=parent.run_id,
        best=next((model for model, child in zip(models, found, strict=True) if child.experiment == best), None),
    )


def _find_version(sources: Sources, text: str, *, registered: str | None) -> Version | None:
    """Return the registered version that a text names, or None where it has another form.

    Raises UserError where there is no such version, or an alias may be of several registered models.
    """
    match = _VERSION.fullmatch(text)
    if text not in ALIASES and not match:
        return None
    if not sources.has_mlflow:
        if match and not match["scheme"]:
            return None
        raise UserError(f"{text}: needs MLflow's model registry; {'; '.join(sources.warnings)}")
    names = find_names()
    if match and match["name"] not in names and not match["scheme"]:  # such as the name of a branch
        return None
    name = match["name"] if match else registered or _only_name(names, alias=text)
    versions = find_versions(name)
    number, alias = (match["number"], match["alias"]) if match else (None, text)
    for version in versions:
        if version.number == number or alias in version.aliases:
            return version
    known = ", ".join(" ".join([f"{name}/{one.number}", *one.aliases]) for one in versions)
    allowed = known or "none, since nothing is registered yet"
    raise UserError(f"{text}: {name} has no such version or alias; allowed: {allowed}")


def _only_name(names: Sequence[str], *, alias: str) -> str:
    """Return the only registered model; raises UserError where there is none, or several."""
    if len(names) == 1:
        return names[0]
    raise UserError(
        f"{alias}: found {len(names)} registered models ({', '.join(names) or 'a training registers one'}); allowed: "
        f"the alias of a certain one, as in models:/NAME@{alias}"
    )


def _of_version(sources: Sources, version: Version, *, text: str) -> Model:
    """Return the model of a registered version: where several experiments made it, one with the same test split."""
    number = f"{version.name} version {version.number}"
    label = f"{text} ({number})" if text in ALIASES else number
    traces = [found for found in find_traces(sources, version.model_md5) if found.model_md5 == version.model_md5]
    names = {one.name for found in traces for one in found.experiments}
    models = [of_experiment(sources, one, label=label) for one in sources.experiments if one.name in names]
    models = [one for one in models if one.model_md5 == version.model_md5]
    models += [of_trace(sources, found, text=text, label=label) for found in traces]
    if not models:
        raise UserError(f"{label}: the training of its model {version.model_md5} was removed; restore it from a backup")
    return next((one for one in models if _has_split(one, version.test_md5)), models[0])


def _has_split(model: Model, test_md5: str) -> bool:
    """Return whether the model's predictions are here, and are of this test split."""
    try:
        return model.test_md5 == test_md5
    except UserError:
        return False
