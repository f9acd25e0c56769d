"""Remove old experiments, and what belongs to them alone: reports, MLflow runs, versions, files in DVC's cache.

`python -m flows.cleanup --keep N [--dry-run]`. It keeps the N newest experiments, and whatever a branch, a tag, the
git ref of a champion, a stash, the checkout, an alias in MLflow's registry or the tag `keep` of a run needs. Exit
status: 0 done; 2 a mistake to fix, nothing was removed; 3 the removal failed midway, a part was removed; 75 something
is running here, or a server does not answer, nothing was removed: try again.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dvc.exceptions import DvcException

from flows import PROJECT
from flows.cleanup_runs import read_records, reason_needed, runs_of
from flows.dvc_cleanup import (
    hold_off_runs,
    is_own_cache,
    remove_entries,
    remove_experiments,
    remove_files,
    run_cache_entries,
    unused_objects,
)
from flows.dvc_history import DvcExperiment, History, add_folder_contents, check_only_project, list_experiments
from flows.dvc_state import cache_folder
from flows.reports import reports_without
from flows.workspace import existing_store
from pipeline.core.errors import (
    PartialError,
    TemporaryError,
    UserError,
    escape_control_chars,
    first_line,
    report_errors,
)
from pipeline.core.sqlite import sqlite_path
from pipeline.tracking.retention import StoredRun, remove_run
from pipeline.tracking.store_uri import tracking_uri


@dataclass(frozen=True)
class Plan:
    """What a cleanup removes, and a line for each old thing that it keeps, with the reason."""

    experiments: tuple[DvcExperiment, ...]
    reports: tuple[Path, ...]
    runs: tuple[StoredRun, ...]
    entries: tuple[Path, ...]
    objects: tuple[Path, ...]
    kept: tuple[str, ...]

    @property
    def freed(self) -> int:
        """Return how many bytes the removal frees."""
        files = _size([*self.reports, *self.objects, *self.entries])
        return files + sum(_size_of_run(stored) for stored in self.runs)

    @property
    def is_empty(self) -> bool:
        """Return whether there is nothing to remove."""
        return not (self.experiments or self.reports or self.runs or self.entries or self.objects)


def make_plan(project: Path, *, keep: int) -> Plan:
    """Return what to remove; raises UserError or TemporaryError where a question has no certain answer."""
    experiments, history = list_experiments(project), History(project)
    records = read_records(project, experiments={one.name for one in experiments})
    check_only_project(project, experiments)
    reasons = {one: reason_needed(one, records, commits=history.commits) for one in experiments[keep:]}
    old = [one for one, reason in reasons.items() if not reason]
    kept = [f"experiment {one.name}: {reason}" for one, reason in reasons.items() if reason]
    staying = [one for one in experiments if one not in old]
    needed = add_folder_contents(project, history.hashes(staying) | records.hashes_in_use())
    runs = [found for one in old for found in runs_of(one, records, project=project, needed=needed)]
    kept += [f"MLflow run {stored.run.run_id} ({stored.run.name}): {reason}" for stored, reason in runs if reason]
    removed = {stored.run.run_id: stored for stored, reason in runs if not reason}
    objects = list[Path]()
    if reason := _reason_to_keep_files(project, history, staying):
        kept.append(f"the files in {cache_folder(project)}: {reason}")
    else:
        objects = unused_objects(project, needed)
    entries = run_cache_entries(project, objects)
    plan = Plan(
        experiments=tuple(old),
        reports=tuple(reports_without(project, {one.name for one in staying})),
        runs=tuple(removed.values()),
        entries=tuple(entries),
        objects=tuple(objects),
        kept=tuple(dict.fromkeys(kept)),
    )
    if existing_store(project) is None and not replace(plan, reports=()).is_empty:
        raise UserError(
            f"MLflow's store {sqlite_path(tracking_uri(project))} does not exist, so the models in use are not known; "
            "nothing was removed; set MLFLOW_TRACKING_URI to the store of this project, as for its trainings"
        )
    return plan


def _reason_to_keep_files(project: Path, history: History, experiments: Sequence[DvcExperiment]) -> str:
    """Return the reason why no file of DVC's cache can be removed, or an empty text."""
    if not is_own_cache(project):
        return "other projects may use this cache"
    if missing := history.missing_folders(experiments):
        return (
            f"it is not known which of them belong to {', '.join(missing)}, whose listing is missing; bring it back: "
            "`dvc exp pull`, or `dvc repro`"
        )
    return ""


