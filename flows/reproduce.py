"""Run the stages of a recorded run again, and report for each stage whether its outputs are the same.

`python -m flows.reproduce ID [--from-cache] [--keep-workspace]`. A fresh clone gets the run's commit, its uncommitted
changes, its parameters and, from DVC's cache, the raw data; every other stage runs there again. ID is an MLflow run or,
where MLflow has no such run (as on another machine), a git commit or a DVC experiment: its dvc.lock has the expected
hashes. The new MLflow run gets the tag `reproduces`, by which it is not counted as a new result.
Exit status: 0 identical, 1 something differs, 2 a mistake to fix.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from flows import PROJECT
from flows.dvc_client import StepError
from flows.dvc_protocol import Outcome
from flows.dvc_state import cache_folder, cached_path, experiment_refs, listing, outputs
from flows.workspace import KEPT_CLONES, Workspace, existing_store, open_recorded
from pipeline.artifacts import BEST_WEIGHTS, DOWNLOAD, EVALUATE, NORMALIZE, TRAIN, file_md5
from pipeline.core.errors import EXIT_TEMPORARY, EXIT_USER, UserError, report_errors
from pipeline.core.git import UNKNOWN, find_commit, read_committed
from pipeline.core.yaml import read_yaml
from pipeline.datasets.folder_errors import check_is_folder
from pipeline.params import PARAMS_FILE
from pipeline.tracking.logger import RunLogger
from pipeline.tracking.models import recorded_model_md5
from pipeline.tracking.provenance import CHANGED_FILES, COMMIT, HARDWARE, REPRODUCES
from pipeline.tracking.provenance_file import with_provenance
from pipeline.tracking.search import Run, find_run, find_runs, read_file
from pipeline.tracking.seeds import children, is_parent
from pipeline.tracking.store import connect, warn_on_failure
from pipeline.tracking.store_uri import tracking_uri

STAGES = (DOWNLOAD, NORMALIZE, TRAIN, EVALUATE)
HARDWARE_TAGS = ("cpu", "cpu_kernels", "gpu", "threads")
Hashes = Mapping[str, str]  # MD5 by file name or, of a folder, by its path


@dataclass(frozen=True)
class StageResult:
    """The comparison of one stage: `differences` has a line for each file that differs (None: not compared)."""

    stage: str
    differences: tuple[str, ...] | None
    outcome: Outcome = "restored"
    note: str = ""

    def __str__(self) -> str:
        if self.differences is None:
            return f"{self.stage:<11} not compared: the run did not record its hashes"
        result = f"differs: {'; '.join(self.differences)}" if self.differences else "identical"
        return f"{self.stage:<11} {result}{self.note}"


@dataclass(frozen=True)
class Reproduction:
    """The comparison of a reproduction with the recorded run.

    `environment` has a line for each package or part of the hardware that differs (None: not compared). `damaged` has a
    line for each stored copy of the recorded model whose content has changed.
    """

    stages: tuple[StageResult, ...]
    environment: tuple[str, ...] | None
    damaged: tuple[str, ...]
    mlflow_run_id: str | None

    @property
    def identical(self) -> bool:
        """Return whether all outputs are the same and no stored copy is damaged."""
        return all(stage.differences == () for stage in self.stages) and not self.damaged


def find(project: Path, wanted: str) -> Run:
    """Return the MLflow run with this id, else the dvc.lock of the commit or experiment of this name as a run.

    Raises UserError where there is none, it made no model, or its code is not known.
    """
    run = None
    if existing_store(project):
        _connect(project)
        run = find_run(wanted)
    if run is None:
        return _find_locked(project, wanted)
    if is_parent(run):
        names = ", ".join(child.run_id or child.experiment for child in children(wanted)) or "none, as none is finished"
        raise UserError(f"MLflow run {wanted}: found a run over several seeds; allowed: that of one seed: {names}")
    run = with_provenance(run)
    if "model.md5" not in run.tags:
        raise UserError(f"MLflow run {wanted}: status {run.status}, without a model to compare with; name another run")
    commit = run.tags.get(COMMIT, UNKNOWN)
    if commit == UNKNOWN or run.tags.get("git.dirty") == UNKNOWN:
        raise UserError(
            f"MLflow run {wanted}: its code was not recorded, as git failed then (the run's log has the reason), so it "
            "cannot be run again; train again in a checkout where git works, and name that run"
        )
    if not find_commit(project, commit):
        raise UserError(
            f"MLflow run {wanted}: its commit {commit} is not in this repository; `git fetch` the branch that has it"
        )
    return run


def _connect(project: Path) -> None:
    """Connect MLflow to the project's store."""
    connect(tracking_uri(project))


