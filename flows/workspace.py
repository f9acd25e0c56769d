"""A throw-away clone of the checkout, in which one flow run reproduces the stages and saves them as an experiment.

It lies in `.dvc/tmp/flows/`, on the file system of the DVC cache, so that files can be linked rather than copied, and
next to a lock file, held while the flow run or its stages live.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from pipeline.core.errors import UserError
from pipeline.core.git import check_committed, git, read_committed, setting
from pipeline.core.git import environment as git_environment
from pipeline.core.project import pipeline_cache_folder
from pipeline.core.sqlite import sqlite_path
from pipeline.core.yaml import read_yaml
from pipeline.params import PARAMS_FILE, check_is_folder
from pipeline.tracking.store_uri import tracking_uri

FOLDER = Path(".dvc/tmp/flows")
KEPT = Path(".dvc/tmp/kept")
"""Where clones lie that the user asked to keep."""
MARK = "\x1e"
"""First character of an answer among the lines of the DVC process."""
GRACE_SECONDS = 10
"""Between SIGTERM and SIGKILL."""
EXPERIMENT_LABEL = "dvc.experiment"
"""Label of a flow run in Prefect."""
COMMITTED_PARAMS = "committed_params.yaml"
_MLFLOW_RUN = re.compile(r"MLflow run ([0-9a-f]{32})\s*")

Keep = Literal["never", "failed", "always"]
"""Whether a clone is moved to KEPT when it is left."""
Outcome = Literal["ran", "restored", "unchanged"]
"""What became of a stage: its command ran, its files came from DVC's cache, or they were there already."""


