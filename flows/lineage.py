"""Find all that belongs to a model from any one id: code, data, parameters, MLflow run, experiments, flow runs, files.

Most of it is in the tags and in `provenance.json` of MLflow runs. Experiments come from git's refs, states of flow runs
from Prefect.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from dvc.utils.serialize import parse_yaml
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.sorting import FlowRunSort
from prefect.utilities.urls import url_for

from flows.dvc_state import (
    DAMAGED,
    cache_folder,
    cached_path,
    experiment_refs,
    is_cached,
    listing,
    outputs,
    split_experiment_ref,
)
from flows.lineage_records import Experiment, File, FlowRun, Trace
from flows.prefect_server import MAX_RECORDS_PER_REQUEST, current_server, prefect_client
from flows.ui import is_mlflow_served, mlflow_page
from flows.workspace import EXPERIMENT_LABEL, existing_store
from pipeline.artifacts import BEST_WEIGHTS, DOWNLOAD, EVALUATE, NORMALIZE, TRAIN, file_md5
from pipeline.core.errors import TemporaryError, UserError, first_line, redact_url
from pipeline.core.git import EXCLUDE_OUTPUTS, UNKNOWN, find_commit, git, has_code, read_committed
from pipeline.core.sqlite import sqlite_path
from pipeline.params import POLICY
from pipeline.tracking.provenance import CHANGED_FILES, COMMIT, COMPARISON, FLOW_RUN, REPRODUCES, TRAIN_OUTPUTS
from pipeline.tracking.provenance_file import with_provenance
from pipeline.tracking.search import (
    Run,
    find_run,
    find_runs,
    find_runs_by_name,
    find_runs_by_prefix,
    find_runs_of_model,
    read_file,
)
from pipeline.tracking.seeds import children, is_parent
from pipeline.tracking.store import connect
from pipeline.tracking.store_uri import tracking_uri

NAME_TAGS = ("dvc.experiment", "prefect.flow_run_id", "prefect.flow_run_name", COMMIT)
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_SHORT_ID = re.compile(r"[0-9a-f]{7,31}|[0-9a-f]{33,39}")  # 32 digits are an MLflow run or an MD5, 40 are a commit
# text that can be a string in a query to MLflow: with one kind of quotation marks at most
_QUERYABLE = re.compile(r"(?!.*'.*\"|.*\".*')[^`\\]{1,250}")


class Sources:
    """The stores that are searched: git, DVC, MLflow and Prefect; `warnings` has a line for each failed search."""

    def __init__(self, project: Path) -> None:
        self.project, self.cache = project, cache_folder(project)
        self.warnings: list[str] = []
        self.has_mlflow, self.prefect_url = False, ""
        uri = existing_store(project)
        if uri is None:
            self.warnings.append(f"MLflow has no runs yet: {sqlite_path(tracking_uri(project))} does not exist")
        else:
            with self.warn_on_error("MLflow was not searched"):
                connect(uri)
                self.has_mlflow = True
        with self.warn_on_error("Prefect was not searched"):
            found = current_server(project)
            if found is None:
                raise UserError("no server of this project is running; `make ui` starts one")
            self.prefect_url = found.api_url

    @contextmanager
    def warn_on_error(self, what: str) -> Iterator[None]:
        """Add a warning that begins with `what` where the block fails."""
        try:
            yield
        except (*DAMAGED, TemporaryError) as error:
            self.warnings.append(f"{what} ({first_line(error)})")

    @cached_property
    def experiments(self) -> list[Experiment]:
        """Return the DVC experiments of the project."""
        found = []
        for ref in experiment_refs(self.project):
            baseline, name = split_experiment_ref(ref)
            with suppress(UserError):
                if commit := find_commit(self.project, ref):
                    found.append(Experiment(name, commit, baseline))
                    continue
            self.warnings.append(f"experiment {name} was not searched: its commit cannot be read; run `git fsck`")
        return found

    def runs(self, tag: str, value: str) -> list[Run]:
        """Return the MLflow runs with this tag; `%` in the value stands for any text."""
        return find_runs({tag: value}) if self.has_mlflow and _QUERYABLE.fullmatch(tag + value) else []

    def runs_of_model(self, model_md5: str | None) -> list[Run]:
        """Return the MLflow runs that made the model of this hash, without reproductions."""
        return find_runs_of_model(model_md5) if self.has_mlflow and model_md5 else []

    def ids_with_prefix(self, prefix: str) -> dict[str, str]:
        """Return the full ids that start with `prefix`, of commits and of MLflow runs, each with a description."""
        objects = git(self.project, "rev-parse", f"--disambiguate={prefix}").split()
        found = {name: f"commit {name}" for name in objects if find_commit(self.project, name) == name}
        with self.warn_on_error("MLflow's runs were not searched by short id"):
            runs = find_runs_by_prefix(prefix) if self.has_mlflow else []
            found |= {run.run_id: f"MLflow run {run.run_id} ({run.name})" for run in runs}
        return found

    def flow_runs(self, *wanted: str) -> list[FlowRun]:
        """Return Prefect's flow runs of these ids or names."""
        ids = [text for text in wanted if _UUID.fullmatch(text)]
        id_or_name = {"operator": "or_", "id": {"any_": ids}, "name": {"any_": wanted}}
        if not (self.prefect_url and wanted):
            return []
        with self.warn_on_error("Prefect was not searched"), prefect_client(self.prefect_url) as client:
            runs = client.read_flow_runs(
                flow_run_filter=FlowRunFilter.model_validate(id_or_name),
                sort=FlowRunSort.ID_DESC,
                limit=MAX_RECORDS_PER_REQUEST,
            )
            return [
                FlowRun(
                    run_id=str(run.id),
                    name=run.name,
                    state=run.state.name if run.state else None,
                    link=redact_url(url_for("flow-run", obj_id=run.id) or "") or None,
                    experiment=str(run.labels.get(EXPERIMENT_LABEL) or "") or None,
                )
                for run in runs
            ]
        return []

    def committed_file(self, commit: str | None, name: str) -> str:
        """Return the text of a file in a commit, or "" where this repository does not have the file or the commit."""
        known = commit and find_commit(self.project, commit)
        return (read_committed(self.project, known, name) if known else None) or ""

    def outputs(self, commit: str | None) -> dict[str, str]:
        """Return path and hash of the outputs in a commit's dvc.lock."""
        with self.warn_on_error(f"commit {commit}: dvc.lock cannot be read"):
            return outputs(self.committed_file(commit, "dvc.lock"))
        return {}

    def params(self, commit: str | None) -> dict[str, str]:
        """Return a commit's params.yaml in the form of MLflow's parameters: `{"train.epochs": "20", …}`."""
        with self.warn_on_error(f"commit {commit}: params.yaml cannot be read"):
            return flat_params(parse_yaml(self.committed_file(commit, "params.yaml"), "params.yaml") or {})
        return {}

    def listing(self, md5: str) -> dict[str, str]:
        """Return path and hash of the files of a folder in DVC's cache."""
        with self.warn_on_error(f"{cached_path(self.cache, md5)} in DVC's cache cannot be read"):
            return listing(self.cache, md5)
        return {}

    def model_of(self, commit: str | None) -> str | None:
        """Return the hash of the best model of a commit."""
        return self.listing(self.outputs(commit).get(str(TRAIN), "")).get(BEST_WEIGHTS)


