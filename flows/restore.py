"""Restore what `python -m flows.backup FOLDER` has saved: `python -m flows.restore FOLDER`, in a clone of the project.

The newest backup is taken, or the one that --backup names. Databases that exist are replaced only with --overwrite, and
then kept beside the new ones. Files, experiments and commits are added; what is there stays as it is. The branches of
the backup come as `backup/<branch>`. Exit status: 0 done, 3 done but for files that are damaged in the backup.
"""

import argparse
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import chdir
from pathlib import Path

from flows import PROJECT, server
from flows.backup import ARTIFACT_LIST, ARTIFACTS, BUNDLE, NUM_NAMED, OBJECTS, RUNS, find_backups
from flows.backup_files import copy_changed, copy_missing, copy_objects
from flows.dvc_state import cache_folder
from flows.stores import TOOLS, check_database, find_databases
from pipeline.artifacts import copy_file, expand, read_json, verify
from pipeline.core.errors import PartialError, TemporaryError, UserError, report_errors
from pipeline.core.git import git, output
from pipeline.core.project import artifact_folder
from pipeline.tracking.relocation import relocate
from pipeline.tracking.sqlite_store import SUFFIXES_BESIDE, is_current, processes_using
from pipeline.tracking.store_uri import tracking_uri


def restore(project: Path, backup: Path, *, overwrite: bool = False) -> list[str]:
    """Bring a backup into the project; returns the lines to print.

    Everything is checked before anything is written. The databases come last, so that a restore that was killed can be
    run again. Raises UserError where a database exists (unless `overwrite`), is damaged in the backup or of a newer
    version, TemporaryError where a process uses one, PartialError where files are damaged in the backup.
    """
    verify(backup)
    saved = [name for name in TOOLS if (backup / name).exists()]
    targets = {name: path for name, path in find_databases(project).items() if name in saved} if saved else {}
    for name, path in targets.items():
        check_database(backup / name)
        is_current(backup / name, tool=TOOLS[name])
        _check_target(path, overwrite=overwrite)
    if targets and (running := server.running(project)):
        raise TemporaryError(f"{running.address}: the Prefect server is running; end it with `make stop`")
    lines = list(_restore_git(project, backup / BUNDLE))
    damaged = _restore_files(project, backup, lines=lines)
    for name, path in targets.items():
        lines += _restore_database(backup / name, path)
    if "mlflow.db" in targets and (line := relocate(tracking_uri(project), project)):
        lines.append(line)
    if damaged:
        print("\n".join(lines))
        raise PartialError(
            f"{backup.parent}: {len(damaged)} files are damaged or missing there, and were not restored: "
            f"{', '.join(damaged[:NUM_NAMED])}; look for them in another backup, or make them again with `dvc repro`"
        )
    return lines


def _check_target(path: Path, *, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise UserError(
            f"{path}: exists already; allowed: a project without this store; --overwrite replaces it, and keeps the "
            "existing file beside the new one"
        )
    if users := processes_using(path):
        raise TemporaryError(f"{path}: is open in {', '.join(users)}; end that, then run the same command again")


def _restore_git(project: Path, bundle: Path) -> Iterator[str]:
    """Add the experiments, branches and tags of the bundle; an experiment or tag that exists stays as it is."""
    git(project, "bundle", "verify", "--quiet", str(bundle))
    listed = _refs(git(project, "bundle", "list-heads", str(bundle)))
    head = listed.pop("HEAD")
    wanted = ["refs/exps/*:refs/exps/*", "refs/tags/*:refs/tags/*", "+refs/heads/*:refs/remotes/backup/*"]
    if head not in listed.values():  # it was detached
        wanted.append("+HEAD:refs/remotes/backup/HEAD")
    fetch = ("fetch", "--quiet", "--no-tags", str(bundle))
    output(project, *fetch, *wanted, allowed_statuses=(0, 1))  # 1: refused to change a ref that exists
    here = _refs(git(project, "for-each-ref", "--format=%(objectname) %(refname)"))
    added = [ref for ref in listed if ref.startswith(("refs/exps/", "refs/tags/"))]
    yield f"{'git':<14}{len(added)} experiments and tags; branches as backup/<branch>"
    if kept := [ref for ref in added if here.get(ref) != listed[ref]]:
        yield f"kept as they are here, though another commit in the backup: {', '.join(kept)}"


def _refs(lines: str) -> dict[str, str]:
    """Return hash by name of what git has listed as `<hash> <name>`."""
    return {name: found for found, _, name in (line.partition(" ") for line in lines.splitlines())}


def _restore_files(project: Path, backup: Path, *, lines: list[str]) -> list[str]:
    """Add DVC's cache and MLflow's artifacts, and lines to print; returns the files that are damaged in the backup."""
    folder, cache = backup.parent, cache_folder(project)
    objects = copy_objects(folder / OBJECTS, cache, protect=True)
    copy_changed(folder / RUNS, cache.parents[1] / "runs", known={})
    lines.append(f"{'DVC cache':<14}{len(objects.md5):,} files, {objects.num_new:,} of them restored")
    listed: Mapping[str, str] = read_json(backup / ARTIFACT_LIST)
    artifacts, kept = copy_missing(folder / ARTIFACTS, artifact_folder(project), md5=listed)
    lines.append(f"{'mlartifacts/':<14}{len(listed):,} files, {artifacts.num_new:,} of them restored")
    if kept:
        lines.append(f"kept as they are here, though of another size in the backup: {', '.join(kept[:NUM_NAMED])} …")
    return [*(str(OBJECTS / name) for name in objects.damaged), *(str(ARTIFACTS / name) for name in artifacts.damaged)]


def _restore_database(source: Path, path: Path) -> Iterator[str]:
    """Copy a database to its place; one that is there is renamed, with what sqlite keeps beside it."""
    if path.exists():
        old = path.with_name(f"{path.name}.before-restore-{time.strftime('%Y-%m-%dT%H%M%S')}")
        for suffix in ("", *SUFFIXES_BESIDE):
            if (file := path.with_name(path.name + suffix)).exists():
                shutil.move(file, old.with_name(old.name + suffix))
        yield f"{'kept':<14}{old}"
    copy_file(source, path)
    yield f"{path.name:<14}{path.stat().st_size / 2**20:,.1f} MiB"


def find_backup(folder: Path, name: str | None) -> Path:
    """Return the backup of this name in a folder, by default the newest; raises UserError where there is none."""
    found = find_backups(folder)
    if not found:
        raise UserError(f"{folder}: has no finished backup; allowed: a folder that `python -m flows.backup` has filled")
    if name is None:
        return found[-1]
    if folder / name not in found:
        names = ", ".join(path.name for path in found[-5:])
        raise UserError(f"--backup: found {name!r}; allowed: {names}")
    return folder / name


def main() -> None:
    """Restore, and print what came back."""
    parser = argparse.ArgumentParser(prog="python -m flows.restore", description=__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="the folder given to flows.backup")
    parser.add_argument("--backup", metavar="NAME", help="a backup in FOLDER (default: the newest)")
    parser.add_argument("--overwrite", action="store_true", help="replace databases that exist, and keep them beside")
    arguments = parser.parse_args()
    with report_errors():
        backup = find_backup(expand(arguments.folder).absolute(), arguments.backup)
        with chdir(PROJECT):
            print("\n".join(restore(PROJECT, backup, overwrite=arguments.overwrite)))
        print(f"restored {backup}; `dvc checkout` brings the files of this commit")


if __name__ == "__main__":
    main()
