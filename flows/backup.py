"""Back up MLflow's and Prefect's sqlite stores, MLflow's artifacts, DVC's cache, and git with its experiments.

`python -m flows.backup FOLDER`, at any time, also while servers and trainings write. `python -m flows.restore FOLDER`
brings it back. Each backup is a folder in FOLDER, named by its time in UTC, with the databases, a git bundle and a list
of MLflow's artifacts. The files themselves, stored by their MD5 in `mlartifacts/` and `cache/` beside it, belong to all
backups, and only new ones are copied.
Exit status: 0 done; 2 a mistake to correct; 3 done, but what is named is not in the backup; 75 try again later.
"""

import argparse
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows import PROJECT
from flows.backup_files import CopyResult, copy_objects, copy_run_cache, remove_temporary_files, store_files
from flows.champion_ref import CHAMPIONS
from flows.dvc_state import EXPERIMENT_REF, cache_folder, run_cache_folder
from flows.file_lock import hold_files
from flows.stores import URL_VARIABLES, artifact_places_elsewhere, copy_database, find_databases
from pipeline.artifacts import CHECKSUMS, add_path_to_errors, expand, read_json, replace_folder, write_json
from pipeline.core.errors import PartialError, TemporaryError, UserError, redact_url, report_errors
from pipeline.core.git import find_commit, git
from pipeline.core.project import artifact_folder
from pipeline.tracking.relocation import relocate
from pipeline.tracking.store_uri import tracking_uri

NAME_FORMAT = "%Y-%m-%dT%H%M%SZ"
NAME_PATTERN = "[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]T[0-9][0-9][0-9][0-9][0-9][0-9]Z"
BUNDLE = "repository.bundle"
ARTIFACT_LIST = "mlartifacts.json"  # path and MD5 of each file that mlartifacts/ had in the project
PROJECT_FILE = "project.json"  # `folder`, where the project was, and `roots`, its commits without parents
ARTIFACTS, OBJECTS, RUNS = Path("mlartifacts"), Path("cache/files/md5"), Path("cache/runs")  # in FOLDER
EXPERIMENTS = "refs/exps/[0-9a-f][0-9a-f]/*"  # without DVC's queue, and the refs of its running commands
NUM_NAMED = 3  # how many of the missing files a message names


def find_backups(folder: Path) -> list[Path]:
    """Return the finished backups in a folder, oldest first."""
    return sorted(path.parent for path in folder.glob(f"{NAME_PATTERN}/{CHECKSUMS}"))


def back_up(project: Path, folder: Path, *, files_only: bool = False) -> list[str]:
    """Add a backup of the project to the folder; returns the lines to print.

    The databases are copied first, then git, then the files: what a database or a commit names was there before it, and
    so is copied after it. Raises UserError where a store is not a sqlite file (unless `files_only`), the folder is in
    the project or has backups of another one, or the project is a shallow clone; TemporaryError while another backup
    writes there or a cleanup runs; PartialError where the backup is complete but for a database or files that it names.
    """
    databases = {} if files_only else find_databases(project)
    _check_project(project, folder)
    with add_path_to_errors(folder), hold_files(project, command="flows.backup"), _lock(folder):
        check_same_project(project, find_backups(folder)[-1:])
        _remove_leftovers(folder)
        lines, missing = _fill(project, folder, databases=databases)
    if missing:
        print("\n".join(lines))
        named = ", ".join(missing[:NUM_NAMED])
        raise PartialError(
            f"{len(missing)} missing in this backup, which has all the rest: {named}; remove a damaged file of DVC's "
            "cache, then `dvc repro`, `dvc pull` or `dvc exp apply NAME && dvc repro` makes it again; correct what "
            "else is named, then back up again"
        )
    return lines


def _check_project(project: Path, folder: Path) -> None:
    """Raise UserError where the project cannot be backed up into this folder, or not completely."""
    if folder.resolve().is_relative_to(project):
        raise UserError(
            f"{folder} is inside the project {project}; allowed: a folder outside it, preferably on another disk"
        )
    if git(project, "rev-parse", "--is-shallow-repository") == "true":
        raise UserError(
            f"{project}: found a shallow clone, whose backup could not be cloned; allowed: a clone with its whole "
            "history; run `git fetch --unshallow`, then this again"
        )


def check_same_project(project: Path, backups: list[Path]) -> None:
    """Raise UserError where one of the backups is of a project that has no first commit in common with this one."""
    for backup in backups:
        saved = read_json(backup / PROJECT_FILE)
        if not {*saved["roots"]} & {*_project(project)["roots"]}:
            raise UserError(
                f"{backup}: found a backup of another project, {saved['folder']}; allowed: a folder with backups of "
                f"{project} only; name another folder"
            )


