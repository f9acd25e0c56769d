"""Models with their files in DVC's cache, as a comparison or a promotion reads them.

A model is identified by the `dvc.lock` that made it: that of a DVC experiment, of a git commit or of the checkout. A
model that only MLflow knows is identified by the hashes that its run has recorded.
"""

import json
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from flows.dvc_state import DAMAGED, cached_path, parse_lock
from flows.lineage import Sources, flat_params, runs_of
from flows.lineage_records import Experiment, Trace
from pipeline.artifacts import BEST_WEIGHTS, EVALUATE, NORMALIZE, TRAIN, read_json
from pipeline.comparison.pairing import Candidate
from pipeline.core.errors import TemporaryError, UserError, first_line
from pipeline.core.git import EXCLUDE_OUTPUTS, code_state, find_commit, git, has_code
from pipeline.core.stage_code import PACKAGE
from pipeline.evaluation.predictions import Predictions, read_predictions, split_md5
from pipeline.params import PARAMS_FILE
from pipeline.parquet import files_path, parquet_reader
from pipeline.reporting.text import as_yaml
from pipeline.tracking.experiments import experiment_name
from pipeline.tracking.provenance import DIFFERENT, LOCK_FILE
from pipeline.tracking.provenance_file import with_provenance
from pipeline.tracking.search import find_run

Split = Literal["test", "validation"]
PREDICTIONS: dict[Split, str] = {
    "test": str(EVALUATE / "predictions.parquet"),
    "validation": str(EVALUATE / "validation_predictions.parquet"),
}
DATASET = str(NORMALIZE / "dataset.json")
WEIGHTS = str(TRAIN / BEST_WEIGHTS)
SEED = "train.seed"
SHORT_ID = 8  # digits


@dataclass(frozen=True)
class Model:
    """A trained and evaluated model.

    `label` is its name for people. `commit` is the git commit whose `dvc.lock` made it, None where no commit has that
    file; `experiment` its DVC experiment and `run_id` its MLflow run, each None if unknown. `params` has the parameters
    of the stages by dotted name. `code_commit` is the commit that the training started from, and `is_dirty` whether
    code differed from it, both None if unknown. `stage_code` has the MD5 of the code that each stage depends on, by
    file or folder; it is empty if unknown. `files` has the path in DVC's cache of each file below `artifacts/`, by its
    path in the project; the cache may lack a file.
    """

    label: str
    model_md5: str
    commit: str | None
    experiment: str | None
    run_id: str | None
    params: Mapping[str, str]
    code_commit: str | None
    is_dirty: bool | None
    stage_code: Mapping[str, str]
    files: Mapping[str, Path]

    @property
    def data_set(self) -> str:
        """Return the name of the MLflow experiment for the model's data set."""
        return experiment_name(
            self.params.get("download.dataset", "unknown"), folder=self.params.get("download.folder", "")
        )

    @cached_property
    def predictions(self) -> Predictions:
        """Return the predictions for the test split; raises UserError as `file_of`."""
        return read_predictions(file_of(self, PREDICTIONS["test"]))

    @cached_property
    def test_md5(self) -> str:
        """Return the identity of the test split; raises UserError as `file_of`."""
        return split_md5(self.predictions)


def candidate(model: Model, split: Split = "test") -> Candidate:
    """Return a model's predictions for a split, and the images of the split that it must not be compared on.

    Raises UserError as `file_of`.
    """
    is_test = split == "test"
    predictions = model.predictions if is_test else read_predictions(file_of(model, PREDICTIONS[split]))
    duplicates = read_json(file_of(model, DATASET))["test_duplicates"] if is_test else []
    seen = [*_content_hashes(model, "train"), *(_content_hashes(model, "validation") if is_test else ())]
    return Candidate(
        label=model.label,
        predictions=predictions,
        leaked=frozenset(predictions.content_hashes[row] for row in duplicates),
        trained_on=frozenset(seen) - {""},
    )


def _content_hashes(model: Model, split: str) -> list[str]:
    """Return the content hashes of the images of a split."""
    with parquet_reader(file_of(model, str(files_path(split)))) as file:
        hashes: list[str] = file.read(columns=["content_hash"])["content_hash"].to_pylist()
        return hashes


def file_of(model: Model, name: str) -> Path:
    """Return the path in DVC's cache of a model's file, such as `artifacts/normalize/dataset.json`.

    Raises UserError with the command that fetches or makes the file where it is missing.
    """
    path = model.files.get(name)
    if path is None:
        raise UserError(
            f"{model.label}: found no {name}, since an earlier version of the project evaluated it; allowed: a model "
            f"that this version evaluated; `make run` with the same parameters makes one (a training whose code did "
            "not change comes from the cache); name its experiment instead"
        )
    if not path.is_file():
        raise UserError(f"{model.label}: found no {name} in DVC's cache ({path}); {_fetch(model.experiment)}")
    return path


def describe_code(model: Model) -> str | None:
    """Return the commit of the model's code, and whether code differed from it; None where the commit is unknown."""
    if model.code_commit is None:
        return None
    changes = {None: " (uncommitted changes unknown)", True: " with uncommitted changes", False: ""}
    return f"commit {model.code_commit[:SHORT_ID]}{changes[model.is_dirty]}"


