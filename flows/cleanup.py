"""Remove old experiments, and what belongs to them alone: MLflow runs, registered versions, files in DVC's cache.

`python -m flows.cleanup --keep N [--dry-run]`. Kept are the N newest experiments, and whatever a branch, a tag, the
checkout, an alias in MLflow's registry or the tag `keep` of a run needs. Exit status: 0 done, 2 a mistake to fix, with
nothing removed, 75 something runs here; try again.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import chdir
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from flows import PROJECT
from flows.dvc_cleanup import (
    HASH,
    DvcExperiment,
    History,
    hold_off_runs,
    is_own_cache,
    list_experiments,
    remove_entries,
    remove_experiments,
    remove_files,
    run_cache_entries,
    unused_objects,
    with_contents,
)
from flows.dvc_state import DAMAGED, cache_folder, listing, outputs
from flows.workspace import existing_store
from pipeline.artifacts import BEST_WEIGHTS, TRAIN
from pipeline.core.errors import UserError, report_errors
from pipeline.core.git import read_committed
from pipeline.tracking.provenance import COMMIT, EXPERIMENT
from pipeline.tracking.retention import (
    KEEP,
    StoredRun,
    Version,
    read_stored,
    registered_versions,
    remove_run,
    stranger,
    use_of,
)
from pipeline.tracking.search import Run, find_run, find_runs
from pipeline.tracking.store import connect


@dataclass(frozen=True)
class Plan:
    """What is to be removed, and a note for each thing that is kept although it is old."""

    experiments: tuple[DvcExperiment, ...]
    runs: tuple[StoredRun, ...]
    entries: tuple[Path, ...]
    objects: tuple[Path, ...]
    notes: tuple[str, ...]

    @property
    def freed(self) -> int:
        """How many bytes of files go."""
        return _size(self.objects) + _size(self.entries) + sum(_size_of_run(stored) for stored in self.runs)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to remove."""
        return not (self.experiments or self.runs or self.entries or self.objects)


class Planner:
    """Decides what to remove from a project; all questions are asked before anything is removed."""

    def __init__(self, project: Path, *, keep: int) -> None:
        self.project, self.notes = project, list[str]()
        self._read_runs()
        experiments, self._history = list_experiments(project), History(project)
        self._names = {one.name for one in experiments}
        self.old = [one for one in experiments[keep:] if not self._is_needed(one)]
        kept = [one for one in experiments if one not in self.old]
        self._needed = with_contents(project, self._history.hashes(kept) | self._hashes_in_use())

    def plan(self) -> Plan:
        """Return what is to be removed; raises UserError or TemporaryError where a question has no answer."""
        runs = {stored.run.run_id: stored for one in self.old for stored in self._runs_to_remove(one)}
        objects = list[Path]()
        if is_own_cache(self.project):
            objects = unused_objects(self.project, self._needed)
        else:
            self.notes.append(f"the files in {cache_folder(self.project)}: other projects may use this cache")
        entries = run_cache_entries(self.project, objects)
        return Plan(tuple(self.old), tuple(runs.values()), tuple(entries), tuple(objects), tuple(self.notes))

    def _read_runs(self) -> None:
        """Read from MLflow the runs that name an experiment, those that are marked as deleted included."""
        self._runs, self._in_use, self._versions = list[Run](), list[Run](), list[Version]()
        if uri := existing_store(self.project):
            connect(uri)
            self._versions = registered_versions()
            self._runs = find_runs({EXPERIMENT: "%"}, with_deleted=True)
            registered = [find_run(run_id) for run_id in {one.run_id for one in self._versions if one.use}]
            self._in_use = [*find_runs({KEEP: "%"}), *filter(None, registered)]

    def _hashes_in_use(self) -> set[str]:
        """Return the hashes that the runs in use record of their data and results; some have no experiment."""
        texts = [text for run in self._in_use for text in run.tags.values()]
        return {match[0] for text in texts for match in re.finditer(HASH, text)}

    def _is_needed(self, experiment: DvcExperiment) -> bool:
        """Return whether something else than its age decides to keep the experiment, and note what."""
        reason = "a branch, a tag or a stash has it" if experiment.commit in self._history.commits else ""
        for run in self._runs if not reason else ():
            if run.tags[EXPERIMENT] == experiment.name and (use := use_of(self._read(run))):
                reason = f"MLflow run {run.run_id}: {use}"
        if reason:
            self.notes.append(f"experiment {experiment.name}: {reason}")
        return bool(reason)

    def _runs_to_remove(self, experiment: DvcExperiment) -> Iterator[StoredRun]:
        """Yield the runs that belong to the experiment alone, and note those that are kept."""
        trained, model = _model_of(self.project, experiment)
        for run in self._runs:
            made = run.tags.get("model.md5")
            own = run.tags[EXPERIMENT] == experiment.name and run.tags.get(COMMIT) == experiment.baseline
            # of an experiment that went earlier, and whose model this one took from DVC's cache
            left = made == model is not None and run.tags[EXPERIMENT] not in self._names
            if not own and not left:
                continue
            stored = self._read(run)
            reason = use_of(stored) or stranger(stored, self.project)
            if made and {made, trained} & self._needed:
                reason = reason or "it made a model that is still needed"
            if made and made != model:
                reason = reason or "it is not certain that its model is the experiment's"
            if reason:
                self.notes.append(f"MLflow run {run.run_id} ({run.name}): {reason}")
            else:
                yield stored

    def _read(self, run: Run) -> StoredRun:
        return read_stored(run, versions=self._versions)