def _find_locked(project: Path, wanted: str) -> Run:
    """Return the dvc.lock of a commit or an experiment as a run; its status is empty, as it is not a run of MLflow."""
    refs = {ref.rpartition("/")[2]: ref for ref in experiment_refs(project)}
    commit = find_commit(project, refs.get(wanted, wanted))
    if commit is None:
        raise UserError(
            f"{wanted}: no MLflow run, commit or experiment of this name here; `git log`, `dvc exp list` and "
            "`python -m flows.trace HEAD` list what there is"
        )
    hashes = outputs(read_committed(project, commit, "dvc.lock") or "")
    missing = [folder for folder in (NORMALIZE, TRAIN) if str(folder) not in hashes]
    if missing:
        raise UserError(
            f"commit {commit}: its dvc.lock has no hash of {missing[0]}; allowed: a commit with a dvc.lock that "
            "`dvc repro` wrote (`git log dvc.lock` lists candidates)"
        )
    evaluation = {Path(path).name: md5 for path, md5 in hashes.items() if Path(path).parent == EVALUATE}
    folders = [folder for folder in (DOWNLOAD, NORMALIZE, TRAIN) if str(folder) in hashes]
    tags = {f"dvc.{folder.name}": hashes[str(folder)] for folder in folders}
    tags |= {COMMIT: commit, "git.dirty": "false", "outputs.evaluate": json.dumps(evaluation)}
    if files := listing(cache_folder(project), hashes[str(TRAIN)]):  # else the folder is compared as a whole
        tags |= {"outputs.train": json.dumps(files), "model.md5": files[BEST_WEIGHTS]}
    return Run(commit, wanted, "", 0, tags, {}, {})


def reproduce(project: Path, run: Run, *, from_cache: bool, keep: bool) -> Reproduction:
    """Run the stages again and compare; raises UserError where the clone cannot be made, StepError if a stage fails."""
    # an earlier version had no list of changed files, and recorded changed parameters as "true"
    differs_from_commit = run.tags.get("git.dirty") == "true" or CHANGED_FILES in run.tags
    difference = (read_file(run, "uncommitted.diff") if differs_from_commit else None) or b""
    if differs_from_commit and not difference:
        raise UserError(
            f"MLflow run {run.run_id}: its artifact uncommitted.diff is missing in MLflow, so its code and parameters "
            "are not known; restore it, or name another run"
        )
    _connect(project)
    damaged = tuple(_damaged_copies(project, run))  # before the stages run: DVC replaces a damaged copy
    name, since = f"reproduce-{uuid4().hex[:8]}", int(time.time() * 1000)
    clone = open_recorded(
        project,
        commit=run.tags[COMMIT],
        difference=difference,
        name=name,
        variables={"PIPELINE_REPRODUCES": run.run_id},
        keep="always" if keep else "never",
    )
    with _report_kept_clone(project / KEPT_CLONES / name), clone as workspace:
        stages = tuple(_run_stages(workspace, run, from_cache=from_cache))
        recorded_new_run = any(stage.outcome == "ran" for stage in stages if stage.stage in (TRAIN.name, EVALUATE.name))
        model = workspace.folder / TRAIN / BEST_WEIGHTS
        again = None
        if recorded_new_run:
            again = _find_new_run(run, reported_id=workspace.mlflow_run_id, model=model, since=since)
    differs = any(stage.differences for stage in stages)
    result = Reproduction(
        stages,
        (*_environment_differences(run, again), *(_reasons(run, again) if differs else ())) if again else None,
        damaged,
        again.run_id if again else workspace.mlflow_run_id,
    )
    if again:
        outcome = "identical" if result.identical else "differs"
        with warn_on_failure("the outcome is not recorded in MLflow"):
            RunLogger(again.run_id).set_tags({REPRODUCES: run.run_id, "reproduction.result": outcome})
    elif recorded_new_run:
        print("warning: the new MLflow run was not found, so it is not tagged as a reproduction", file=sys.stderr)
    return result


