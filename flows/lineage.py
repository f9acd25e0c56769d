"""Find all that belongs to a model from any one id: code, data, parameters, MLflow run, experiments, flow runs, files.

MLflow's tags hold most of it; git's refs hold the experiments, Prefect the states of the flow runs.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dvc.utils.serialize import parse_yaml
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.sorting import FlowRunSort
from prefect.utilities.urls import url_for

from flows.dvc_state import DAMAGED, cache_folder, cached_path, experiment_refs, is_cached, listing, outputs
from flows.prefect_server import PAGE_SIZE, prefect_client, server_in_force
from flows.ui import mlflow_page
from flows.workspace import EXPERIMENT_LABEL, made_store
from pipeline.artifacts import BEST_WEIGHTS, DOWNLOAD, EVALUATE, NORMALIZE, TRAIN, file_md5
from pipeline.core.errors import TemporaryError, UserError, first_line, redact_url
from pipeline.core.git import UNKNOWN, find_commit, git, read_committed
from pipeline.core.sqlite import sqlite_path
from pipeline.tracking.provenance import COMMIT, FLOW_RUN, REPRODUCES
from pipeline.tracking.search import Run, find_run, find_runs, find_runs_of_model, read_file
from pipeline.tracking.store import connect
from pipeline.tracking.store_uri import tracking_uri

NAME_TAGS = ("dvc.experiment", "prefect.flow_run_id", "prefect.flow_run_name", COMMIT)
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_SAFE = re.compile(r"[\w .:/+%-]{1,250}")
"""What may stand in a query to MLflow."""


@dataclass(frozen=True)
class Experiment:
    """A DVC experiment; `commit` is None where this repository no longer has it."""

    name: str
    commit: str | None
    baseline: str | None = None


@dataclass(frozen=True)
class FlowRun:
    """A Prefect flow run; without a server only its id, and mostly its name, are known."""

    run_id: str
    name: str | None = None
    state: str | None = None
    link: str | None = None
    experiment: str | None = None


@dataclass(frozen=True)
class File:
    """A file or folder that the run made, its MD5, and where DVC's cache has it (None: nowhere)."""

    path: str
    md5: str
    cached: str | None


@dataclass(frozen=True)
class Trace:
    """All that belongs to one training; what is not known is None or empty."""

    commit: str | None = None
    dirty: bool | None = None
    uncommitted: tuple[str, ...] = ()
    data_set: str | None = None
    data_md5: str | None = None
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    run: Run | None = None
    run_link: str | None = None
    reproductions: tuple[tuple[str, str], ...] = ()
    experiments: tuple[Experiment, ...] = ()
    flow_runs: tuple[FlowRun, ...] = ()
    model_md5: str | None = None
    files: tuple[File, ...] = ()