def _model_of(project: Path, experiment: DvcExperiment) -> tuple[str | None, str | None]:
    """Return the hashes of the experiment's training and of its model; None where they are not known."""
    try:
        trained = outputs(read_committed(project, experiment.commit, "dvc.lock") or "").get(str(TRAIN))
        return trained, listing(cache_folder(project), trained or "").get(BEST_WEIGHTS)
    except DAMAGED:
        return None, None


def clean_up(project: Path, *, keep: int, dry_run: bool) -> None:
    """Print what is to be removed and, unless `dry_run`, remove it.

    An experiment goes after its runs, and the files after both: what a killed cleanup leaves, the next one finds.
    """
    with hold_off_runs(project) as repo:
        plan = Planner(project, keep=keep).plan()
        print("\n".join(as_lines(plan)), flush=True)
        if plan.is_empty:
            print("nothing to remove")
            return
        size = megabytes(plan.freed)
        if dry_run:
            print(f"would free {size}; nothing was removed")
            return
        for stored in plan.runs:
            remove_run(stored)
        remove_experiments(repo, plan.experiments)
        remove_entries(plan.entries)
        remove_files(plan.objects)
        print(f"freed {size}")


def as_lines(plan: Plan) -> Iterator[str]:
    """Yield a line for each experiment, run and version to remove, for DVC's cache, and for each thing kept."""
    for one in plan.experiments:
        yield f"experiment  {one.name}, {datetime.fromtimestamp(one.created, UTC):%Y-%m-%d %H:%M} UTC"
    for stored in plan.runs:
        yield f"MLflow run  {stored.run.run_id} ({stored.run.name}), {megabytes(_size_of_run(stored))}"
        yield from (f"version     {version}, of that run" for version in stored.versions)
    if plan.objects:
        yield f"DVC cache   {len(plan.objects)} files, {megabytes(_size(plan.objects))}"
    if plan.entries:
        yield f"run cache   {len(plan.entries)} entries"
    yield from (f"kept        {note}" for note in dict.fromkeys(plan.notes))


def _size(paths: Iterable[Path]) -> int:
    """Return the bytes that removal frees: those of a file with another hard link stay."""
    found = (path.stat() for path in paths)
    return sum(status.st_size for status in found if status.st_nlink == 1)


def _size_of_run(stored: StoredRun) -> int:
    return sum(_size(path for path in folder.rglob("*") if path.is_file()) for folder in stored.folders)


def megabytes(size: int) -> str:
    """Return a number of bytes as text."""
    return f"{size / 1e6:.1f} MB"


def read_number(text: str | None) -> int:
    """Return the number of experiments to keep; raises UserError where it is missing or none."""
    if text is None or not (text.isascii() and text.isdigit()):
        found = "nothing" if text is None else repr(text)
        raise UserError(f"--keep: found {found}; allowed: how many of the newest experiments stay, 0 or more")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, clean up."""
    parser = argparse.ArgumentParser(prog="python -m flows.cleanup", description=__doc__)
    parser.add_argument("--keep", metavar="N", nargs="?", help="how many of the newest experiments stay")
    parser.add_argument("--dry-run", action="store_true", help="print what would be removed, remove nothing")
    options = parser.parse_args(arguments)
    with report_errors(), chdir(PROJECT):
        clean_up(PROJECT, keep=read_number(options.keep), dry_run=options.dry_run)


if __name__ == "__main__":
    main(sys.argv[1:])
