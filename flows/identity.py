"""From any one id to what belongs together: code, data, parameters, MLflow run, experiment, flow runs, model, files.

MLflow's tags hold most of it; git's refs hold the experiments, Prefect the states of the flow runs.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import UUID

from dvc.utils.serialize import parse_yaml
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterName
from prefect.client.schemas.objects import FlowRun as PrefectFlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.utilities.urls import url_for

from flows.dvc_state import DAMAGED, cache_folder, cached_path, experiment_refs, outputs
from flows.prefect_server import PAGE_SIZE, prefect_client, server_in_force
from flows.ui import mlflow_page
from flows.workspace import EXPERIMENT_LABEL, made_store
from pipeline.artifacts import DOWNLOAD, EVALUATE, NORMALIZE, TRAIN, file_md5
from pipeline.core.errors import TemporaryError, UserError, first_line, shown
from pipeline.core.git import UNKNOWN, find_commit, git, read_committed
from pipeline.core.settings import tracking_uri
from pipeline.core.sqlite import sqlite_path
from pipeline.tracking import runs as tracking
from pipeline.tracking.runs import Record

MODEL = "best.safetensors"
_SAFE = re.compile(r"[\w .:/+-]{1,250}")
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
    run: Record | None = None
    run_link: str | None = None
    reproductions: tuple[tuple[str, str], ...] = ()
    experiments: tuple[Experiment, ...] = ()
    flow_runs: tuple[FlowRun, ...] = ()
    model_md5: str | None = None
    files: tuple[File, ...] = ()


class Sources:
    """The places to look at, each opened once; `notes` has a line for each that could not be looked at."""

    def __init__(self, project: Path) -> None:
        self.project = project
        self.notes: list[str] = []
        self.mlflow = self._connect()
        self.prefect = self._find_prefect()

    def _find_prefect(self) -> str | None:
        """Address of the server in force."""
        try:
            if found := server_in_force(self.project):
                return found.api_url
            reason = "no server of this project is running (`python -m flows.server start`)"
        except (UserError, TemporaryError) as error:
            reason = str(error)
        self.note(f"Prefect was not looked at: {reason}")
        return None

    def _connect(self) -> bool:
        uri = made_store(self.project)
        if uri is None:
            self.note(f"MLflow has no runs yet: {sqlite_path(tracking_uri(self.project))} does not exist")
            return False
        os.environ["MLFLOW_TRACKING_URI"] = uri
        try:
            tracking.connect()
        except (UserError, TemporaryError) as error:
            self.note(f"MLflow was not looked at: {error}")
            return False
        return True

    def note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)

    @cached_property
    def experiments(self) -> list[Experiment]:
        found = []
        for ref in experiment_refs(self.project):
            _, _, first, rest, name = ref.split("/", 4)
            commit = None
            with suppress(UserError):
                commit = find_commit(self.project, ref)
            if commit:
                found.append(Experiment(name, commit, first + rest))
            else:
                self.note(f"experiment {name} was not looked at: its commit cannot be read (`git fsck` says more)")
        return found

    def runs(self, tag: str, value: str) -> list[Record]:
        """MLflow's runs with this tag."""
        safe = all(_SAFE.fullmatch(text.replace("%", "")) for text in (tag, value))
        return tracking.find_runs({tag: value}) if self.mlflow and safe else []

    def makers(self, model: str | None) -> list[Record]:
        """The runs that made the model of this hash, reproductions left out."""
        return tracking.makers(model) if self.mlflow and model else []

    def flow_runs(self, *, ids: Iterable[str] = (), name: str | None = None) -> list[FlowRun]:
        """Prefect's flow runs of these ids or of this name."""
        wanted = [UUID(run_id) for run_id in ids if _is_uuid(run_id)]
        if self.prefect is None or not (wanted or name):
            return []
        which = (
            FlowRunFilter(name=FlowRunFilterName(any_=[name]))
            if name
            else FlowRunFilter(id=FlowRunFilterId(any_=wanted))
        )
        try:
            with prefect_client(self.prefect) as client:
                found = client.read_flow_runs(flow_run_filter=which, sort=FlowRunSort.ID_DESC, limit=PAGE_SIZE)
                return [_as_flow_run(run) for run in found]
        except TemporaryError as error:
            self.note(f"Prefect was not looked at: {error}")
            return []

    def file(self, commit: str | None, name: str) -> str:
        """The text of a file in a commit; empty where there is none, or the commit is not in this repository."""
        if commit and find_commit(self.project, commit):
            return read_committed(self.project, commit, name) or ""
        return ""

    def outputs(self, commit: str | None) -> dict[str, str]:
        """Path and hash of the outputs in a commit's dvc.lock."""
        try:
            return outputs(self.file(commit, "dvc.lock"))
        except DAMAGED as error:
            self.note(f"commit {commit}: dvc.lock cannot be read ({first_line(error)})")
            return {}

    def params(self, commit: str | None) -> dict[str, str]:
        """A commit's params.yaml, as MLflow has it: `{"train.epochs": "20", …}`."""
        try:
            return _flat(self.file(commit, "params.yaml"))
        except DAMAGED as error:
            self.note(f"commit {commit}: params.yaml cannot be read ({first_line(error)})")
            return {}

    def in_cache(self, md5: str) -> Path | None:
        """The cached file, or for a folder (`….dir`) its listing."""
        path = cached_path(cache_folder(self.project), md5)
        return path if path.is_file() else None

    def model_of(self, outputs: Mapping[str, str]) -> str | None:
        """The hash of the best model, by the listing of artifacts/train in DVC's cache."""
        return self.listing(outputs.get(str(TRAIN), "")).get(MODEL)

    def listing(self, md5: str) -> dict[str, str]:
        path = self.in_cache(md5) if md5.endswith(".dir") else None
        try:
            entries = json.loads(path.read_text(encoding="utf-8")) if path else []
            return {entry["relpath"]: entry["md5"] for entry in entries}
        except DAMAGED as error:
            self.note(f"{path} in DVC's cache cannot be read ({first_line(error)})")
            return {}