class StepError(RuntimeError):
    """A stage that failed, told in one line; `status` is its exit status."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class Workspace:
    """An open clone; `folder` is where its files are until `open_workspace` is left.

    `committed_params` is a copy of params.yaml as committed; `mlflow_run_id` is known once a stage has told it.
    """

    def __init__(
        self, folder: Path, *, committed_params: Path, experiment: str, process: subprocess.Popen[str]
    ) -> None:
        self.folder = folder
        self.committed_params = committed_params
        self.experiment = experiment
        self.mlflow_run_id: str | None = None
        self._process = process

    def reproduce(
        self,
        stage: str,
        *,
        on_line: Callable[[str], None],
        again: bool = False,
        slot: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> Outcome:
        """Bring one stage up to date, its output going to `on_line` as it comes; raises StepError.

        `again`: run it whatever DVC has of it, and leave DVC's cache as it is. `slot` is entered before the stage's
        command starts, if it has to run at all, and left when it has ended.
        """
        errors: list[str] = []

        def listen(line: str) -> None:
            if line.startswith("error: "):
                errors[:] = [line.removeprefix("error: ")]
            if found := _MLFLOW_RUN.fullmatch(line):
                self.mlflow_run_id = found[1]
            on_line(line)

        reply = self._ask({"remake" if again else "reproduce": stage}, on_line=listen, slot=slot)
        if "status" not in reply:
            outcome: Outcome = reply["outcome"]
            return outcome
        status = reply["status"]
        reason = reply["error"] or "".join(errors) or f"{_how_it_ended(status)}; its output stands above"
        raise StepError(f"{stage}: {reason}", status=status)

    def restore(self, path: Path, md5: str) -> bool:
        """Put an output's recorded content in its place; False where neither cache nor remote has it.

        Raises StepError where that could not be found out.
        """
        reply = self._ask({"restore": f"{path} {md5}"}, on_line=lambda _line: None)
        if "status" in reply:
            raise StepError(f"{path}: {reply['error']}", status=reply["status"])
        return bool(reply["outcome"] == "restored")

    def save(self, *, on_line: Callable[[str], None]) -> None:
        """Save the files as the experiment and bring that into the checkout's list; raises StepError."""
        for action in ("save", "push"):
            reply = self._ask({action: self.experiment}, on_line=on_line)
            if "status" in reply:
                raise StepError(f"experiment {self.experiment}: {reply['error']}", status=reply["status"])

    def _ask(
        self,
        request: Mapping[str, str],
        *,
        on_line: Callable[[str], None],
        slot: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> dict[str, Any]:
        """Send a request; pass lines on until the answer comes (or the process ends)."""
        assert self._process.stdout
        self._send(request)
        with contextlib.ExitStack() as while_it_runs:
            for line in self._process.stdout:
                if line.startswith(MARK):
                    reply: dict[str, Any] = json.loads(line.removeprefix(MARK))
                    if "starting" not in reply:
                        return reply
                    while_it_runs.enter_context(slot())
                    self._send({"start": reply["starting"]})
                elif text := line.rstrip():
                    on_line(text)
        return {"status": 1, "error": f"the DVC process {_how_it_ended(self._process.wait())}"}

    def _send(self, message: Mapping[str, str]) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()


def _how_it_ended(status: int) -> str:
    number = -status if status < 0 else status - 128
    if number in {int(member) for member in signal.Signals}:
        hint = " (out of memory?)" if number == signal.SIGKILL else ""
        return f"was ended by {signal.Signals(number).name}{hint}"
    return f"ended with exit status {status}"


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
            _apply(difference, top, commit=commit)
        params: Mapping[str, Any] = read_yaml(clone / PARAMS_FILE)
        return params

    # without a flow run, but `pipeline.core.errors` is to know that this is no checkout of the user's
    variables = {"PIPELINE_EXPERIMENT": "", "PIPELINE_FLOW_RUN_ID": "", **variables}
    with _open(project, name=name, fill=fill, experiment="", variables=variables, keep=keep) as workspace:
        yield workspace


def _apply(difference: bytes, top: Path, *, commit: str) -> None:
    patch = top.parent / "uncommitted.diff"
    patch.write_bytes(difference)
    try:
        git(top, "apply", "--index", "--whitespace=nowarn", str(patch))
    except UserError as error:
        raise UserError(f"the recorded changes do not apply to commit {commit}: {error}") from None


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
    """A clone in a folder of its own, in which `fill` puts the files and gives the parameters, and its DVC process.

    Where the project is a folder of a larger repository, `fill` gets the clone of that and the project's folder in it.
    """
    repository, subfolder = find_repository(project)
    with _own_folder(project, name) as (folder, lock):
        top = folder / "clone"
        clone = top / subfolder
        git(project, "clone", "--quiet", "--shared", "--no-checkout", str(repository), str(top))
        params = fill(top, clone)
        committed = read_committed(clone, "HEAD", str(PARAMS_FILE)) or "{}"
        (folder / COMMITTED_PARAMS).write_text(committed, encoding="utf-8")
        _link_local_files(project, clone, params)
        environment = stage_environment(project, folder, variables=variables)
        process = _start(clone, project=project, environment=environment, lock=lock)
        kept = keep == "always"
        try:
            yield Workspace(clone, committed_params=folder / COMMITTED_PARAMS, experiment=experiment, process=process)
        except BaseException:
            kept = keep != "never"
            raise
        finally:
            _stop(process)
            if kept:
                shutil.rmtree(project / KEPT / name, ignore_errors=True)  # of an earlier try of the same flow run
                (project / KEPT).mkdir(parents=True, exist_ok=True)
                top.rename(project / KEPT / name)


def take_snapshot(project: Path) -> str:
    """The commit of HEAD with the uncommitted changes to tracked files; neither files nor index are touched.

    Raises UserError as `check_checkout` does.
    """
    check_checkout(project)
    changes = git(project, "stash", "create")
    return changes or git(project, "rev-parse", "HEAD")


def check_checkout(project: Path) -> None:
    """Raises UserError where no clone can be made: in a read-only folder, without a commit, in a merge."""
    find_repository(project)
    if not os.access(project, os.W_OK):
        raise UserError(f"{project}: this user cannot write there; make the folder writable, or clone the repository")
    if not (project / ".dvc" / "config").exists():
        raise UserError(f"{project}: not a DVC repository; run `dvc init` and commit .dvc/config")
    check_committed(project, "dvc.yaml")
    if unmerged := git(project, "diff", "--name-only", "--diff-filter=U"):
        raise UserError(f"{', '.join(unmerged.split())}: merge conflict; resolve it or run `git merge --abort`")
    changed = git(project, "status", "--porcelain", "--untracked-files=no")
    if changed and git(project, "rev-parse", "--is-shallow-repository") == "true":
        raise UserError(
            f"{project}: a shallow clone with uncommitted changes; run `git fetch --unshallow`, or commit them"
        )


def find_repository(project: Path) -> tuple[Path, Path]:
    """The top folder of the git repository, and the project's folder relative to it: `.`, or one of a larger one.

    Raises UserError where there is none, or git refuses to use it.
    """
    top, subfolder = git(project, "rev-parse", "--show-toplevel", "--show-prefix").partition("\n")[::2]
    return Path(top), Path(subfolder)


def untracked_files(project: Path) -> list[str]:
    """Files that are neither tracked nor ignored: they do not come along."""
    return git(project, "ls-files", "--others", "--exclude-standard").splitlines()


def experiment_name(project: Path, *wishes: str) -> str:
    """The first of `wishes`, made valid for git refs, that no experiment of the project has."""
    refs = git(project, "for-each-ref", "--format=%(refname)", "refs/exps")
    taken = {ref.rpartition("/")[2] for ref in refs.split()}
    names = [re.sub(r"[^0-9A-Za-z]+", "-", wish).strip("-") for wish in wishes]
    return next((name for name in names if name not in taken), names[-1])


def git_identity(project: Path) -> dict[str, str]:
    """Who commits, as environment variables: the user as git knows them, or a stand-in, for DVC needs one."""
    name, email = setting(project, "user.name") or "flow", setting(project, "user.email") or "flow@localhost"
    roles = {"AUTHOR", "COMMITTER"}
    return {f"GIT_{role}_NAME": name for role in roles} | {f"GIT_{role}_EMAIL": email for role in roles}


@contextmanager
def _own_folder(project: Path, name: str) -> Iterator[tuple[Path, IO[str]]]:
    """A new folder and the lock file that says it is in use; removes those whose users are dead."""
    parent = project / FOLDER
    parent.mkdir(parents=True, exist_ok=True)
    folder, lock_path = parent / name, parent / f"{name}.lock"
    with _all_workspaces(project):
        _remove(_leftovers(project))
        folder.mkdir()
        lock = lock_path.open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    with lock:
        try:
            yield folder, lock
        finally:
            shutil.rmtree(folder)
            lock_path.unlink()


@contextmanager
def _all_workspaces(project: Path) -> Iterator[None]:
    """Between the making of a folder and of its lock, nobody must take it for a left-over."""
    with (project / FOLDER / "lock").open("w") as everything:
        fcntl.flock(everything, fcntl.LOCK_EX)
        yield


def is_held(project: Path, name: str) -> bool:
    """Whether a flow run or its stages live in the workspace of this name."""
    try:
        with (project / FOLDER / f"{name}.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def in_use(project: Path) -> list[str]:
    """The names of the workspaces in which flow runs or their stages live."""
    return [lock.stem for lock in (project / FOLDER).glob("*.lock") if is_held(project, lock.stem)]


def _leftovers(project: Path) -> list[Path]:
    """The folders whose lock nobody holds: those of killed flow runs."""
    folders = (path for path in (project / FOLDER).glob("*") if path.is_dir())
    return [folder for folder in folders if not is_held(project, folder.name)]


def find_leftovers(project: Path) -> list[str]:
    """The names of the workspaces that killed flow runs left."""
    if not (project / FOLDER).is_dir():
        return []
    with _all_workspaces(project):
        return [folder.name for folder in _leftovers(project)]


def remove_leftovers(project: Path) -> list[str]:
    """Remove what killed flow runs left; returns the names."""
    if not (project / FOLDER).is_dir():
        return []
    with _all_workspaces(project):
        return _remove(_leftovers(project))


def _remove(folders: Sequence[Path]) -> list[str]:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_name(f"{folder.name}.lock").unlink(missing_ok=True)
    return [folder.name for folder in folders]


def _link_local_files(project: Path, clone: Path, params: Mapping[str, Any]) -> None:
    """Let the clone see the files that parameters name by a relative path and git does not track.

    Raises UserError as `check_local_files` does, but for the folder of images.
    """
    for name in _local_files(project, params):
        _link(project / name, clone / name)


def check_local_files(project: Path, params: Mapping[str, Any]) -> list[str]:
    """The relative paths in the parameters that exist.

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
    """A link where the clone has nothing, else links to the files that it lacks."""
    if target.is_dir() and source.is_dir():
        _link_files(source, target)
    elif not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source)


def _link_files(source: Path, target: Path) -> None:
    """Real folders with links to files: DVC, hashing a folder, does not enter a folder below that is a link."""
    for entry in os.scandir(source):
        place = target / entry.name
        if entry.is_dir(follow_symlinks=False):
            place.mkdir(exist_ok=True)
            _link_files(Path(entry.path), place)
        elif not os.path.lexists(place):
            place.symlink_to(entry.path)


def stage_environment(project: Path, folder: Path, *, variables: Mapping[str, str]) -> dict[str, str]:
    """Environment variables for DVC and the stages of one flow run, `variables` among them; `folder` is its own."""
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
    """`tracking_uri`, or None where that is a sqlite file which no run has made yet."""
    uri = tracking_uri(project)
    path = sqlite_path(uri)
    return uri if path is None or path.exists() else None


def _start(clone: Path, *, project: Path, environment: Mapping[str, str], lock: IO[str]) -> subprocess.Popen[str]:
    """The DVC process, leader of a process group; it holds the lock too, should the flow's process be killed."""
    return subprocess.Popen(
        [sys.executable, "-m", "flows.dvc_worker", str(clone)],
        cwd=project,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        pass_fds=[lock.fileno()],
        start_new_session=True,
    )


@contextmanager
def _deaf_to_sigterm() -> Iterator[None]:
    """A second SIGTERM, while the first is being handled, is not to cut short what that one began."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _stop(process: subprocess.Popen[str]) -> None:
    """End the process group: SIGTERM, time to put things in order, SIGKILL."""
    try:
        with _deaf_to_sigterm(), contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGTERM)
            process.communicate(timeout=GRACE_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
