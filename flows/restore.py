"""Restore what `python -m flows.backup FOLDER` has saved: `python -m flows.restore FOLDER`, in a clone of the project.

The newest backup is taken, or the one that --backup names. Databases that exist are replaced only with --overwrite, and
then kept beside the new ones. Files, experiments and commits are added; what is there stays as it is. The branches of
the backup come as `backup-<time>/<branch>`.
Exit status: 0 done; 2 a mistake to correct; 3 done, but what is named is damaged or missing in the backup; 75 try again
later.
"""

import argparse
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import chdir
from pathlib import Path

from flows import PROJECT, server
from flows.backup import (
    ARTIFACT_LIST,
    ARTIFACTS,
    BUNDLE,
    NUM_NAMED,
    OBJECTS,
    PROJECT_FILE,
    RUNS,
    check_same_project,
    find_backups,
)
from flows.backup_files import copy_objects, copy_run_cache, restore_files
from flows.champion_ref import CHAMPIONS
from flows.dvc_state import cache_folder, run_cache_folder
from flows.file_lock import hold_files
from flows.stores import TOOLS, check_database, find_databases
from flows.workspace_folders import hold_off_flow_runs
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
    run again. Flow runs that start meanwhile wait. Raises UserError where a database exists (unless `overwrite`), is
    damaged in the backup or of a newer version, or the backup is of another project; TemporaryError where a process
    uses a database, or a flow run, backup or cleanup is running; PartialError where files are damaged in the backup.
    """
    verify(backup)
    check_same_project(project, [backup])
    with hold_files(project, command="flows.restore"), hold_off_flow_runs(project):
        lines, missing = _restore_all(project, backup, overwrite=overwrite)
    if missing:
        print("\n".join(lines))
        raise PartialError(
            f"{backup.parent}: {len(missing)} damaged or missing there, and not restored: "
            f"{', '.join(missing[:NUM_NAMED])}; look for them in another backup, or make them again with `dvc repro`"
        )
    return lines


def _restore_all(project: Path, backup: Path, *, overwrite: bool) -> tuple[list[str], list[str]]:
    """Check and restore; returns the lines to print, and what could not be restored."""
    saved = [name for name in TOOLS if (backup / name).exists()]
    targets = {name: path for name, path in find_databases(project).items() if name in saved} if saved else {}
    for name in targets:
        check_database(backup / name)
        is_current(backup / name, tool=TOOLS[name])
    _check_targets(project, targets, overwrite=overwrite)
    lines = [f"{'backup':<14}{backup.name} of {read_json(backup / PROJECT_FILE)['folder']}"]
    missing = _restore_git(project, backup, lines=lines)
    missing += _restore_files(project, backup, lines=lines)
    _check_targets(project, targets, overwrite=overwrite)  # again, since copying the files may have taken hours
    for name, path in targets.items():
        lines += _restore_database(backup / name, path)
    if "mlflow.db" in targets and (line := relocate(tracking_uri(project), project)):
        lines.append(line)
    lines += [f"{name:<14}not in this backup" for name in TOOLS if name not in saved]
    return lines, missing


def _check_targets(project: Path, targets: Mapping[str, Path], *, overwrite: bool) -> None:
    """Raise UserError where a database exists, unless `overwrite`; TemporaryError where one is in use."""
    for path in targets.values():
        _check_target(path, overwrite=overwrite)
    if targets and (running := server.running(project)):
        raise TemporaryError(f"{running.address}: the Prefect server is running; end it with `make stop`")


def _check_target(path: Path, *, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise UserError(
            f"{path}: exists already; allowed: a project without this store; --overwrite replaces it, and keeps the "
            "existing file beside the new one"
        )
    if users := processes_using(path):
        raise TemporaryError(f"{path}: is open in {', '.join(users)}; end that, then run the same command again")


def _restore_git(project: Path, backup: Path, *, lines: list[str]) -> list[str]:
    """Add the experiments, champions, branches and tags of the bundle; returns those that git could not add.

    An experiment, champion or tag that exists stays as it is.
    """
    bundle, remote = str(backup / BUNDLE), f"backup-{backup.name}"
    git(project, "bundle", "verify", "--quiet", bundle)
    listed = _refs(git(project, "bundle", "list-heads", bundle))
    head = listed.pop("HEAD", None)  # a backup made before the first commit of a branch has none
    wanted = [f"{refs}/*:{refs}/*" for refs in ("refs/exps", CHAMPIONS, "refs/tags")]
    wanted.append(f"+refs/heads/*:refs/remotes/{remote}/*")
    if head and head not in listed.values():  # it was detached
        wanted.append(f"+HEAD:refs/remotes/{remote}/HEAD")
    fetch = ("fetch", "--quiet", "--no-tags", bundle)
    output(project, *fetch, *wanted, allowed_statuses=(0, 1))  # 1: some refs were not added, which are found below
    here = _refs(git(project, "for-each-ref", "--format=%(objectname) %(refname)"))
    targets = {ref: ref.replace("refs/heads/", f"refs/remotes/{remote}/", 1) for ref in listed}
    num_added = sum(not ref.startswith("refs/heads/") for ref in listed)
    lines.append(f"{'git':<14}{num_added} experiments, champions and tags; branches as {remote}/<branch>")
    if kept := [ref for ref, target in targets.items() if here.get(target, listed[ref]) != listed[ref]]:
        lines.append(f"kept as they are here, although the backup has another commit for them: {', '.join(kept)}")
    return [f"{ref} (git cannot add it beside the refs here)" for ref, target in targets.items() if target not in here]


def _refs(lines: str) -> dict[str, str]:
    """Return hash by name of what git has listed as `<hash> <name>`."""
    return {name: found for found, _, name in (line.partition(" ") for line in lines.splitlines())}


def _restore_files(project: Path, backup: Path, *, lines: list[str]) -> list[str]:
    """Add DVC's cache and MLflow's artifacts, and lines to print; returns the files that are damaged in the backup."""
    folder = backup.parent
    objects = copy_objects(folder / OBJECTS, cache_folder(project), protect=True)
    runs = copy_run_cache(folder / RUNS, run_cache_folder(project))
    lines.append(f"{'DVC cache':<14}{len(objects.md5):,} files, {objects.num_new:,} of them restored")
    listed: Mapping[str, str] = read_json(backup / ARTIFACT_LIST)
    artifacts = restore_files(folder / ARTIFACTS, artifact_folder(project), md5=listed)
    lines.append(f"{'mlartifacts/':<14}{len(listed):,} files, {artifacts.num_new:,} of them restored")
    if artifacts.kept:
        named = ", ".join(artifacts.kept[:NUM_NAMED])
        lines.append(f"kept as they are here, although the backup has them with another size: {named} …")
    return [*objects.left_out, *runs.left_out, *artifacts.left_out]


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
        raise UserError(
            f"{folder}: has no finished backup; allowed: a folder that `python -m flows.backup` has filled; "
            "correct the path, or run it first"
        )
    if name is None:
        return found[-1]
    if folder / name not in found:
        names = ", ".join(path.name for path in found[-5:])
        raise UserError(f"--backup: found {name!r}; allowed: {names}; name one of them, or leave --backup out")
    return folder / name


def main() -> None:
    """Restore, and print what was restored."""
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