def _as_flow_run(run: PrefectFlowRun) -> FlowRun:
    """Within `prefect_client`, by which the server's address is known."""
    link, experiment = url_for("flow-run", obj_id=run.id), run.labels.get(EXPERIMENT_LABEL)
    return FlowRun(
        str(run.id),
        run.name,
        run.state.name if run.state else None,
        shown(link) if link else None,
        str(experiment) if experiment else None,
    )


def trace(project: Path, wanted: str, *, file: Path | None = None) -> tuple[list[Trace], list[str]]:
    """All that belongs to `wanted`, newest first, and notes on what could not be looked at.

    `file`: where `wanted` is the path of a file. Raises UserError where nothing is known of it.
    """
    sources = Sources(project)
    wanted = file_md5(file) if file else wanted
    if re.fullmatch(r"[0-9A-Fa-f-]{32,40}", wanted):  # hashes and UUIDs are kept in lower case
        wanted = wanted.lower()
    runs, experiments, flow_runs = _match(sources, wanted)
    own = {run.run_id: run for run in runs}
    loose: list[Experiment] = []
    for experiment in experiments:
        found = _runs_of(sources, experiment)
        own |= {run.run_id: run for run in found}
        loose += [] if found else [experiment]
    newest_first = sorted(own.values(), key=lambda run: run.started, reverse=True)
    traces = [_of_run(sources, run) for run in newest_first] + [_of_experiment(sources, found) for found in loose]
    traces = traces or [Trace(flow_runs=(run,)) for run in flow_runs]
    if not traces:
        raise UserError(_nothing(sources, wanted, file=file))
    return traces, sources.notes


def _nothing(sources: Sources, wanted: str, *, file: Path | None) -> str:
    name = f"{file} (MD5 {wanted})" if file else wanted
    store = shown(tracking_uri(sources.project))
    places = [
        "commits of this repository",
        f"{len(sources.experiments)} DVC experiments",
        *([f"runs, tags and model hashes in MLflow ({store})"] if sources.mlflow else []),
        *(["Prefect's flow runs"] if sources.prefect else []),
    ]
    return "; ".join([f"{name}: nothing known of it; looked at: {', '.join(places)}", *sources.notes])


