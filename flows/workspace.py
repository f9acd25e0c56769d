"""A throw-away clone of the checkout, in which one flow run reproduces the stages and saves them as an experiment.

It lies in `.dvc/tmp/flows/` (`workspace_folders`), on the file system of the DVC cache, so that files can be linked
rather than copied. A process of its own runs DVC there (`dvc_client`).
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from flows.dvc_client import DvcClient, OnLine, StepError, describe_exit, start_dvc
from flows.dvc_protocol import Outcome
from flows.git import apply_difference, find_repository, git_identity, take_snapshot
from flows.workspace_folders import own_folder
from pipeline.artifacts import ARTIFACTS
from pipeline.core.errors import UserError
from pipeline.core.git import environment as git_environment
from pipeline.core.git import git, read_committed
from pipeline.core.project import pipeline_cache_folder
from pipeline.core.results import RESULT_FILE, read_result
from pipeline.core.sqlite import sqlite_path
from pipeline.core.yaml import read_yaml
from pipeline.params import PARAMS_FILE, check_is_folder
from pipeline.tracking.store_uri import tracking_uri

KEPT = Path(".dvc/tmp/kept")
"""Where clones lie that the user asked to keep."""
EXPERIMENT_LABEL = "dvc.experiment"
"""Label of a flow run in Prefect."""
COMMITTED_PARAMS = "committed_params.yaml"
RESULT = "result.json"

Keep = Literal["never", "failed", "always"]
"""Whether a clone is moved to KEPT when it is left."""


class Workspace:
    """An open clone; `folder` is where its files are until `open_workspace` is left.

    `committed_params` is a copy of params.yaml as committed. `mlflow_run_id` is the MLflow run into which the stages
    have recorded; None where none has run yet, or their code is too old to hand over the id.
    """

    def __init__(self, clone: Path, *, folder: Path, experiment: str, dvc: DvcClient) -> None:
        self.folder = clone
        self.committed_params = folder / COMMITTED_PARAMS
        self.experiment = experiment
        self.mlflow_run_id: str | None = None
        self._result = folder / RESULT
        self._dvc = dvc

    def reproduce(self, stage: str, *, on_line: OnLine, again: bool = False) -> Outcome:
        """Bring one stage up to date, its output going to `on_line` as it comes; raises StepError.

        `again`: run it whatever DVC has of it, and leave DVC's cache as it is.
        """
        errors: list[str] = []

        def listen(line: str) -> None:
            if line.startswith("error: "):  # as `report_errors` prints it
                errors[:] = [line.removeprefix("error: ")]
            on_line(line)

        answer = self._dvc.ask("remake" if again else "reproduce", stage, on_line=listen)
        self.mlflow_run_id = read_result(self._result).mlflow_run_id
        if answer.outcome:
            return answer.outcome
        assert answer.status is not None
        reason = answer.reason or "".join(errors) or f"{describe_exit(answer.status)}; its output stands above"
        raise StepError(f"{stage}: {reason}", status=answer.status)

    def restore(self, path: Path, md5: str) -> bool:
        """Put an output's recorded content in its place; returns False where neither cache nor remote has it.

        Raises StepError where that could not be found out.
        """
        answer = self._dvc.ask("restore", f"{path} {md5}")
        if answer.status is not None:
            raise StepError(f"{path}: {answer.reason}", status=answer.status)
        return answer.outcome == "restored"

    def save(self, *, on_line: OnLine) -> None:
        """Save the files as the experiment and bring that into the checkout's list; raises StepError."""
        for action in ("save", "push"):
            answer = self._dvc.ask(action, self.experiment, on_line=on_line)
            if answer.status is not None:
                raise StepError(f"experiment {self.experiment}: {answer.reason}", status=answer.status)


@contextmanager
def open_workspace(
    project: Path,
    *,
    params: Mapping[str, Any],
    params_text: str,
    experiment: str,
    flow_run_id: str,
    variables: Mapping[str, str] = {},
    keep: Keep = "never",
) -> Iterator[Workspace]:
    """Clone `project` with its uncommitted changes, and write `params_text` into its params.yaml.

    `variables` are environment variables for the stages. On leaving, for whatever reason, what still runs in the clone
    is ended and the clone is removed or, as `keep` says, moved to KEPT. Raises UserError where the checkout cannot be
    cloned.
    """
    commit = take_snapshot(project)

    def fill(top: Path, clone: Path) -> Mapping[str, Any]:
        check_is_folder(project / params["download"]["folder"])
        git(top, "read-tree", "-u", "--reset", commit)
        (clone / PARAMS_FILE).write_text(params_text, encoding="utf-8")
        return params

    variables = {"PIPELINE_EXPERIMENT": experiment, "PIPELINE_FLOW_RUN_ID": flow_run_id, **variables}
    with _open(
        project, name=flow_run_id, fill=fill, experiment=experiment, variables=variables, keep=keep
    ) as workspace:
        yield workspace


@contextmanager
def open_recorded(
    project: Path, *, commit: str, difference: bytes, name: str, variables: Mapping[str, str], keep: Keep = "never"
) -> Iterator[Workspace]:
    """Clone `project` as it was at `commit` with `difference`, a recorded `git diff`, applied.

    On leaving, as with `open_workspace`. The folder of images may be gone: the raw data may be in DVC's cache. Raises
    UserError where the difference does not apply.
    """

    def fill(top: Path, clone: Path) -> Mapping[str, Any]:
        git(top, "update-ref", "--no-deref", "HEAD", commit)
        git(top, "read-tree", "-u", "--reset", commit)
        if difference:
            apply_difference(difference, top, commit=commit)
        # DVC puts the files of plots into an experiment's commit, and then refuses them as outputs that git tracks
        git(clone, "rm", "-r", "--cached", "--quiet", "--ignore-unmatch", "--", str(ARTIFACTS))
        params: Mapping[str, Any] = read_yaml(clone / PARAMS_FILE)
        return params

    # without a flow run, but `pipeline.core.errors` is to know that this is no checkout of the user's
    variables = {"PIPELINE_EXPERIMENT": "", "PIPELINE_FLOW_RUN_ID": "", **variables}
    with _open(project, name=name, fill=fill, experiment="", variables=variables, keep=keep) as workspace:
        yield workspace