class Sources:
    """Git, DVC, MLflow and Prefect; `notes` has a line for each thing that could not be read."""

    def __init__(self, project: Path) -> None:
        self.project, self.cache = project, cache_folder(project)
        self.notes: list[str] = []
        self.mlflow, self.prefect = False, ""
        uri = made_store(project)
        if uri is None:
            self.notes.append(f"MLflow has no runs yet: {sqlite_path(tracking_uri(project))} does not exist")
        else:
            with self.noting("MLflow was not looked at"):
                connect(uri)
                self.mlflow = True
        with self.noting("Prefect was not looked at"):
            found = server_in_force(project)
            if found is None:
                raise UserError("no server of this project is running: `python -m flows.server start`")
            self.prefect = found.api_url

    @contextmanager
    def noting(self, what: str) -> Iterator[None]:
        """Turn a failure in the block into a note."""
        try:
            yield
        except (*DAMAGED, TemporaryError) as error:
            self.notes.append(f"{what} ({first_line(error)})")

    @cached_property
    def experiments(self) -> list[Experiment]:
        found = []
        for ref in experiment_refs(self.project):
            _, _, first, rest, name = ref.split("/", 4)
            with suppress(UserError):
                if commit := find_commit(self.project, ref):
                    found.append(Experiment(name, commit, first + rest))
                    continue
            self.notes.append(f"experiment {name} was not looked at: its commit cannot be read (`git fsck` says more)")
        return found

    def runs(self, tag: str, value: str) -> list[Run]:
        """Return MLflow's runs with this tag."""
        return find_runs({tag: value}) if self.mlflow and _SAFE.fullmatch(tag + value) else []

    def makers(self, model: str | None) -> list[Run]:
        """Return the runs that made the model of this hash, without reproductions."""
        return find_runs_of_model(model) if self.mlflow and model else []

    def flow_runs(self, *wanted: str) -> list[FlowRun]:
        """Return Prefect's flow runs of these ids or names."""
        ids = [text for text in wanted if _UUID.fullmatch(text)]
        which = {"operator": "or_", "id": {"any_": ids}, "name": {"any_": wanted}}
        if not (self.prefect and wanted):
            return []
        with self.noting("Prefect was not looked at"), prefect_client(self.prefect) as client:
            runs = client.read_flow_runs(
                flow_run_filter=FlowRunFilter.model_validate(which), sort=FlowRunSort.ID_DESC, limit=PAGE_SIZE
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

    def file(self, commit: str | None, name: str) -> str:
        """Return the text of a file in a commit; empty where there is none, or the commit is not in this repository."""
        known = commit and find_commit(self.project, commit)
        return (read_committed(self.project, known, name) if known else None) or ""

    def outputs(self, commit: str | None) -> dict[str, str]:
        """Return path and hash of the outputs in a commit's dvc.lock."""
        with self.noting(f"commit {commit}: dvc.lock cannot be read"):
            return outputs(self.file(commit, "dvc.lock"))
        return {}

    def params(self, commit: str | None) -> dict[str, str]:
        """Return a commit's params.yaml as MLflow has it: `{"train.epochs": "20", …}`."""
        with self.noting(f"commit {commit}: params.yaml cannot be read"):
            sections = parse_yaml(self.file(commit, "params.yaml"), "params.yaml") or {}
            return {
                f"{section}.{name}": ", ".join(map(redact_url, value)) if isinstance(value, list) else str(value)
                for section, fields in sections.items()
                for name, value in fields.items()
            }
        return {}

    def listing(self, md5: str) -> dict[str, str]:
        """Return path and hash of the files of a folder in DVC's cache."""
        with self.noting(f"{cached_path(self.cache, md5)} in DVC's cache cannot be read"):
            return listing(self.cache, md5)
        return {}

    def model_of(self, commit: str | None) -> str | None:
        """Return the hash of the best model of a commit."""
        return self.listing(self.outputs(commit).get(str(TRAIN), "")).get(BEST_WEIGHTS)


def trace(project: Path, wanted: str, *, file: Path | None = None) -> tuple[list[Trace], list[str]]:
    """Return all that belongs to `wanted`, newest first, and notes on what could not be looked at.

    `file`: where `wanted` is the path of a file. Raises UserError where nothing is known of it.
    """
    sources = Sources(project)
    wanted = file_md5(file) if file else wanted
    if re.fullmatch(r"[0-9A-Fa-f-]{32,40}", wanted):  # hashes and UUIDs are kept in lower case
        wanted = wanted.lower()
    runs, experiments, flow_runs = _match(sources, wanted)
    loose = []
    for experiment in experiments:
        runs += (own := _runs_of(sources, experiment))
        loose += [] if own else [experiment]
    newest_first = sorted({run.run_id: run for run in runs}.values(), key=lambda run: run.started, reverse=True)
    traces = [_of_run(sources, run) for run in newest_first] + [_of_experiment(sources, found) for found in loose]
    traces = traces or [Trace(flow_runs=(run,)) for run in flow_runs]
    notes = list(dict.fromkeys(sources.notes))
    if traces:
        return traces, notes
    name = f"{file} (MD5 {wanted})" if file else wanted
    places = ["commits of this repository", f"{len(sources.experiments)} DVC experiments"]
    places += [f"runs, tags and model hashes in MLflow ({redact_url(tracking_uri(project))})"] if sources.mlflow else []
    places += ["Prefect's flow runs"] if sources.prefect else []
    raise UserError("; ".join([f"{name}: nothing known of it; looked at: {', '.join(places)}", *notes]))


def _match(sources: Sources, wanted: str) -> tuple[list[Run], list[Experiment], list[FlowRun]]:
    """Return the MLflow runs, experiments and flow runs that the id names."""
    flow_runs, commit = sources.flow_runs(wanted), find_commit(sources.project, wanted)
    names = {wanted, commit or wanted, *(run.run_id for run in flow_runs)}
    runs = [run for name in sorted(names) for tag in NAME_TAGS for run in sources.runs(tag, name)]
    runs += [run for name in sorted(names) for run in sources.runs(f"{FLOW_RUN}{name}", "%")]
    model = sources.model_of(commit) if commit else None
    if re.fullmatch(r"[0-9a-f]{32}(\.dir)?", wanted):  # of a folder, a file in it or the model
        model = sources.listing(f"{wanted.removesuffix('.dir')}.dir").get(BEST_WEIGHTS, wanted)
    if model:
        runs += sources.runs("outputs.train", f"%{model}%") or sources.makers(model)
    runs = [run for run in runs if REPRODUCES not in run.tags]
    if sources.mlflow and _SAFE.fullmatch(wanted) and (run := find_run(wanted)):
        runs.append(run)
    names |= {run.experiment for run in flow_runs if run.experiment}
    experiments = [
        found
        for found in sources.experiments
        if found.name in names
        or (commit and commit in (found.commit, found.baseline))
        or (model and sources.model_of(found.commit) == model)
    ]
    return runs, experiments, flow_runs


def _runs_of(sources: Sources, experiment: Experiment) -> list[Run]:
    """Return the runs of the experiment's own training, else those that made the model which it took from the cache."""
    own = sources.runs("dvc.experiment", experiment.name)
    return own or sources.makers(sources.model_of(experiment.commit))


def _of_run(sources: Sources, run: Run) -> Trace:
    """Return the trace of an MLflow run."""
    tags = run.tags
    commit = _known(tags.get(COMMIT))
    dirty = _known(tags.get("git.dirty")) if commit else None  # older versions recorded that nothing was changed
    difference = read_file(run, "uncommitted.diff") or b""
    changed_files = re.findall(rb'^diff --git "?a/(.*?)"? "?b/', difference, re.MULTILINE)
    copies = sources.runs(REPRODUCES, run.run_id)
    experiments = tuple(_experiments_of(sources, run))
    files = _recorded(sources, run) or sources.outputs(experiments[0].commit if experiments else None)
    return Trace(
        commit=commit,
        dirty=dirty == "true" if dirty else None,
        uncommitted=tuple(name.decode(errors="replace") for name in changed_files),
        data_set=run.params.get("download.dataset"),
        data_md5=tags.get("data.md5"),
        changed=_changed(sources.params(commit), run.params),
        run=run,
        run_link=mlflow_page(run.run_id, project=sources.project),
        reproductions=tuple((copy.run_id, copy.tags.get("reproduction.result", copy.status)) for copy in copies),
        experiments=experiments,
        flow_runs=tuple(_flow_runs_of(sources, run)),
        model_md5=tags.get("model.md5"),
        files=tuple(_files(sources, files)),
    )


def _of_experiment(sources: Sources, experiment: Experiment) -> Trace:
    """Return the trace of an experiment of which MLflow knows nothing."""
    baseline, commit, made = experiment.baseline or "", experiment.commit, sources.outputs(experiment.commit)
    params, changed_files = sources.params(commit), None
    if find_commit(sources.project, baseline):
        changed_files = git(sources.project, "diff", "--name-only", baseline, str(commit)).splitlines()
    return Trace(
        commit=baseline,
        dirty=None if changed_files is None else bool(changed_files),
        uncommitted=tuple(changed_files or ()),
        data_set=params.get("download.dataset"),
        data_md5=sources.listing(made.get(str(NORMALIZE), "")).get("dataset.json"),
        changed=_changed(sources.params(baseline), params),
        experiments=(experiment,),
        model_md5=sources.model_of(commit),
        files=tuple(_files(sources, made)),
    )


def _known(tag: str | None) -> str | None:
    return None if tag == UNKNOWN else tag


def _users(run: Run) -> dict[str, str]:
    """Return id and experiment of the flow runs that took the run's model from the cache."""
    prefix = FLOW_RUN
    return {tag.removeprefix(prefix): name for tag, name in sorted(run.tags.items()) if tag.startswith(prefix)}


def _experiments_of(sources: Sources, run: Run) -> Iterator[Experiment]:
    """Yield the run's own experiment first, then those that took its model from the cache."""
    model, here = run.tags.get("model.md5"), {found.name: found for found in sources.experiments}
    same_model = [name for name, found in here.items() if model and sources.model_of(found.commit) == model]
    users = [name for name in same_model if run in _runs_of(sources, here[name])]
    names = [run.tags.get("dvc.experiment"), *_users(run).values(), *users]
    yield from (here.get(name) or Experiment(name, None) for name in dict.fromkeys(names) if name)


def _flow_runs_of(sources: Sources, run: Run) -> Iterator[FlowRun]:
    """Yield the flow run that made the run first, then those that took its model from the cache."""
    own, experiment = run.tags.get("prefect.flow_run_id"), run.tags.get("dvc.experiment")
    recorded = {own: FlowRun(own, run.tags.get("prefect.flow_run_name"), experiment=experiment)} if own else {}
    recorded = {run_id: FlowRun(run_id, experiment=name) for run_id, name in _users(run).items()} | recorded
    known = {found.run_id: found for found in sources.flow_runs(*recorded)}
    yield from (known.get(run_id, recorded[run_id]) for run_id in dict.fromkeys([own, *recorded]) if run_id)


def _recorded(sources: Sources, run: Run) -> dict[str, str]:
    """Return path and hash of what the run made, by its tags; nothing where an older version recorded no files."""
    files: dict[str, str] = {}
    with sources.noting(f"MLflow run {run.run_id}: its tags outputs.… cannot be read"):
        for folder in (TRAIN, EVALUATE):
            made = json.loads(run.tags.get(f"outputs.{folder.name}", "{}"))
            files |= {f"{folder}/{name}": md5 for name, md5 in made.items()}
    data = {str(folder): run.tags.get(f"dvc.{folder.name}") for folder in (DOWNLOAD, NORMALIZE)}
    return {path: md5 for path, md5 in data.items() if md5} | files if files else {}


def _files(sources: Sources, made: Mapping[str, str]) -> Iterator[File]:
    for path, md5 in made.items():
        yield File(path, md5, str(cached_path(sources.cache, md5)) if is_cached(sources.cache, md5) else None)


def _changed(committed: Mapping[str, str], here: Mapping[str, str]) -> dict[str, tuple[Any, Any]]:
    """Return `{"train.epochs": ("20", "1"), …}`: the committed and the present value of what is not the same."""
    pairs = {name: (committed.get(name), value) for name, value in here.items()}
    return {name: (old, new) for name, (old, new) in pairs.items() if _number(old) != _number(new)}


def _number(text: str | None) -> str | float | None:
    """MLflow has 30.0 where the file has 30."""
    try:
        return float(text or "")
    except ValueError:
        return text
