"""The DVC process of a workspace: it executes the requests of the flow run (`dvc_protocol`), one at a time.

`dvc_client` starts it as `python -m flows.dvc_worker CLONE`. It leads a process group, which its stages belong to. On
SIGTERM it waits until the stage has ended; if its parent dies, it ends the stage.
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

# URL of a DVC remote to pull files from and to push them to: for a project folder that is deleted after the run
REMOTE_VARIABLE = "PIPELINE_DVC_REMOTE"
REMOTE_NAME = "shared"
VARIABLES_AT_START = frozenset(os.environ)


class CommandError(StageCmdFailedError):  # type: ignore[misc]  # DVC ships no types
    """DVC's error for a failed command of a stage, with the exit status as a number; DVC has it in the message only."""

    def __init__(self, command: str, status: int | None = None) -> None:
        super().__init__(command, status)
        self.status = 1 if status is None else status


class _DvcLog(logging.Handler):
    """A log handler that prints DVC's warnings and progress, and records whether DVC ran a command.

    DVC states only in its log whether it ran a command or restored the outputs from its cache.
    """

    command_ran = False

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        self.command_ran = self.command_ran or message.startswith("Running stage")
        if message.startswith("Some of the cache files do not exist"):
            return  # no need to warn: DVC then runs the stage
        if record.levelno >= logging.WARNING or message.startswith(("Stage ", "> ")):
            short = message.removeprefix("> ").removesuffix(" - skipping run, checking out outputs")
            print(f"dvc: {short}", flush=True)


DVC_LOG = _DvcLog(logging.INFO)


def configure(clone: Path, *, project: Path) -> None:
    """Write the clone's DVC configuration, by which it uses the cache and the remotes of the project."""
    settings = Config(dvc_dir=str(project / ".dvc"))
    local = settings.load_one("local")
    local["cache"]["dir"] = settings.get("cache", {}).get("dir") or str(project / ".dvc" / "cache")
    for name, remote in settings["remote"].items():
        local["remote"].setdefault(name, {})["url"] = str(remote["url"])
    if url := os.environ.get(REMOTE_VARIABLE):
        local["remote"][REMOTE_NAME] = {"url": url}
        local["core"]["remote"] = REMOTE_NAME
    _write_config(local, clone / ".dvc" / Config.CONFIG_LOCAL)


def _write_config(config: dict[str, Any], path: Path) -> None:
    """Write a configuration as `Config.load_one` returns it; DVC's `Config.edit` fails on a path that is not ASCII."""
    named = {
        f'{kind} "{name}"': values for kind in ("remote", "machine", "db") for name, values in config[kind].items()
    }
    sections = {name: values for name, values in config.items() if name not in ("remote", "machine", "db")} | named
    file = ConfigObj({name: values for name, values in sections.items() if values}, encoding="utf-8")
    file.filename = str(path)
    file.write()


def set_wait_policy(clone: Path, *, project: Path) -> None:
    """Let a stage's OpenMP threads sleep while they wait for one another, if other flow runs are running here.

    By default the threads spin, which is twice as fast for a single run, but many times as slow for several at once.
    A policy that the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in VARIABLES_AT_START:
        os.environ.pop("OMP_WAIT_POLICY", None)
        if set(in_use(project)) - {clone.relative_to((project / FOLDER).resolve()).parts[0]}:
            os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def reproduce(repo: Any, stage: str) -> Answer:
    """Bring one stage up to date: from the cache where DVC has its outputs, else by its command."""
    DVC_LOG.command_ran = False
    set_wait_policy(Path(repo.root_dir), project=Path(os.environ["PIPELINE_PROJECT"]))
    stages = repo.reproduce(targets=[stage], single_item=True, pull=REMOTE_VARIABLE in os.environ)
    return Answer("ran" if DVC_LOG.command_ran else "restored" if stages else "unchanged")


def rerun(repo: Any, stage: str) -> Answer:
    """Run the command of one stage even where its outputs are cached; the new outputs are not added to the cache."""
    repo.reproduce(targets=[stage], single_item=True, force=True, no_commit=True)
    return Answer("ran")


def restore(repo: Any, recorded: str) -> Answer:
    """Restore an output from DVC's cache, else from a remote; `recorded` is its path and MD5, as "PATH MD5"."""
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
    """Push the experiment `name` from the clone into the project."""
    result = repo.experiments.push("origin", [name], push_cache=False)
    if name not in result.get("success", []) + result.get("up_to_date", []):
        reason = "the project has another experiment of this name; run the same command again"
        return Answer(status=1, reason=reason)
    if REMOTE_VARIABLE in os.environ:
        _push_to_remotes(repo, name)
    return Answer()