def _project(project: Path) -> dict[str, Any]:
    """Return the content of PROJECT_FILE."""
    return {"folder": str(project), "roots": git(project, "rev-list", "--max-parents=0", *_revisions(project)).split()}


def _revisions(project: Path) -> list[str]:
    """Return git's options for the commits of the branches and tags, and the one that is checked out."""
    return ["--branches", "--tags", *(["HEAD"] if find_commit(project, "HEAD") else [])]


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TemporaryError(f"{folder}: another backup is writing there; try again when it has ended") from None
        yield


def _remove_leftovers(folder: Path) -> None:
    """Remove what a backup that was killed left, and nothing that others have in the folder."""
    for kind in ("new", "old"):
        for leftover in list(folder.glob(f".{NAME_PATTERN}.{kind}.tmp")):
            shutil.rmtree(leftover)
    for path in (ARTIFACTS, OBJECTS, RUNS):
        remove_temporary_files(folder / path)


def _fill(project: Path, folder: Path, *, databases: Mapping[str, Path]) -> tuple[list[str], list[str]]:
    """Make the backup; returns the lines to print, and what is missing in it."""
    target = folder / datetime.now(UTC).strftime(NAME_FORMAT)
    with replace_folder(target) as new:
        lines, missing = _copy_databases(project, databases, new)
        lines.append(_bundle(project, new / BUNDLE))
        write_json(new / PROJECT_FILE, _project(project))
        artifacts = store_files(artifact_folder(project), folder / ARTIFACTS)
        write_json(new / ARTIFACT_LIST, artifacts.md5)
        objects = copy_objects(cache_folder(project), folder / OBJECTS)
        runs = copy_run_cache(run_cache_folder(project), folder / RUNS)
        lines += [_summary("mlartifacts/", artifacts), _summary("DVC's cache", objects)]
        if (new / "mlflow.db").exists():
            lines += _warn_of_other_places(new / "mlflow.db", project=project)
        os.sync()  # the files are on the disk before the backup has its name
    return [*lines, f"backup: {target}"], [*missing, *artifacts.left_out, *objects.left_out, *runs.left_out]


def _copy_databases(project: Path, databases: Mapping[str, Path], target: Path) -> tuple[list[str], list[str]]:
    """Copy the databases into a folder; returns the lines to print, and a text for each that does not exist."""
    lines, missing = [], []
    if "mlflow.db" in databases and (line := relocate(tracking_uri(project), project)):
        lines.append(line)
    for name, path in databases.items():
        if path.exists():
            copy_database(path, target / name)
            lines.append(f"{name:<14}{(target / name).stat().st_size / 2**20:,.1f} MiB")
        else:
            lines.append(f"no {name}: {path} does not exist")
            missing.append(f"{name} (no file {path}: set {URL_VARIABLES[name]} as the runs have it)")
    return lines, missing


def _bundle(project: Path, target: Path) -> str:
    """Write the git bundle; returns the line to print."""
    git(
        project,
        "bundle",
        "create",
        "--quiet",
        str(target),
        *_revisions(project),
        f"--glob={EXPERIMENTS}",
        f"--glob={CHAMPIONS}/*",
    )
    refs = [line.partition(" ")[2] for line in git(project, "bundle", "list-heads", str(target)).splitlines()]
    experiments = [ref for ref in refs if EXPERIMENT_REF.fullmatch(ref)]
    num_champions = sum(ref.startswith(f"{CHAMPIONS}/") for ref in refs)
    num_others = len(refs) - len(experiments) - num_champions
    return f"{'git':<14}{num_others} branches, tags and HEAD; {len(experiments)} experiments; {num_champions} champions"


def _summary(name: str, copied: CopyResult) -> str:
    return f"{name:<14}{len(copied.md5):,} files, {copied.num_new:,} of them new"


def _warn_of_other_places(database: Path, *, project: Path) -> Iterator[str]:
    """Yield a warning where runs or models keep their files in places that are not in the backup."""
    if places := artifact_places_elsewhere(database, project=project):
        yield (
            f"warning: runs and models keep files in {len(places)} other places, which are not in the backup, "
            f"such as {redact_url(places[0])}"
        )


def main() -> None:
    """Back up and print what is in the backup."""
    parser = argparse.ArgumentParser(prog="python -m flows.backup", description=__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="for all backups of this project; best on another disk")
    parser.add_argument("--files-only", action="store_true", help="without the databases, which you back up elsewhere")
    arguments = parser.parse_args()
    with report_errors():
        print("\n".join(back_up(PROJECT, expand(arguments.folder).absolute(), files_only=arguments.files_only)))


if __name__ == "__main__":
    main()