def seeds_command(model: Model, *, number: int) -> str:
    """Return the command that trains several seeds of a model's recipe; without its MLflow run it is not complete."""
    recipe, changed = "…", {}
    with suppress(UserError, TemporaryError, ValueError):
        if run := find_run(model.run_id) if model.run_id else None:
            tags = with_provenance(run).tags
            recipe, changed = tags.get("recipe", recipe), json.loads(tags.get(DIFFERENT, "{}"))
    values = " ".join(f"{name}={as_yaml(new)}" for name, (_, new) in changed.items() if name != SEED)
    return f"make run RECIPE={recipe}{f' SET={shlex.quote(values)}' if values else ''} SEEDS={number}"


def _fetch(experiment: str | None) -> str:
    """Return the commands that fetch the files of an experiment, or those of the checkout, or make them again."""
    if experiment is None:
        return "`.venv/bin/dvc fetch` fetches it from the remote, `.venv/bin/dvc repro` makes it again"
    return (
        f"`.venv/bin/dvc exp pull origin {experiment}` fetches it, if it was pushed, "
        f"`.venv/bin/dvc exp apply {experiment} && .venv/bin/dvc repro` makes it again"
    )


def _of_lock(sources: Sources, text: str, *, label: str, experiment: Experiment | None = None, **origin: Any) -> Model:
    """Return the model that the text of a dvc.lock identifies; raises UserError where it has none."""
    try:
        lock = parse_lock(text)
    except DAMAGED as error:
        raise UserError(
            f"{label}: its dvc.lock is damaged ({first_line(error)}); `.venv/bin/dvc repro` makes it again"
        ) from None
    if str(TRAIN) not in lock.outputs:
        raise UserError(f"{label}: its dvc.lock has no model; allowed: a trained one; run `.venv/bin/dvc repro` first")
    hashes = _all_files(sources, lock.outputs)
    if WEIGHTS not in hashes:
        fetch = _fetch(experiment.name if experiment else None)
        raise UserError(f"{label}: DVC's cache does not have the files of its model; {fetch}")
    model_md5 = hashes[WEIGHTS]
    runs = runs_of(sources, experiment) if experiment else sources.runs_of_model(model_md5)
    return Model(
        label=label,
        model_md5=model_md5,
        experiment=experiment.name if experiment else None,
        run_id=runs[0].run_id if runs else None,
        params=flat_params(lock.params),
        stage_code={path: md5 for path, md5 in lock.dependencies.items() if path.startswith(f"{PACKAGE}/")},
        files={path: cached_path(sources.cache, md5) for path, md5 in hashes.items()},
        **origin,
    )


def _all_files(sources: Sources, hashes: Mapping[str, str]) -> dict[str, str]:
    """Return path and hash of these files, and of the files in these folders that the cache has a listing of."""
    found = {path: md5 for path, md5 in hashes.items() if not md5.endswith(".dir")}
    for folder, md5 in hashes.items():
        found |= {f"{folder}/{name}": each for name, each in sources.listing(md5).items()}
    return found


def of_checkout(sources: Sources, label: str) -> Model:
    """Return the model of the checkout's dvc.lock, which may differ from the committed one."""
    path = sources.project / LOCK_FILE
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    state = code_state(sources.project, tracked=str(PARAMS_FILE))
    is_committed = state.commit is not None and sources.committed_file(state.commit, str(LOCK_FILE)) == text
    return _of_lock(
        sources,
        text,
        label="the checkout" if label == "." else label,
        commit=state.commit if is_committed else None,
        code_commit=state.commit,
        is_dirty={"true": True, "false": False}.get(state.dirty),
    )


def of_commit(sources: Sources, commit: str, *, text: str) -> Model:
    """Return the model of a commit's dvc.lock."""
    by_commit = {found.commit: found for found in sources.experiments}
    if commit in by_commit:
        return of_experiment(sources, by_commit[commit])
    label = commit[:SHORT_ID] if commit.startswith(text) else text
    lock = sources.committed_file(commit, str(LOCK_FILE))
    return _of_lock(sources, lock, label=label, commit=commit, code_commit=commit, is_dirty=False)


def of_experiment(sources: Sources, experiment: Experiment, *, label: str = "") -> Model:
    """Return the model of a DVC experiment."""
    commit, baseline = experiment.commit, experiment.baseline
    is_dirty = None
    if commit and baseline and find_commit(sources.project, baseline):
        difference = ("diff", "--name-only", "--relative", baseline, commit, "--", ".", EXCLUDE_OUTPUTS)
        is_dirty = has_code(git(sources.project, *difference).splitlines())
    return _of_lock(
        sources,
        sources.committed_file(commit, str(LOCK_FILE)),
        label=label or experiment.name,
        experiment=experiment,
        commit=commit,
        code_commit=baseline,
        is_dirty=is_dirty,
    )


def of_trace(sources: Sources, found: Trace, *, text: str, label: str = "") -> Model:
    """Return the model of a trace: of its experiment, which has all hashes, else of what MLflow has recorded."""
    by_name = {one.name: one for one in sources.experiments}
    for name in (one.name for one in found.experiments):
        if name in by_name and sources.model_of(by_name[name].commit) == found.model_md5:
            return of_experiment(sources, by_name[name], label=label)
    run, hashes = found.run, _all_files(sources, {file.path: file.md5 for file in found.files})
    return Model(
        label=label or (run.name if run and run.name else text),
        model_md5=str(found.model_md5),
        commit=None,
        experiment=None,
        run_id=run.run_id if run else None,
        params=run.params if run else {},
        code_commit=found.commit,
        is_dirty=found.dirty,
        stage_code={},
        files={path: cached_path(sources.cache, md5) for path, md5 in hashes.items()},
    )