def _match(sources: Sources, wanted: str) -> tuple[list[Record], list[Experiment], list[FlowRun]]:
    """The MLflow runs, experiments and flow runs that the id names."""
    runs = [run] if sources.mlflow and _SAFE.fullmatch(wanted) and (run := tracking.find_run(wanted)) else []
    commit = find_commit(sources.project, wanted)
    named = [found for found in sources.experiments if wanted == found.name or (commit and commit == found.commit)]
    flow_runs = sources.flow_runs(ids=[wanted]) if _is_uuid(wanted) else sources.flow_runs(name=wanted)
    names = {run.experiment for run in flow_runs} | {wanted}
    named += [found for found in sources.experiments if found.name in names and found not in named]
    found = [
        *sources.runs("dvc.experiment", wanted),
        *sources.runs("prefect.flow_run_name", wanted),
        *(
            run
            for flow_run in [wanted, *(run.run_id for run in flow_runs)]
            for run in _runs_of_flow_run(sources, flow_run)
        ),
    ]
    if commit:
        found += sources.runs(tracking.COMMIT, commit)
        named += [found for found in sources.experiments if found.baseline == commit and found not in named]
        wanted = sources.model_of(sources.outputs(commit)) or ""
    if re.fullmatch(r"[0-9a-f]{32}(\.dir)?", wanted):
        model = sources.listing(f"{wanted.removesuffix('.dir')}.dir").get(MODEL, wanted)
        found += sources.runs("outputs.train", f"%{model}%") or sources.makers(model)
        named += [found for found in sources.experiments if _has_model(sources, found, model) and found not in named]
    return runs + [run for run in found if tracking.REPRODUCES not in run.tags], named, flow_runs


def _runs_of_flow_run(sources: Sources, flow_run_id: str) -> list[Record]:
    if not _is_uuid(flow_run_id):
        return []
    return sources.runs("prefect.flow_run_id", flow_run_id) or sources.runs(f"{tracking.FLOW_RUN}{flow_run_id}", "%")


def _has_model(sources: Sources, experiment: Experiment, model: str) -> bool:
    return sources.model_of(sources.outputs(experiment.commit)) == model


def _runs_of(sources: Sources, experiment: Experiment) -> list[Record]:
    """The runs of the experiment's own training, else those that made the model which it had from the cache."""
    own = sources.runs("dvc.experiment", experiment.name)
    return own or sources.makers(sources.model_of(sources.outputs(experiment.commit)))


def _of_run(sources: Sources, run: Record) -> Trace:
    """A trace with an MLflow run at its centre."""
    tags = run.tags
    model = tags.get("model.md5")
    experiments = _experiments_of(sources, run)
    commit = _known(tags.get(tracking.COMMIT))
    dirty = _known(tags.get("git.dirty")) if commit else None  # older versions recorded that nothing was changed
    difference = tracking.read_file(run, "uncommitted.diff") or b""
    names = re.findall(rb'^diff --git "?a/(.*?)"? "?b/', difference, re.MULTILINE)
    copies = sources.runs(tracking.REPRODUCES, run.run_id)
    return Trace(
        commit=commit,
        dirty=dirty == "true" if dirty else None,
        uncommitted=tuple(name.decode(errors="replace") for name in names),
        data_set=run.params.get("download.dataset"),
        data_md5=tags.get("data.md5"),
        changed=_changed(sources.params(commit), run.params),
        run=run,
        run_link=mlflow_page(run.run_id, project=sources.project),
        reproductions=tuple((copy.run_id, copy.tags.get("reproduction.result", copy.status)) for copy in copies),
        experiments=experiments,
        flow_runs=tuple(_flow_runs_of(sources, run)),
        model_md5=model,
        files=tuple(
            _files(sources, _recorded(sources, run) or sources.outputs(next((e.commit for e in experiments), None)))
        ),
    )


def _of_experiment(sources: Sources, experiment: Experiment) -> Trace:
    """A trace of an experiment of which MLflow knows nothing."""
    made = sources.outputs(experiment.commit)
    params, committed = (sources.params(commit) for commit in (experiment.commit, experiment.baseline))
    listing = _changed_files(sources.project, experiment)
    return Trace(
        commit=experiment.baseline,
        dirty=None if listing is None else bool(listing),
        uncommitted=tuple(listing or ()),
        data_set=params.get("download.dataset"),
        data_md5=sources.listing(made.get(str(NORMALIZE), "")).get("dataset.json"),
        changed=_changed(committed, params),
        experiments=(experiment,),
        model_md5=sources.model_of(made),
        files=tuple(_files(sources, made)),
    )