def flat_params(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return parameters of runs by section in the form of MLflow's parameters: `{"train.epochs": "20", …}`."""
    return {
        f"{section}.{name}": ", ".join(map(redact_url, value)) if isinstance(value, list) else str(value)
        for section, fields in sections.items()
        if section != POLICY
        for name, value in fields.items()
    }


def trace(project: Path, wanted: str, *, file: Path | None = None) -> tuple[list[Trace], list[str]]:
    """Return all that belongs to the id `wanted`, newest first, and warnings on failed searches.

    With `file`, the MD5 of that file is the id. Raises UserError where nothing is found, or a short id is ambiguous.
    """
    sources = Sources(project)
    traces = find_traces(sources, file_md5(file) if file else wanted, file=file)
    return traces, list(dict.fromkeys(sources.warnings))


def find_traces(sources: Sources, wanted: str, *, file: Path | None = None) -> list[Trace]:
    """Return all that belongs to the id `wanted`, which is the MD5 of `file` if there is one; raises as `trace`."""
    wanted = wanted if file else _complete(sources, wanted)
    if re.fullmatch(r"[0-9A-Fa-f-]{32,40}", wanted):  # hashes and UUIDs are stored in lower case
        wanted = wanted.lower()
    runs, experiments, flow_runs = _match(sources, wanted)
    without_run = []
    for experiment in experiments:
        runs += (own_runs := runs_of(sources, experiment))
        without_run += [] if own_runs else [experiment]
    newest_first = sorted({run.run_id: run for run in runs}.values(), key=lambda run: run.started, reverse=True)
    traces = [_trace_run(sources, run) for run in newest_first]
    traces += [_trace_experiment(sources, experiment) for experiment in without_run]
    traces = traces or [Trace(flow_runs=(run,)) for run in flow_runs]
    if traces:
        return traces
    warnings = list(dict.fromkeys(sources.warnings))
    raise UserError(_not_found(sources, f"{file} (MD5 {wanted})" if file else wanted, warnings=warnings))


def _complete(sources: Sources, wanted: str) -> str:
    """Return the full id that `wanted` is short for, or `wanted` itself; raises UserError where there are several."""
    prefix = wanted.lower()
    if not _SHORT_ID.fullmatch(prefix) or wanted in {experiment.name for experiment in sources.experiments}:
        return wanted
    found = sources.ids_with_prefix(prefix)
    if len(found) > 1:
        candidates = ", ".join(found.values())
        raise UserError(f"{wanted}: short for {candidates}; allowed: the beginning of one id only; add digits")
    return next(iter(found), wanted)


def _not_found(sources: Sources, name: str, *, warnings: Sequence[str]) -> str:
    """Return the error message for an id to which no training belongs."""
    places = ["commits of this repository", f"{len(sources.experiments)} DVC experiments"]
    if sources.has_mlflow:
        places.append(f"runs, tags and model hashes in MLflow ({redact_url(tracking_uri(sources.project))})")
    places += ["Prefect's flow runs"] if sources.prefect_url else []
    remedy = "`make experiments` and `git log` list ids"
    return "; ".join([f"{name}: no training belongs to it; searched: {', '.join(places)}", *warnings, remedy])


def _match(sources: Sources, wanted: str) -> tuple[list[Run], list[Experiment], list[FlowRun]]:
    """Return the MLflow runs, the experiments and the flow runs that a full id or a name identifies."""
    flow_runs, commit = sources.flow_runs(wanted), find_commit(sources.project, wanted)
    names = {wanted, commit or wanted, *(run.run_id for run in flow_runs)}
    tagged = [(tag, name, run) for name in sorted(names) for tag in NAME_TAGS for run in sources.runs(tag, name)]
    runs = [run for tag, name, run in tagged if run.tags[tag] == name]  # not those of which `%` matches any text
    runs += [run for name in sorted(names) for run in sources.runs(f"{FLOW_RUN}{name}", "%")]
    model = sources.model_of(commit) if commit else None
    if re.fullmatch(r"[0-9a-f]{32}(\.dir)?", wanted):  # the MD5 of the folder artifacts/train, or of the model
        model = sources.listing(f"{wanted.removesuffix('.dir')}.dir").get(BEST_WEIGHTS, wanted)
    if model:
        runs += sources.runs(TRAIN_OUTPUTS, f"%{model}%") or sources.runs_of_model(model)
    runs = [
        run for run in runs if REPRODUCES not in run.tags and not (is_parent(run) and run.tags.get(COMMIT) == commit)
    ]
    runs += _runs_named(sources, wanted)
    names |= {run.experiment for run in flow_runs if run.experiment}
    found_children = [child for run in runs if is_parent(run) for child in children(run.run_id)]
    names |= {child.experiment for child in found_children}
    own_runs = [find_run(child.run_id) for child in found_children if child.run_id]
    runs = [run for run in (*runs, *own_runs) if run and not is_parent(run)]
    experiments = [
        found
        for found in sources.experiments
        if found.name in names
        or (commit and commit in (found.commit, found.baseline))
        or (model and sources.model_of(found.commit) == model)
    ]
    return runs, experiments, flow_runs


def _runs_named(sources: Sources, wanted: str) -> list[Run]:
    """Return the MLflow runs of this name or id, without those that record a comparison."""
    if not (sources.has_mlflow and _QUERYABLE.fullmatch(wanted)):
        return []
    named = [*find_runs_by_name(wanted), *filter(None, [find_run(wanted)])]
    return [run for run in named if COMPARISON not in run.tags]


def find_parents(sources: Sources, wanted: str) -> list[Run]:
    """Return the runs over several seeds that an id, a short id or a name identifies; raises as `trace`."""
    return [run for run in _runs_named(sources, _complete(sources, wanted)) if is_parent(run)]


def runs_of(sources: Sources, experiment: Experiment) -> list[Run]:
    """Return the runs of the experiment's own training, else those that made its model, which came from the cache."""
    own_runs = sources.runs("dvc.experiment", experiment.name)
    return own_runs or sources.runs_of_model(sources.model_of(experiment.commit))


def _trace_run(sources: Sources, run: Run) -> Trace:
    """Return the trace of an MLflow run."""
    with sources.warn_on_error(f"MLflow run {run.run_id}: only its tags were read"):
        run = with_provenance(run)
    tags = run.tags
    commit = _known(tags.get(COMMIT))
    dirty = _known(tags.get("git.dirty")) if commit else None  # without a commit, older versions recorded "false"
    difference = read_file(run, "uncommitted.diff") or b""
    found = re.findall(rb'^diff --git "?a/(.*?)"? "?b/', difference, re.MULTILINE)
    top = git(sources.project, "rev-parse", "--show-prefix")  # a patch has paths from the top of the repository
    changed_files = tuple(name.decode(errors="replace").removeprefix(top) for name in found)
    copies = sources.runs(REPRODUCES, run.run_id)
    experiments = tuple(_experiments_of(sources, run))
    files = _recorded_outputs(sources, run) or sources.outputs(experiments[0].commit if experiments else None)
    return Trace(
        commit=commit,
        # older versions, which had no list of the files, recorded "true" whatever files differed
        dirty=(
            dirty == "true" and (CHANGED_FILES in tags or not changed_files or has_code(changed_files))
            if dirty
            else None
        ),
        uncommitted=changed_files,
        data_set=run.params.get("download.dataset"),
        data_md5=tags.get("data.md5"),
        changed=_changed(sources.params(commit), run.params),
        run=run,
        run_link=mlflow_page(run.run_id, experiment_id=run.experiment_id, project=sources.project),
        run_link_served=is_mlflow_served(sources.project),
        reproductions=tuple((copy.run_id, copy.tags.get("reproduction.result", copy.status)) for copy in copies),
        experiments=experiments,
        flow_runs=tuple(_flow_runs_of(sources, run)),
        model_md5=tags.get("model.md5"),
        files=tuple(_files(sources, files)),
    )


def _trace_experiment(sources: Sources, experiment: Experiment) -> Trace:
    """Return the trace of an experiment of which MLflow knows nothing."""
    baseline, commit, hashes = experiment.baseline or "", experiment.commit, sources.outputs(experiment.commit)
    params, changed_files = sources.params(commit), None
    if find_commit(sources.project, baseline):
        changed_files = git(
            sources.project, "diff", "--name-only", "--relative", baseline, str(commit), "--", ".", EXCLUDE_OUTPUTS
        ).splitlines()
    return Trace(
        commit=baseline,
        dirty=None if changed_files is None else has_code(changed_files),
        uncommitted=tuple(changed_files or ()),
        data_set=params.get("download.dataset"),
        data_md5=sources.listing(hashes.get(str(NORMALIZE), "")).get("dataset.json"),
        changed=_changed(sources.params(baseline), params),
        experiments=(experiment,),
        model_md5=sources.model_of(commit),
        files=tuple(_files(sources, hashes)),
    )


def _known(tag: str | None) -> str | None:
    """Return the value of a tag, or None where it is missing or `unknown`."""
    return None if tag == UNKNOWN else tag


def _cache_users(run: Run) -> dict[str, str]:
    """Return id and experiment of the flow runs that took the run's model from the cache."""
    prefix = FLOW_RUN
    return {tag.removeprefix(prefix): name for tag, name in sorted(run.tags.items()) if tag.startswith(prefix)}


def _experiments_of(sources: Sources, run: Run) -> Iterator[Experiment]:
    """Yield the run's own experiment first, then those that took its model from the cache."""
    model, by_name = run.tags.get("model.md5"), {found.name: found for found in sources.experiments}
    same_model = [name for name, found in by_name.items() if model and sources.model_of(found.commit) == model]
    users = [name for name in same_model if run.run_id in {one.run_id for one in runs_of(sources, by_name[name])}]
    names = [run.tags.get("dvc.experiment"), *_cache_users(run).values(), *users]
    yield from (by_name.get(name) or Experiment(name, None) for name in dict.fromkeys(names) if name)


def _flow_runs_of(sources: Sources, run: Run) -> Iterator[FlowRun]:
    """Yield the flow run that made the run first, then those that took its model from the cache."""
    own, experiment = run.tags.get("prefect.flow_run_id"), run.tags.get("dvc.experiment")
    recorded = {own: FlowRun(own, run.tags.get("prefect.flow_run_name"), experiment=experiment)} if own else {}
    recorded = {run_id: FlowRun(run_id, experiment=name) for run_id, name in _cache_users(run).items()} | recorded
    known = {found.run_id: found for found in sources.flow_runs(*recorded)}
    yield from (known.get(run_id, recorded[run_id]) for run_id in dict.fromkeys([own, *recorded]) if run_id)


def _recorded_outputs(sources: Sources, run: Run) -> dict[str, str]:
    """Return path and hash of the run's outputs; empty where an older version did not record them."""
    files: dict[str, str] = {}
    with sources.warn_on_error(f"MLflow run {run.run_id}: its hashes of outputs cannot be read"):
        for folder in (TRAIN, EVALUATE):
            hashes = json.loads(run.tags.get(f"outputs.{folder.name}", "{}"))
            files |= {f"{folder}/{name}": md5 for name, md5 in hashes.items()}
    data = {str(folder): run.tags.get(f"dvc.{folder.name}") for folder in (DOWNLOAD, NORMALIZE)}
    return {path: md5 for path, md5 in data.items() if md5} | files if files else {}


def _files(sources: Sources, hashes: Mapping[str, str]) -> Iterator[File]:
    """Yield each output of `hashes`, path to MD5, with its path in the cache."""
    for path, md5 in hashes.items():
        yield File(path, md5, str(cached_path(sources.cache, md5)) if is_cached(sources.cache, md5) else None)


def _changed(committed: Mapping[str, str], here: Mapping[str, str]) -> dict[str, tuple[Any, Any]]:
    """Return the parameters that differ, with the committed and the other value: `{"train.epochs": ("20", "1")}`."""
    pairs = {name: (committed.get(name), value) for name, value in here.items()}
    return {name: (old, new) for name, (old, new) in pairs.items() if as_number(old) != as_number(new)}


def as_number(text: str | None) -> str | float | None:
    """Return the text as a number where it is one: MLflow has 30.0 where the file has 30."""
    try:
        return float(text or "")
    except ValueError:
        return text
