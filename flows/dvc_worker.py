"""DVC in a process of its own: reproduces stages of a clone, one request after the other.

`python -m flows.dvc_worker CLONE` reads JSON requests, one a line, from stdin, and answers each with one line on stdout
that begins with MARK; all other lines are the output of the stages and of DVC. Before it runs a stage's command, rather
than take the stage's files from the cache, it says so, `{"starting": stage}`, and waits for a line. It leads a process
group with the stages in it: on SIGTERM it lives on until the stage has ended, and if its parent dies, it ends the
stage.
"""

import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import IO, Any

import psutil
from configobj import ConfigObj
from dvc.config import Config
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.stage.exceptions import StageCmdFailedError
from dvc_data.hashfile.hash_info import HashInfo
from scmrepo.exceptions import SCMError

from flows.workspace import FOLDER, GRACE_SECONDS, MARK, in_use
from pipeline.core.errors import EXIT_USER

REMOTE_VARIABLE = "PIPELINE_DVC_REMOTE"
"""URL of a DVC remote to take files from and put them into: for a project that is thrown away after the run."""
REMOTE = "shared"
GIVEN = frozenset(os.environ)
"""The names of the variables that this process was started with."""


class _Lines(logging.Handler):
    """Prints what DVC has to say, remembers whether it ran a command, and calls `on_start` just before it does.

    DVC tells that a command is about to run on the thread that will run it, and has let go of its lock by then.
    """

    ran = False
    on_start: Callable[[str], None] = staticmethod(lambda stage: None)

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("Running stage"):
            self.ran = True
            self.on_start(str(record.args[0] if isinstance(record.args, tuple) and record.args else ""))
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
    """While other flow runs go on here, let a stage's threads sleep where they wait for one another.

    By default they spin, which is twice as fast for a run that is alone, and many times as slow for runs side by side.
    """
    if "OMP_WAIT_POLICY" not in GIVEN:
        os.environ.pop("OMP_WAIT_POLICY", None)
        if set(in_use(project)) - {clone.relative_to((project / FOLDER).resolve()).parts[0]}:
            os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def reproduce(repo: Any, stage: str) -> dict[str, Any]:
    """Reproduce one stage; the outcome is ran, restored (from the cache) or unchanged."""
    LINES.ran = False
    share_cores(Path(repo.root_dir), project=Path(os.environ["PIPELINE_PROJECT"]))
    stages = repo.reproduce(targets=[stage], single_item=True, pull=REMOTE_VARIABLE in os.environ)
    return {"outcome": "ran" if LINES.ran else "restored" if stages else "unchanged"}


def remake(repo: Any, stage: str) -> dict[str, Any]:
    """Run one stage whatever DVC has of it, and keep what it makes out of the cache, whose files are the originals."""
    repo.reproduce(targets=[stage], single_item=True, force=True, no_commit=True)
    return {"outcome": "ran"}


def restore(repo: Any, recorded: str) -> dict[str, Any]:
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
        return {"outcome": "missing"}
    return {"outcome": "restored"}


def save(repo: Any, name: str) -> dict[str, Any]:
    """Save the clone's files as the experiment `name`."""
    uncached = [str(out.fs_path) for out in repo.index.outs if not out.use_cache and out.exists]
    return {"commit": repo.experiments.save(name=name, force=True, include_untracked=uncached)}


def push(repo: Any, name: str) -> dict[str, Any]:
    """Bring the experiment `name` into the project."""
    result = repo.experiments.push("origin", [name], push_cache=False)
    if name not in result.get("success", []) + result.get("up_to_date", []):
        return {"status": 1, "error": f"experiment {name}: the project has another one of this name; run again"}
    if REMOTE_VARIABLE in os.environ:
        _share(repo, name)
    return {}


def _share(repo: Any, name: str) -> None:
    """Put files and run cache into the shared remote, and the experiment where the project was cloned from."""
    repo.push(run_cache=True)
    # what git keeps, DVC does not push, but its run cache wants it too
    repo.cloud.push([out.hash_info for out in repo.index.outs if not out.use_cache and out.hash_info])
    with Repo(os.environ["PIPELINE_PROJECT"]) as project:
        project.experiments.push("origin", [name], push_cache=False)


ACTIONS: dict[str, Callable[[Any, str], dict[str, Any]]] = {
    "reproduce": reproduce,
    "remake": remake,
    "restore": restore,
    "save": save,
    "push": push,
}


def answer(repo: Any, request: dict[str, str]) -> dict[str, Any]:
    """Do what is asked; a failure is an answer too: {"status": exit status, "error": one line or nothing}."""
    [(action, argument)] = request.items()
    try:
        return ACTIONS[action](repo, argument)
    except (DvcException, SCMError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, StageCmdFailedError):
            return {"status": _status(str(cause)), "error": ""}
        return {"status": EXIT_USER, "error": " ".join(f"{error} {'' if cause is error else cause}".split())}


def _status(message: str) -> int:
    """DVC tells the exit status of a command in words only; a negative one is a signal's number."""
    status = message.rpartition("exited with ")[2]
    return int(status) if status.lstrip("-").isdigit() else 1


class _Requests:
    """Reads requests on a thread, so that the parent's death shows at once, in the middle of a stage too."""

    def __init__(self, stream: IO[str]) -> None:
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._busy = threading.Event()
        self._stopping = False
        signal.signal(signal.SIGTERM, self._stop)
        threading.Thread(target=self._read, args=[stream], daemon=True).start()

    def next(self) -> dict[str, str] | None:
        self._busy.clear()
        line = None if self._stopping else self._lines.get()
        self._busy.set()
        return None if line is None else json.loads(line)

    def wait_to_start(self, stage: str) -> None:
        """Return once the parent lets the stage's command start; end where the parent has ended."""
        print(f"\n{MARK}{json.dumps({'starting': stage})}", flush=True)
        if self._lines.get() is None:
            os._exit(1)

    def _stop(self, signum: int, _frame: FrameType | None) -> None:
        self._stopping = True
        if not psutil.Process().children():
            os._exit(128 + signum)

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._lines.put(line)
        self._lines.put(None)
        if self._busy.is_set() and not self._stopping:
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


def main() -> None:
    """Serve requests until stdin ends."""
    clone, project = Path(sys.argv[1]), Path(os.environ["PIPELINE_PROJECT"])
    requests = _Requests(_private_stdin())
    logger = logging.getLogger("dvc")
    logger.handlers, logger.propagate = [LINES], False
    LINES.on_start = requests.wait_to_start
    logger.setLevel(logging.INFO)
    logging.getLogger("dvc_data").setLevel(logging.ERROR)  # tells the same
    configure(clone, project=project)
    os.chdir(clone)
    with Repo(str(clone)) as repo:
        while request := requests.next():
            print(f"\n{MARK}{json.dumps(answer(repo, request))}", flush=True)


if __name__ == "__main__":
    if os.getpgrp() != os.getpid():
        sys.exit("error: flows.dvc_worker ends its whole process group: start it with start_new_session=True")
    try:
        main()
    except (DvcException, SCMError) as error:
        print(f"\n{MARK}{json.dumps({'status': EXIT_USER, 'error': ' '.join(str(error).split())})}", flush=True)