def _run_stages(workspace: Workspace, run: Run, *, from_cache: bool) -> Iterator[StageResult]:
    """Run the stages, except `download` if DVC has its data, and yield the comparison of each."""
    data = recorded_hashes(run, DOWNLOAD)
    has_data = bool(data) and workspace.restore(DOWNLOAD, data[str(DOWNLOAD)])
    if has_data:
        yield StageResult(DOWNLOAD.name, (), note=" (restored from DVC's cache or a remote)")
    else:
        params = read_yaml(workspace.folder / PARAMS_FILE)
        check_is_folder(workspace.folder / params["download"]["folder"])
    for folder in STAGES[has_data:]:
        outcome = workspace.reproduce(folder.name, on_line=_print_line, again=not from_cache)
        result = _compare(run, folder, actual=actual_hashes(workspace.folder, folder))
        yield replace(result, outcome=outcome)


@contextmanager
def _report_kept_clone(clone: Path) -> Iterator[None]:
    """Print the path of the kept clone at the end of the block, whether or not a stage failed."""
    try:
        yield
    finally:
        if clone.is_dir():
            print(f"kept the clone: {clone}", file=sys.stderr)


def _print_line(line: str) -> None:
    """Print a line of a stage's output, indented."""
    print(f"  | {line}", flush=True)


def _find_new_run(run: Run, *, reported_id: str | None, model: Path, since: int) -> Run | None:
    """Return the MLflow run that the stages made after `since` (milliseconds since the epoch), or None.

    Code that is too old to report the id has tagged the run as a reproduction; still older code, with the model's hash.
    """
    if reported_id:
        reported = find_run(reported_id)
        return with_provenance(reported) if reported else None
    found = find_runs({REPRODUCES: run.run_id}) + find_runs({"model.md5": file_md5(model)})
    new = (one for one in found if one.started >= since and one.run_id != run.run_id)
    return next(map(with_provenance, new), None)


def actual_hashes(clone: Path, folder: Path) -> Hashes:
    """Return the hashes of a stage's outputs: DVC's of the folder and, of train and evaluate, that of each file."""
    hashes = {}
    if folder in (TRAIN, EVALUATE):
        hashes = {path.name: file_md5(path) for path in sorted((clone / folder).iterdir()) if path.is_file()}
    if folder != EVALUATE:
        hashes[str(folder)] = outputs((clone / "dvc.lock").read_text(encoding="utf-8"))[str(folder)]
    return hashes


def recorded_hashes(run: Run, folder: Path) -> Hashes:
    """Return the hashes that the run recorded of a stage's outputs, in the form of `actual_hashes`."""
    if folder in (TRAIN, EVALUATE):
        hashes: dict[str, str] = json.loads(run.tags.get(f"outputs.{folder.name}", "{}"))
        if hashes or folder == EVALUATE:
            return hashes
        if "model.md5" in run.tags:
            return {BEST_WEIGHTS: run.tags["model.md5"]}
    md5 = run.tags.get(f"dvc.{folder.name}", UNKNOWN)
    return {} if md5 == UNKNOWN else {str(folder): md5}


def _compare(run: Run, folder: Path, *, actual: Hashes) -> StageResult:
    """Return the comparison of the actual hashes of a stage with those that the run recorded."""
    recorded = recorded_hashes(run, folder)
    lines = tuple(
        f"{name} was {md5}, is {actual.get(name, 'missing')}"
        for name, md5 in recorded.items()
        if actual.get(name) != md5
    )
    return StageResult(folder.name, lines if recorded else None)