def _push_to_remotes(repo: Any, name: str) -> None:
    """Push files and run cache to the shared remote, and the experiment to the git URL of the project's clone."""
    repo.push(run_cache=True)
    # the run cache refers to outputs that git tracks too, which `repo.push` leaves out
    repo.cloud.push([out.hash_info for out in repo.index.outs if not out.use_cache and out.hash_info])
    with Repo(os.environ["PIPELINE_PROJECT"]) as project:
        project.experiments.push("origin", [name], push_cache=False)


ACTIONS: dict[Action, Callable[[Any, str], Answer]] = {
    "reproduce": reproduce,
    "rerun": rerun,
    "restore": restore,
    "save": save,
    "push": push,
}


def handle(repo: Any, request: Request) -> Answer:
    """Execute a request and return its answer; an error of DVC or git becomes an answer with a reason."""
    try:
        return ACTIONS[request.action](repo, request.argument)
    except (DvcException, SCMError) as error:
        return _failure(error)


def _failure(error: Exception) -> Answer:
    """Return the answer for an error; a failed command has printed its own reason."""
    cause = error.__cause__ or error
    if isinstance(cause, CommandError):
        return Answer(status=cause.status)
    return Answer(status=EXIT_USER, reason=" ".join(f"{error} {'' if cause is error else cause}".split()))


class _SigtermHandler:
    """A handler that records SIGTERM in `received`; if no stage is running, it ends the process at once."""

    def __init__(self) -> None:
        self.received = False
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        self.received = True
        if not psutil.Process().children():
            os._exit(128 + signum)


def _end_group() -> None:
    """End this process and its stage, after the flow run that started them has died."""
    os.killpg(0, signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os.killpg(0, signal.SIGKILL)


def _take_stdin() -> IO[str]:
    """Return a stream of the requests, and let stdin be empty for the stages, which would read the requests."""
    stream = os.fdopen(os.dup(0), encoding="utf-8")
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    return stream


def _send(message: Answer) -> None:
    print(message.to_line(), end="", flush=True)


def main() -> None:
    """Handle requests until stdin ends or SIGTERM comes."""
    clone, project = Path(sys.argv[1]), Path(os.environ["PIPELINE_PROJECT"])
    sigterm = _SigtermHandler()
    call_at_parent_end(_end_group)
    requests = _take_stdin()
    dvc.stage.run.StageCmdFailedError = CommandError
    logger = logging.getLogger("dvc")
    logger.handlers, logger.propagate = [DVC_LOG], False
    logger.setLevel(logging.INFO)
    logging.getLogger("dvc_data").setLevel(logging.ERROR)  # DVC repeats its warnings
    configure(clone, project=project)
    os.chdir(clone)
    with Repo(str(clone)) as repo:
        for line in requests:
            _send(handle(repo, Request.from_line(line)))
            if sigterm.received:
                break


if __name__ == "__main__":
    if os.getpgrp() != os.getpid():
        sys.exit("error: flows.dvc_worker ends its whole process group: start it with start_new_session=True")
    try:
        main()
    except (DvcException, SCMError) as error:
        _send(Answer(status=EXIT_USER, reason=" ".join(str(error).split())))