def clean_up(project: Path, *, keep: int, dry_run: bool) -> None:
    """Print what is to be removed and, unless `dry_run`, remove it.

    Raises UserError or TemporaryError where nothing was removed, PartialError where the removal failed midway.
    """
    with hold_off_runs(project) as repo:
        plan = make_plan(project, keep=keep)
        for line in as_lines(plan):
            print(escape_control_chars(line))
        if plan.is_empty:
            print("nothing to remove")
            return
        size = megabytes(plan.freed)
        if dry_run:
            print(f"would free {size}; nothing was removed")
            return
        sys.stdout.flush()
        with _failures_are_partial():
            _remove(plan, repo)
        print(f"freed {size}")


def _remove(plan: Plan, repo: Any) -> None:
    """Remove reports and runs, then experiments, then files: what a killed cleanup left, the next one finds."""
    remove_files(plan.reports)
    for stored in plan.runs:
        remove_run(stored)
    remove_experiments(repo, plan.experiments)
    remove_entries(plan.entries)
    remove_files(plan.objects)


@contextmanager
def _failures_are_partial() -> Iterator[None]:
    """Raise PartialError for an error in the block, after which some things are removed and others not."""
    try:
        yield
    except (OSError, UserError, TemporaryError, DvcException) as error:
        raise PartialError(
            f"only a part was removed: {first_line(error)}; correct that, then the same command removes the rest"
        ) from None


def as_lines(plan: Plan) -> Iterator[str]:
    """Yield a line for each experiment, report, run and version to remove, for DVC's cache, and for each thing kept."""
    for one in plan.experiments:
        yield f"experiment  {one.name}, {datetime.fromtimestamp(one.created, UTC):%Y-%m-%d %H:%M} UTC"
    for path in plan.reports:
        yield f"report      {path.name}, {megabytes(_size([path]))}"
    for stored in plan.runs:
        yield f"MLflow run  {stored.run.run_id} ({stored.run.name}), {megabytes(_size_of_run(stored))}"
        yield from (f"version     {version}, of that run" for version in stored.versions)
    if plan.objects:
        yield f"DVC cache   {len(plan.objects)} files, {megabytes(_size(plan.objects))}"
    if plan.entries:
        yield f"run cache   {len(plan.entries)} entries"
    yield from (f"kept        {reason}" for reason in plan.kept)


def _size(paths: Iterable[Path]) -> int:
    """Return the bytes that removal frees: those of a file with another hard link stay."""
    found = (path.stat() for path in paths)
    return sum(status.st_size for status in found if status.st_nlink == 1)


def _size_of_run(stored: StoredRun) -> int:
    return sum(_size(path for path in folder.rglob("*") if path.is_file()) for folder in stored.folders)


def megabytes(size: int) -> str:
    """Return a number of bytes as text."""
    return f"{size / 1e6:.1f} MB"


def parse_keep(text: str | None) -> int:
    """Return the number of experiments to keep; raises UserError where it is missing or none."""
    if text is None or not (text.isascii() and text.isdigit()):
        found = "nothing" if text is None else repr(text)
        allowed = "how many of the newest experiments stay, 0 or more"
        raise UserError(f"--keep: found {found}; allowed: {allowed}; add it, as in --keep 30")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, and clean up."""
    parser = argparse.ArgumentParser(prog="python -m flows.cleanup", description=__doc__)
    parser.add_argument("--keep", metavar="N", nargs="?", help="how many of the newest experiments stay")
    parser.add_argument("--dry-run", action="store_true", help="print what would be removed, remove nothing")
    options = parser.parse_args(arguments)
    with report_errors(), chdir(PROJECT):
        clean_up(PROJECT, keep=parse_keep(options.keep), dry_run=options.dry_run)


if __name__ == "__main__":
    main(sys.argv[1:])