def _environment_differences(run: Run, again: Run) -> Iterator[str]:
    """Yield a line for each package and each part of the hardware that is not the same in the two runs."""
    if not run.status:
        yield "environment not compared: a dvc.lock does not record it; an MLflow run does"
        return
    then, now = (_packages(read_file(record, "packages.txt")) for record in (run, again))
    if not (then and now):
        yield f"environment not compared: packages.txt of run {(again if then else run).run_id} is missing in MLflow"
    for name in sorted(then.keys() | now.keys()) if then and now else []:
        if then.get(name) != now.get(name):
            yield f"environment {name}: was {then.get(name, 'not installed')}, is {now.get(name, 'not installed')}"
    for tag in sorted(name for name in again.tags if name.startswith(HARDWARE)):
        if run.tags.get(tag) != again.tags[tag]:
            part = tag.removeprefix(HARDWARE)
            yield f"hardware    {part}: was {run.tags.get(tag, 'not recorded')}, is {again.tags[tag]}"


def _reasons(run: Run, again: Run) -> Iterator[str]:
    """Yield possible reasons for other bits in a model, as far as both runs recorded their hardware."""
    was, now = (
        {part: record.tags.get(f"{HARDWARE}{part}", UNKNOWN) for part in HARDWARE_TAGS} for record in (run, again)
    )
    differing = {part for part in HARDWARE_TAGS if UNKNOWN not in (was[part], now[part]) and was[part] != now[part]}
    kernels = {part["cpu_kernels"].partition(":")[0] for part in (was, now)}
    if "cpu" in differing and kernels != {"portable"}:
        names = ", ".join(sorted(kernels))
        yield f"reason      another CPU or instruction set, and the kernels were not portable in both runs ({names})"
    if "threads" in differing:
        yield "reason      another number of threads sums in another order"
    if "gpu" in differing:
        yield "reason      another GPU, or a CPU in place of one, computes other bits"


def _packages(text: bytes | None) -> dict[str, str]:
    """Return name and version of the packages in a packages.txt; empty where there is none."""
    lines = (text or b"").decode().splitlines()
    return {name: version for name, _, version in (line.partition("==") for line in lines)}


def _damaged_copies(project: Path, run: Run) -> Iterator[str]:
    """Yield a line for each stored copy of the recorded model that has another hash."""
    md5 = run.tags.get("model.md5")
    if md5 is None:  # the expected hash is not known
        return
    cached = cached_path(cache_folder(project), md5)
    recorded = recorded_model_md5(run.run_id) if run.status else md5
    if recorded is None:
        print("warning: MLflow's copy of the model was not compared: it is missing or cannot be read", file=sys.stderr)
    copies = {
        "MLflow's copy": recorded,
        "DVC's cache": file_md5(cached) if cached.exists() else None,
    }
    for place, found in copies.items():
        if found not in (None, md5):
            yield f"model       {place} was changed by hand: it was {md5}, is {found}"


def _report(result: Reproduction) -> Iterator[str]:
    """Yield the lines of the report."""
    yield from map(str, result.stages)
    yield from result.environment or ()
    if result.environment == ():
        yield "environment identical (package versions, CPU, threads, GPU)"
    elif result.environment is None and result.mlflow_run_id:
        yield "environment not compared: MLflow no longer has the new run"
    yield from result.damaged
    if result.mlflow_run_id:
        yield f"recorded as MLflow run {result.mlflow_run_id}, tagged `{REPRODUCES}`"
    yield "identical" if result.identical else "differs"


def main() -> None:
    """Find the recorded run, run its stages again, and print the comparison."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.reproduce",
        description="Run a recorded run's stages again in a fresh clone, and compare the outputs of each stage.",
        epilog="Exit status: 0 identical, 1 something differs, 2 a mistake to fix, 75 another try may help.",
    )
    parser.add_argument("run", metavar="ID", help="an MLflow run, else a git commit or a DVC experiment")
    parser.add_argument("--from-cache", action="store_true", help="do not run stages whose outputs are in DVC's cache")
    parser.add_argument("--keep-workspace", action="store_true", help=f"keep the clone in {KEPT_CLONES}/")
    arguments = parser.parse_args()
    with report_errors(), chdir(PROJECT):
        try:
            run = find(PROJECT, arguments.run)
            result = reproduce(PROJECT, run, from_cache=arguments.from_cache, keep=arguments.keep_workspace)
        except StepError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.status if error.status in (EXIT_USER, EXIT_TEMPORARY) else 1)
        print("\n".join(["", *_report(result)]))
    sys.exit(0 if result.identical else 1)


if __name__ == "__main__":
    main()