@contextmanager
def _open(
    project: Path,
    *,
    name: str,
    fill: Callable[[Path, Path], Mapping[str, Any]],
    experiment: str,
    variables: Mapping[str, str],
    keep: Keep,
) -> Iterator[Workspace]:
    """Make a clone in a folder of its own, in which `fill` puts the files and returns the parameters; start DVC there.

    Where the project is a folder of a larger repository, `fill` gets the clone of that and the project's folder in it.
    """
    repository, subfolder = find_repository(project)
    with own_folder(project, name) as (folder, lock):
        top = folder / "clone"
        clone = top / subfolder
        git(project, "clone", "--quiet", "--shared", "--no-checkout", str(repository), str(top))
        params = fill(top, clone)
        committed = read_committed(clone, "HEAD", str(PARAMS_FILE)) or "{}"
        (folder / COMMITTED_PARAMS).write_text(committed, encoding="utf-8")
        _link_local_files(project, clone, params)
        environment = stage_environment(project, folder, variables=variables)
        with (
            _kept(top, project / KEPT / name, keep=keep),
            start_dvc(clone, project=project, environment=environment, lock=lock) as dvc,
        ):
            yield Workspace(clone, folder=folder, experiment=experiment, dvc=dvc)


@contextmanager
def _kept(clone: Path, target: Path, *, keep: Keep) -> Iterator[None]:
    """Move the clone to `target` on leaving, always or where the block failed, as `keep` says."""
    kept = keep == "always"
    try:
        yield
    except BaseException:
        kept = keep != "never"
        raise
    finally:
        if kept:
            shutil.rmtree(target, ignore_errors=True)  # of an earlier try of the same flow run
            target.parent.mkdir(parents=True, exist_ok=True)
            clone.rename(target)


def _link_local_files(project: Path, clone: Path, params: Mapping[str, Any]) -> None:
    """Let the clone see the files that parameters name by a relative path and git does not track.

    Raises UserError as `check_local_files` does, but for the folder of images.
    """
    for name in _local_files(project, params):
        _link(project / name, clone / name)


def check_local_files(project: Path, params: Mapping[str, Any]) -> list[str]:
    """Return the relative paths in the parameters that exist.

    Raises UserError where one leads out of the project, of which the clone would not have it, and where the folder of
    images, which DVC watches whatever the data set, is not there.
    """
    check_is_folder(project / params["download"]["folder"])
    return _local_files(project, params)


def _local_files(project: Path, params: Mapping[str, Any]) -> list[str]:
    named = [params["download"]["folder"], *params["download"]["urls"], params["train"]["weights"]]
    local = [name for name in named if name and "://" not in name and not Path(name).is_absolute()]
    found = [name for name in local if (project / name).exists()]
    for name in found:
        source = project / name
        if not source.resolve().is_relative_to(project) and ".." in Path(name).parts:
            raise UserError(
                f"{PARAMS_FILE}: found the path {name!r}; allowed: inside the project, or absolute: {source.resolve()}"
            )
    return found


def _link(source: Path, target: Path) -> None:
    """Make a link where the clone has nothing, else links to the files that are missing there."""
    if target.is_dir() and source.is_dir():
        _link_files(source, target)
    elif not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source)


def _link_files(source: Path, target: Path) -> None:
    """Make real folders with links to files: DVC, hashing a folder, does not enter a folder below that is a link."""
    for entry in os.scandir(source):
        place = target / entry.name
        if entry.is_dir(follow_symlinks=False):
            place.mkdir(exist_ok=True)
            _link_files(Path(entry.path), place)
        elif not os.path.lexists(place):
            place.symlink_to(entry.path)


def stage_environment(project: Path, folder: Path, *, variables: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of DVC and the stages of one flow run, with `variables`; `folder` is the run's own."""
    return {
        # a bar redrawn ten times a second would be as many lines in the flow run's log
        "TQDM_MININTERVAL": "5",
        **git_identity(project),
        **git_environment(),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PIPELINE_PYTHON": sys.executable,  # for ./python; older commits take that of the PATH
        "SHELL": "/bin/sh",
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
        "MLFLOW_TRACKING_URI": tracking_uri(project),
        **_index_folder(folder),
        RESULT_FILE: str(folder / RESULT),
        "PIPELINE_PROJECT": str(project),
        "PIPELINE_CACHE_DIR": str(pipeline_cache_folder(project)),
        **variables,
    }


def _index_folder(folder: Path) -> dict[str, str]:
    """Let DVC keep its index of the clone beside the clone: it would never remove it from its own place.

    There it stays where the path has a `$NAME`, which DVC's library would replace by the variable's value.
    """
    index = str(folder / "index")
    return {} if os.path.expandvars(index) != index else {"DVC_SITE_CACHE_DIR": index}


def made_store(project: Path) -> str | None:
    """Return `tracking_uri`, or None where that is a sqlite file which no run has made yet."""
    uri = tracking_uri(project)
    path = sqlite_path(uri)
    return uri if path is None or path.exists() else None