def _known(tag: str | None) -> str | None:
    return None if tag == UNKNOWN else tag


def _changed_files(project: Path, experiment: Experiment) -> list[str] | None:
    """The files that the experiment changed, or None where this repository does not have its baseline."""
    if not (experiment.baseline and find_commit(project, experiment.baseline)):
        return None
    return git(project, "diff", "--name-only", experiment.baseline, str(experiment.commit)).splitlines()


def _experiments_of(sources: Sources, run: Record) -> tuple[Experiment, ...]:
    """The run's own experiment first, then those that took its model from the cache."""
    names = [run.tags.get("dvc.experiment")]
    names += [value for tag, value in sorted(run.tags.items()) if tag.startswith(tracking.FLOW_RUN)]
    here = {found.name: found for found in sources.experiments}
    if model := run.tags.get("model.md5"):
        names += [
            found.name
            for found in sources.experiments
            if _has_model(sources, found, model) and run in _runs_of(sources, found)
        ]
    return tuple(here.get(name) or Experiment(name, None) for name in dict.fromkeys(names) if name)


def _flow_runs_of(sources: Sources, run: Record) -> Iterator[FlowRun]:
    """The flow run that made the run first, then those that took its model from the cache."""
    own = run.tags.get("prefect.flow_run_id")
    tagged = {
        tag.removeprefix(tracking.FLOW_RUN): name for tag, name in run.tags.items() if tag.startswith(tracking.FLOW_RUN)
    }
    ids = list(dict.fromkeys(run_id for run_id in [own, *sorted(tagged)] if run_id))
    known = {found.run_id: found for found in sources.flow_runs(ids=ids)}
    for run_id in ids:
        name = run.tags.get("prefect.flow_run_name") if run_id == own else None
        experiment = tagged.get(run_id) or run.tags.get("dvc.experiment")
        yield known.get(run_id) or FlowRun(run_id, name, experiment=experiment)


def _recorded(sources: Sources, run: Record) -> dict[str, str]:
    """Paths and hashes of what the run made, by its tags."""
    try:
        return _tagged_files(run)
    except DAMAGED as error:
        sources.note(f"MLflow run {run.run_id}: its tags outputs.… cannot be read ({first_line(error)})")
        return {}


def _tagged_files(run: Record) -> dict[str, str]:
    data = {str(folder): run.tags.get(f"dvc.{folder.name}", "") for folder in (DOWNLOAD, NORMALIZE)}
    files = {
        f"{folder}/{name}": md5
        for folder in (TRAIN, EVALUATE)
        for name, md5 in json.loads(run.tags.get(f"outputs.{folder.name}", "{}")).items()
    }
    return {path: md5 for path, md5 in (data | files).items() if md5} if files else {}


def _files(sources: Sources, outputs: Mapping[str, str]) -> Iterator[File]:
    for path, md5 in outputs.items():
        found = sources.in_cache(md5)
        whole = found and all(sources.in_cache(part) for part in sources.listing(md5).values())
        yield File(path, md5, str(found) if found and whole else None)


def _flat(text: str) -> dict[str, str]:
    """`{"train.epochs": "20", …}` from the text of a params.yaml, as MLflow has it."""
    sections = parse_yaml(text, "params.yaml") or {}
    return {
        f"{section}.{name}": ", ".join(map(shown, value)) if isinstance(value, list) else str(value)
        for section, fields in sections.items()
        for name, value in fields.items()
    }


def _changed(committed: Mapping[str, str], here: Mapping[str, str]) -> dict[str, tuple[Any, Any]]:
    return {
        name: (committed.get(name), value)
        for name, value in here.items()
        if _number(committed.get(name)) != _number(value)
    }


def _number(text: str | None) -> str | float | None:
    """MLflow has 30.0 where the file has 30."""
    try:
        return float(text or "")
    except ValueError:
        return text


def _is_uuid(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", text) is not None
