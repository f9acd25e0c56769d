"""The DVC process of a workspace: does with DVC what the flow run asks for (`dvc_protocol`), one request at a time.

`python -m flows.dvc_worker CLONE`, started by `dvc_client`. It leads a process group with the stages in it. On SIGTERM
it lives on until the stage has ended; if its parent dies, it ends the stage.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import IO, Any

import dvc.stage.run
import psutil
from configobj import ConfigObj
from dvc.config import Config
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.stage.exceptions import StageCmdFailedError
from dvc_data.hashfile.hash_info import HashInfo
from scmrepo.exceptions import SCMError

from flows.dvc_protocol import GRACE_SECONDS, Action, Answer, Request
from flows.workspace_folders import FOLDER, in_use
from pipeline.core.errors import EXIT_USER
from pipeline.core.processes import call_at_parent_end

REMOTE_VARIABLE = "PIPELINE_DVC_REMOTE"
"""URL of a DVC remote to take files from and put them into: for a project that is thrown away after the run."""
REMOTE = "shared"
RECEIVED_VARIABLES = frozenset(os.environ)
"""The names of the variables that this process was started with."""


class CommandError(StageCmdFailedError):  # type: ignore[misc]  # DVC ships no types
    """DVC's error for a stage's command that failed, with the exit status (else only its message has it)."""

    def __init__(self, command: str, status: int | None = None) -> None:
        super().__init__(command, status)
        self.status = 1 if status is None else status


class _Lines(logging.Handler):
    """Prints DVC's warnings and progress, and remembers whether DVC ran a command: only its log says so."""

    ran = False

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        self.ran = self.ran or message.startswith("Running stage")
        if message.startswith("Some of the cache files do not exist"):
            return  # then the stage runs
        if record.levelno >= logging.WARNING or message.startswith(("Stage ", "> ")):
            print(f"dvc: {message.removeprefix('> ')}", flush=True)


LINES = _Lines(logging.INFO)


def configure(clone: Path, *, project: Path) -> None:
    """Let the clone use the project's cache and remotes, wherever the project's settings put them."""
    settings = Config(dvc_dir=str(project / ".dvc"))
    local = settings.load_one("local")
    local["cache"]["dir"] = settings.get("cache", {}).get("dir") or str(project / ".dvc" / "cache")
    for name, remote in settings["remote"].items():
        local["remote"].setdefault(name, {})["url"] = str(remote["url"])
    if url := os.environ.get(REMOTE_VARIABLE):
        local["remote"][REMOTE] = {"url": url}
        local["core"]["remote"] = REMOTE
    _write_config(local, clone / ".dvc" / Config.CONFIG_LOCAL)


def _write_config(config: dict[str, Any], path: Path) -> None:
    """Write what `Config.load_one` returned; `Config.edit` fails on a path that is not ASCII."""
    named = {
        f'{kind} "{name}"': values for kind in ("remote", "machine", "db") for name, values in config[kind].items()
    }
    sections = {name: values for name, values in config.items() if name not in ("remote", "machine", "db")} | named
    file = ConfigObj({name: values for name, values in sections.items() if values}, encoding="utf-8")
    file.filename = str(path)
    file.write()


def share_cores(clone: Path, *, project: Path) -> None:
    """While other flow runs are running here, let a stage's threads sleep where they wait for one another.

    By default they spin, which is twice as fast for a run that is alone, and many times as slow for runs side by side.
    """
    if "OMP_WAIT_POLICY" not in RECEIVED_VARIABLES:
        os.environ.pop("OMP_WAIT_POLICY", None)
        if set(in_use(project)) - {clone.relative_to((project / FOLDER).resolve()).parts[0]}:
            os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def reproduce(repo: Any, stage: str) -> Answer:
    """Reproduce one stage."""
    LINES.ran = False
    share_cores(Path(repo.root_dir), project=Path(os.environ["PIPELINE_PROJECT"]))
    stages = repo.reproduce(targets=[stage], single_item=True, pull=REMOTE_VARIABLE in os.environ)
    return Answer("ran" if LINES.ran else "restored" if stages else "unchanged")


def remake(repo: Any, stage: str) -> Answer:
    """Run one stage whatever DVC has of it, and keep what it makes out of the cache, whose files are the originals."""
    repo.reproduce(targets=[stage], single_item=True, force=True, no_commit=True)
    return Answer("ran")


