"""Back up MLflow's and Prefect's sqlite stores, MLflow's artifacts, DVC's cache, and git with its experiments.

`python -m flows.backup FOLDER`, at any time, also while servers and trainings write. `python -m flows.restore FOLDER`
brings it back. Each backup is a folder in FOLDER, named by its time in UTC, with the databases and a git bundle;
`mlartifacts/` and `cache/`, beside them, belong to all backups, and only new files are copied into them.
Exit status: 0 done, 3 done but for files that are damaged in DVC's cache.
"""

import argparse
import fcntl
import os
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from flows import PROJECT
from flows.backup_files import Copied, copy_changed, copy_objects
from flows.dvc_state import cache_folder
from flows.stores import copy_database, find_databases
from pipeline.artifacts import CHECKSUMS, add_path_to_errors, expand, read_json, replace_folder, write_json
from pipeline.core.errors import PartialError, TemporaryError, UserError, redact_url, report_errors
from pipeline.core.git import git
from pipeline.core.project import artifact_folder

NAME_FORMAT = "%Y-%m-%dT%H%M%SZ"
BUNDLE = "repository.bundle"
ARTIFACT_LIST = "mlartifacts.json"  # the MD5 of each file of mlartifacts/ that belongs to the backup
ARTIFACTS, OBJECTS, RUNS = Path("mlartifacts"), Path("cache/files/md5"), Path("cache/runs")  # in FOLDER
NUM_NAMED = 3  # how many of the damaged files a message names


def find_backups(folder: Path) -> list[Path]:
    """Return the finished backups in a folder, oldest first."""
    return sorted(path.parent for path in folder.glob(f"[0-9]*Z/{CHECKSUMS}"))


def back_up(project: Path, folder: Path, *, files_only: bool = False) -> list[str]:
    """Add a backup of the project to the folder; returns the lines to print.

    The databases are copied first, then git, then the files: what a database or a commit names was there before it, and
    so is copied after it. Raises UserError where a store is not a sqlite file (unless `files_only`) or the folder is in
    the project, TemporaryError while another backup runs, PartialError where DVC's cache has damaged files.
    """
    databases = {} if files_only else find_databases(project)
    if folder.resolve().is_relative_to(project):
        raise UserError(
            f"{folder} is inside the project {project}; allowed: a folder outside it, preferably on another disk"
        )
    with add_path_to_errors(folder), _lock(folder):
        for leftover in list(folder.glob("**/.*.tmp")):  # of a backup that was killed
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        lines, damaged = _fill(project, folder, databases=databases)
    if damaged:
        named = ", ".join(damaged[:NUM_NAMED])
        raise PartialError(
            f"DVC's cache: {len(damaged)} files are damaged and not in the backup, which has all the others: {named}; "
            "remove them, then `dvc repro`, `dvc pull` or `dvc exp apply NAME && dvc repro` makes them again"
        )
    return lines


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TemporaryError(f"{folder}: another backup is writing there; try again when it has ended") from None
        yield


def _fill(project: Path, folder: Path, *, databases: Mapping[str, Path]) -> tuple[list[str], list[str]]:
    """Make the backup; returns the lines to print and the damaged files of DVC's cache."""
    earlier = find_backups(folder)
    known = read_json(earlier[-1] / ARTIFACT_LIST) if earlier else {}
    target = folder / datetime.now(UTC).strftime(NAME_FORMAT)
    with replace_folder(target) as new:
        lines = [_copy_store(path, new / name) for name, path in databases.items() if path.exists()]
        git(project, "bundle", "create", "--quiet", str(new / BUNDLE), "--all")
        lines.append(f"{'git':<14}{_count_refs(project)}")
        artifacts = copy_changed(artifact_folder(project), folder / ARTIFACTS, known=known)
        write_json(new / ARTIFACT_LIST, artifacts.md5)
        cache = cache_folder(project)
        objects = copy_objects(cache, folder / OBJECTS)
        copy_changed(cache.parents[1] / "runs", folder / RUNS, known={})
        lines += [_summary("mlartifacts/", artifacts), _summary("DVC's cache", objects)]
        if (new / "mlflow.db").exists():
            lines += _artifacts_elsewhere(new / "mlflow.db", project=project)
        os.sync()  # the files are on the disk before the backup has its name
    return [*lines, f"backup: {target}"], objects.damaged


def _copy_store(path: Path, target: Path) -> str:
    copy_database(path, target)
    return f"{target.name:<14}{target.stat().st_size / 2**20:,.1f} MiB"


def _count_refs(project: Path) -> str:
    refs = git(project, "for-each-ref", "--format=%(refname)").split()
    experiments = [ref for ref in refs if ref.startswith("refs/exps/")]
    return f"{len(refs) - len(experiments)} branches, tags and other refs; {len(experiments)} experiments"


def _summary(name: str, copied: Copied) -> str:
    return f"{name:<14}{len(copied.md5):,} files, {copied.num_new:,} of them new"


def _artifacts_elsewhere(database: Path, *, project: Path) -> Iterator[str]:
    """Yield a warning where runs keep their artifacts in places that are not in the backup."""
    ours = (f"{artifact_folder(project).as_uri()}/", f"{artifact_folder(project)}/", "mlflow-artifacts:")
    with closing(sqlite3.connect(database)) as connection:
        places = [place for (place,) in connection.execute("SELECT artifact_uri FROM runs") if place]
    elsewhere = [place for place in places if not place.startswith(ours)]
    if elsewhere:
        yield (
            f"warning: {len(elsewhere)} runs keep their artifacts in other places, which are not in the backup, "
            f"such as {redact_url(elsewhere[0])}"
        )


def main() -> None:
    """Back up and print what is in the backup."""
    parser = argparse.ArgumentParser(prog="python -m flows.backup", description=__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="for all backups; best on another disk")
    parser.add_argument("--files-only", action="store_true", help="without the databases, which you back up elsewhere")
    arguments = parser.parse_args()
    with report_errors():
        print("\n".join(back_up(PROJECT, expand(arguments.folder).absolute(), files_only=arguments.files_only)))


if __name__ == "__main__":
    main()
