"""A throw-away clone of the checkout, in which one flow run reproduces the stages and saves them as an experiment.

The clone is in `.dvc/tmp/flows/` (`workspace_folders`), on the file system of the DVC cache, so that files can be
linked rather than copied. A separate process runs DVC in it (`dvc_client`).
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
from flows.git import Snapshot, apply_difference, find_repository, git_identity, take_snapshot
from flows.live_progress import LiveProgress
from flows.settings import NOTIFY_ADDRESSES
from flows.workspace_folders import make_folder
from pipeline.artifacts import ARTIFACTS
from pipeline.core.errors import UserError
from pipeline.core.git import environment as git_environment
from pipeline.core.git import git
from pipeline.core.project import pipeline_cache_folder
from pipeline.core.results import RESULT_FILE, read_result
from pipeline.core.sqlite import sqlite_path
from pipeline.core.step_progress import PROGRESS_FILE
from pipeline.core.yaml import read_yaml
from pipeline.datasets.folder_errors import check_is_folder
from pipeline.params import PARAMS_FILE
from pipeline.tracking.store_uri import tracking_uri

KEPT_CLONES = Path(".dvc/tmp/kept")  # folder of the clones that the user asked to keep
EXPERIMENT_LABEL = "dvc.experiment"  # a label of the flow run in Prefect
RESULT = "result.json"
PROGRESS = "progress.json"

Keep = Literal["never", "failed", "always"]  # when a clone is moved to KEPT_CLONES instead of removed


class Workspace:
    """An open clone of the checkout, whose files are in `folder` until `open_workspace` ends.

    `environment` has the environment variables of the stages. `mlflow_run_id` is the MLflow run into which the stages
    have recorded, and `mlflow_experiment_id` its experiment in MLflow: None where none has run yet, or their code is
    too old to report the ids. `live` publishes the progress of a flow run; it is None where no flow run reproduces the
    stages.
    """

    def __init__(
        self, clone: Path, *, folder: Path, experiment: str, environment: Mapping[str, str], dvc: DvcClient
    ) -> None:
        self.folder = clone
        self.environment = environment
        self.experiment = experiment
        self.mlflow_run_id: str | None = None
        self.progress_file = folder / PROGRESS
        self.live: LiveProgress | None = None
        self.mlflow_experiment_id: str | None = None
        self._result = folder / RESULT
        self._dvc = dvc

    def reproduce(self, stage: str, *, on_line: OnLine, again: bool = False) -> Outcome:
        """Bring one stage up to date, and return its outcome; raises StepError where it fails.

        `on_line` is called with each line that it prints. With `again`, its command runs even where its outputs are
        cached, and DVC's cache is not changed.
        """
        errors: list[str] = []

        def remember_error(line: str) -> None:
            if line.startswith("error: "):  # as `report_errors` prints it
                errors[:] = [line.removeprefix("error: ")]
            on_line(line)

        answer = self._dvc.ask("rerun" if again else "reproduce", stage, on_line=remember_error)
        result = read_result(self._result)
        self.mlflow_run_id, self.mlflow_experiment_id = result.mlflow_run_id, result.mlflow_experiment_id
        if answer.outcome:
            return answer.outcome
        assert answer.status is not None
        reason = answer.reason or "".join(errors) or f"{describe_exit(answer.status)}; see its output above"
        raise StepError(f"{stage}: {reason}", status=answer.status)

    def restore(self, path: Path, md5: str) -> bool:
        """Restore the recorded content of an output; returns False where neither cache nor remote has it.

        Raises StepError where DVC fails.
        """
        answer = self._dvc.ask("restore", f"{path} {md5}")
        if answer.status is not None:
            raise StepError(f"{path}: {answer.reason}", status=answer.status)
        return answer.outcome == "restored"

    def save(self, *, on_line: OnLine) -> None:
        """Save the files as an experiment, and push it into the checkout; raises StepError where DVC fails."""
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
    snapshot: Snapshot | None = None,
) -> Iterator[Workspace]:
    """Clone `project` with its uncommitted changes, and write `params_text` into its params.yaml.

    With `snapshot`, the clone has the files of that moment instead. `variables` are environment variables for the
    stages. At the end, also after an error, the processes in the clone are ended, and the clone is removed or,
    depending on `keep`, moved to KEPT_CLONES. Raises UserError where the checkout cannot be cloned.
    """
    commit = snapshot.commit if snapshot else take_snapshot(project)

    def fill(top: Path, clone: Path) -> Mapping[str, Any]:
        check_is_folder(project / params["download"]["folder"])
        if snapshot:
            git(top, "update-ref", "--no-deref", "HEAD", snapshot.head)
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
    """Clone `project` at `commit`, with the recorded `git diff` `difference` applied, and end as `open_workspace` does.

    The folder of images need not exist, since DVC's cache may have the raw data. Raises UserError where the difference
    does not apply.
    """

    def fill(top: Path, clone: Path) -> Mapping[str, Any]:
        git(top, "update-ref", "--no-deref", "HEAD", commit)
        git(top, "read-tree", "-u", "--reset", commit)
        if difference:
            apply_difference(difference, top, commit=commit)
        # DVC commits the files of plots in an experiment, but refuses to run a stage whose outputs git tracks
        git(clone, "rm", "-r", "--cached", "--quiet", "--ignore-unmatch", "--", str(ARTIFACTS))
        params: Mapping[str, Any] = read_yaml(clone / PARAMS_FILE)
        return params

    # PIPELINE_FLOW_RUN_ID is empty, but set: `pipeline.core.errors` then knows that this is not the user's checkout
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
    """Make an empty clone, call `fill`, which checks the files out and returns the parameters, and start DVC in it.

    `fill` receives the clone of the whole repository and the project's folder in it; both are the same unless the
    project is a folder of a larger repository.
    """
    repository, subfolder = find_repository(project)
    with make_folder(project, name) as (folder, lock):
        top = folder / "clone"
        clone = top / subfolder
        git(project, "clone", "--quiet", "--shared", "--no-checkout", str(repository), str(top))
        params = fill(top, clone)
        _link_local_files(project, clone, params)
        environment = stage_environment(project, folder, variables=variables)
        with (
            _keep_clone(top, project / KEPT_CLONES / name, keep=keep),
            start_dvc(clone, project=project, environment=environment, lock=lock) as dvc,
        ):
            yield Workspace(clone, folder=folder, experiment=experiment, environment=environment, dvc=dvc)


@contextmanager
def _keep_clone(clone: Path, target: Path, *, keep: Keep) -> Iterator[None]:
    """Move the clone to `target` at the end of the block: always, on failure or never, by the value of `keep`."""
    must_keep = keep == "always"
    try:
        yield
    except BaseException:
        must_keep = keep != "never"
        raise
    finally:
        if must_keep:
            shutil.rmtree(target, ignore_errors=True)  # the clone of an earlier attempt of the same flow run
            target.parent.mkdir(parents=True, exist_ok=True)
            clone.rename(target)


def _link_local_files(project: Path, clone: Path, params: Mapping[str, Any]) -> None:
    """Link the files that parameters name by a relative path into the clone, where the clone does not have them.

    Raises UserError where a path leads out of the project.
    """
    for name in _local_files(project, params):
        _link(project / name, clone / name)


def check_local_files(project: Path, params: Mapping[str, Any]) -> list[str]:
    """Return the relative paths in the parameters that exist.

    Raises UserError where one leads out of the project, since the clone would not have it, and where the folder of
    images does not exist: it is a dependency in dvc.yaml with every data set.
    """
    check_is_folder(project / params["download"]["folder"])
    return _local_files(project, params)


def _local_files(project: Path, params: Mapping[str, Any]) -> list[str]:
    """Return the relative paths in the parameters that exist; raises UserError where one leads out of the project."""
    named = [params["download"]["folder"], *params["download"]["urls"], params["train"]["weights"]]
    local = [name for name in named if name and "://" not in name and not Path(name).is_absolute()]
    found = [name for name in local if (project / name).exists()]
    for name in found:
        source = project / name
        if not source.resolve().is_relative_to(project) and ".." in Path(name).parts:
            raise UserError(
                f"{PARAMS_FILE}: found the path {name!r}, which leads out of the project; allowed: a path inside, or "
                f"an absolute one: {source.resolve()}"
            )
    return found


def _link(source: Path, target: Path) -> None:
    """Link `target` to `source`; where both are folders, link the files that are missing in `target`."""
    if target.is_dir() and source.is_dir():
        _link_files(source, target)
    elif not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source)


def _link_files(source: Path, target: Path) -> None:
    """Make folders with links to the files in `source`; DVC does not hash what is in a folder that is itself a link."""
    for entry in os.scandir(source):
        copy = target / entry.name
        if entry.is_dir(follow_symlinks=False):
            copy.mkdir(exist_ok=True)
            _link_files(Path(entry.path), copy)
        elif not os.path.lexists(copy):
            copy.symlink_to(entry.path)


def stage_environment(project: Path, folder: Path, *, variables: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables of a flow run's DVC process and stages; `folder` is the folder of its clone.

    The addresses of notifications, which may have a password, are left out.
    """
    inherited = {name: value for name, value in git_environment().items() if name not in NOTIFY_ADDRESSES}
    return {
        # seconds between updates of DVC's progress bars: each update is a line in the flow run's log
        "TQDM_MININTERVAL": "5",
        **git_identity(project),
        **inherited,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PIPELINE_PYTHON": sys.executable,  # for ./python; older commits use the PATH
        "SHELL": "/bin/sh",
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
        "MLFLOW_TRACKING_URI": tracking_uri(project),
        **_index_folder(folder),
        RESULT_FILE: str(folder / RESULT),
        PROGRESS_FILE: str(folder / PROGRESS),
        "PIPELINE_PROJECT": str(project),
        "PIPELINE_CACHE_DIR": str(pipeline_cache_folder(project)),
        **variables,
    }


def _index_folder(folder: Path) -> dict[str, str]:
    """Return the variable that puts DVC's index of the clone into `folder`, which is removed after the run.

    By default DVC stores it elsewhere, and never removes it. The default stays if the path contains a `$NAME`, since a
    library of DVC would replace that by the value of the variable.
    """
    index = str(folder / "index")
    return {} if os.path.expandvars(index) != index else {"DVC_SITE_CACHE_DIR": index}


def existing_store(project: Path) -> str | None:
    """Return `tracking_uri`, or None where it is a sqlite file that does not exist yet."""
    uri = tracking_uri(project)
    path = sqlite_path(uri)
    return uri if path is None or path.exists() else None