def restore(repo: Any, recorded: str) -> Answer:
    """Put the content of this MD5 in an output's place, "PATH MD5": from DVC's cache, else from a remote."""
    path, _, md5 = recorded.rpartition(" ")
    [out] = repo.find_outs_by_path(path)
    out.hash_info = HashInfo("md5", md5)
    try:
        if out.changed_cache():
            for hashes in out.get_used_objs().values():
                repo.cloud.pull(hashes)
        out.checkout(force=True)
    except DvcException:
        return Answer("missing")
    return Answer("restored")


def save(repo: Any, name: str) -> Answer:
    """Save the clone's files as the experiment `name`."""
    uncached = [str(out.fs_path) for out in repo.index.outs if not out.use_cache and out.exists]
    repo.experiments.save(name=name, force=True, include_untracked=uncached)
    return Answer()


def push(repo: Any, name: str) -> Answer:
    """Bring the experiment `name` into the project."""
    result = repo.experiments.push("origin", [name], push_cache=False)
    if name not in result.get("success", []) + result.get("up_to_date", []):
        reason = f"experiment {name}: the project has another one of this name; run again"
        return Answer(status=1, reason=reason)
    if REMOTE_VARIABLE in os.environ:
        _share(repo, name)
    return Answer()


def _share(repo: Any, name: str) -> None:
    """Put files and run cache into the shared remote, and the experiment where the project was cloned from."""
    repo.push(run_cache=True)
    # what git keeps, DVC does not push, but its run cache wants it too
    repo.cloud.push([out.hash_info for out in repo.index.outs if not out.use_cache and out.hash_info])
    with Repo(os.environ["PIPELINE_PROJECT"]) as project:
        project.experiments.push("origin", [name], push_cache=False)


ACTIONS: dict[Action, Callable[[Any, str], Answer]] = {
    "reproduce": reproduce,
    "remake": remake,
    "restore": restore,
    "save": save,
    "push": push,
}


def answer(repo: Any, request: Request) -> Answer:
    """Do what is asked; a failure is an answer too."""
    try:
        return ACTIONS[request.action](repo, request.argument)
    except (DvcException, SCMError) as error:
        return _failure(error)


def _failure(error: Exception) -> Answer:
    cause = error.__cause__ or error
    if isinstance(cause, CommandError):
        return Answer(status=cause.status)
    return Answer(status=EXIT_USER, reason=" ".join(f"{error} {'' if cause is error else cause}".split()))


class _Stop:
    """SIGTERM: true from then on; where no stage runs, the process ends at once."""

    def __init__(self) -> None:
        self.came = False
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        self.came = True
        if not psutil.Process().children():
            os._exit(128 + signum)


def _end_group() -> None:
    """End this process and its stage, to whose output nobody listens any more."""
    os.killpg(0, signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os.killpg(0, signal.SIGKILL)


def _private_stdin() -> IO[str]:
    """Take stdin away from the stages, which would read the requests."""
    stream = os.fdopen(os.dup(0), encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return stream


def _send(message: Answer) -> None:
    print(message.to_line(), end="", flush=True)


def main() -> None:
    """Serve requests until stdin ends or SIGTERM comes."""
    clone, project = Path(sys.argv[1]), Path(os.environ["PIPELINE_PROJECT"])
    stop = _Stop()
    call_at_parent_end(_end_group)
    requests = _private_stdin()
    dvc.stage.run.StageCmdFailedError = CommandError
    logger = logging.getLogger("dvc")
    logger.handlers, logger.propagate = [LINES], False
    logger.setLevel(logging.INFO)
    logging.getLogger("dvc_data").setLevel(logging.ERROR)  # it warns of what DVC warns of too
    configure(clone, project=project)
    os.chdir(clone)
    with Repo(str(clone)) as repo:
        for line in requests:
            _send(answer(repo, Request.from_line(line)))
            if stop.came:
                break


if __name__ == "__main__":
    if os.getpgrp() != os.getpid():
        sys.exit("error: flows.dvc_worker ends its whole process group: start it with start_new_session=True")
    try:
        main()
    except (DvcException, SCMError) as error:
        _send(Answer(status=EXIT_USER, reason=" ".join(str(error).split())))
