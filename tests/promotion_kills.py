"""Kill a promotion by SIGKILL at each of its points, and check that the next start makes everything agree again.

`python -m tests.promotion_kills [--points N] [--reads]` kills at N points, by default at all, and prints a line for
each. A point is a moment before the promotion writes: an SQL statement that changes the database, its commit, a file
that is opened to be written, a rename, or a change of git's refs; with `--reads`, also one before it reads a database.
"""

import argparse
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import chdir, suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine

from flows.champion_ref import read_ref
from flows.promotion import promote_version, roll_back
from flows.promotion_change import complete, read_pending
from flows.promotion_ledger import history, read_looks
from pipeline.core.errors import UserError
from pipeline.tracking.registry import CHAMPION, PREVIOUS, find_versions, version_of_alias
from pipeline.tracking.store import connect
from tests.conftest import PROJECT, make_mlflow_store, params
from tests.promotion_project import NAME, make_contest

WRITES = ("INSERT", "UPDATE", "DELETE", "REPLACE")
READS = ("SELECT",)
FILES = ("os.rename", "os.remove")
CONTEXT = multiprocessing.get_context("forkserver")  # imports once
CONTEXT.set_forkserver_preload(["tests.promotion_project"])


class Points:
    """Counts the points that this process reaches, and ends it by SIGKILL before the one of number `last`."""

    def __init__(self, last: int | None, journal: Path, *, with_reads: bool) -> None:
        self.statements = WRITES + READS if with_reads else WRITES
        self.last, self.journal, self.count = last, journal.open("a", buffering=1), 0
        self.has_written = False  # since the last commit
        event.listen(Engine, "before_cursor_execute", self._statement)
        event.listen(Engine, "commit", self._commit)
        sys.addaudithook(self._audit)

    def reach(self, what: str) -> None:
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(self.journal.fileno(), f"{what}\n".encode())

    def _statement(self, _connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        text = statement.lstrip().upper()
        if text.startswith(self.statements):
            self.reach(" ".join(statement.split()[:3]))
        self.has_written = self.has_written or text.startswith(WRITES)

    def _commit(self, _connection: Any) -> None:
        if self.has_written:
            self.reach("commit")
            self.has_written = False

    def _audit(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name in FILES:
            self.reach(f"{name} {arguments[:2]!r:.100}")
        elif name == "subprocess.Popen" and "update-ref" in arguments[1]:
            self.reach("git update-ref")
        elif name == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            self.reach(f"open {arguments[0]!r:.60} {arguments[1]}")


def promote_in(project: Path, number: str, *, last: int | None, journal: Path, with_reads: bool = False) -> None:
    """Promote a version in a process of its own, which dies before the point of number `last`."""
    enter(project)
    [version] = [one for one in find_versions(NAME) if one.number == number]
    Points(last, journal, with_reads=with_reads)
    promote_version(project, version, params=params(), is_dry_run=False, log=print)


def roll_back_in(project: Path, number: str, *, last: int | None, journal: Path, with_reads: bool = False) -> None:
    """Roll back in a process of its own, which dies before the point of number `last`."""
    enter(project)
    Points(last, journal, with_reads=with_reads)
    roll_back(project, NAME, log=print)


def complete_in(project: Path, number: str, *, last: int | None, journal: Path, with_reads: bool = False) -> None:
    """Do what the next start does first, and check that the five places agree; then promote again, and check that."""
    enter(project)
    complete(project, NAME, commit_of=lambda _: None)
    check_agreement(project)
    check_promotion(project, number, outcomes=("promoted", "unchanged"), champion=number)


def repeat_rollback_in(
    project: Path, number: str, *, last: int | None, journal: Path, with_reads: bool = False
) -> None:
    """Repeat the command that was killed, which must end one rollback; then try to promote the bad model again."""
    enter(project)
    with suppress(UserError):  # it is refused where the one that was killed had done everything
        roll_back(project, NAME, log=print)
    check_agreement(project)
    assert [change.version for change in history(NAME)] == ["1", "2", "1"]
    check_promotion(project, number, outcomes=("refused",), champion="1")


def check_promotion(project: Path, number: str, *, outcomes: tuple[str, ...], champion: str) -> None:
    """Promote a version, and check what was decided, which version is champion then, and that all agrees."""
    [version] = [one for one in find_versions(NAME) if one.number == number]
    result = promote_version(project, version, params=params(), is_dry_run=False, log=print)
    assert result.decision
    assert result.decision.outcome in outcomes
    found = version_of_alias(NAME, CHAMPION)
    assert found
    assert found.number == champion
    check_agreement(project)


def enter(project: Path) -> None:
    os.chdir(project)
    os.environ |= {"MLFLOW_TRACKING_URI": f"sqlite:///{project}/mlflow.db", "PREFECT_HOME": str(project / ".prefect")}
    os.environ.pop("PREFECT_API_URL", None)
    connect()


def check_agreement(project: Path) -> None:
    """Check that aliases, tags, ledger, history and git ref agree."""
    champion, previous, changes = version_of_alias(NAME, CHAMPION), version_of_alias(NAME, PREVIOUS), history(NAME)
    better = next(one for one in find_versions(NAME) if one.tags["title"] == "better")
    was_champion = better.number in {one.version for one in changes}
    results = [look.result for look in read_looks(NAME, better.test_md5)]
    assert champion
    assert read_pending(NAME) is None
    assert champion.number == changes[0].version
    assert (previous.number if previous else None) == changes[0].previous
    assert read_ref(project, NAME) == changes[0].commit
    assert champion.tags["decision"].startswith("promoted: ")
    decided = better.tags.get("decision", "")
    assert decided.startswith(("promoted: ", "refused: rollback")) == was_champion
    assert results == ["promoted"] if was_champion else results in ([], ["unknown"])


def start_fork_server() -> None:
    """Start the process that imports this module once, for all processes that are killed."""
    with chdir(PROJECT):  # it imports from the current folder
        forkserver.ensure_running()


def run(
    target: Callable[..., None], project: Path, *, last: int | None = None, with_reads: bool = False
) -> tuple[int | None, list[str]]:
    """Run in a process of its own, and return its exit status and the points that it has reached."""
    journal = project.parent / f"{project.name}.points"
    journal.unlink(missing_ok=True)
    options = {"last": last, "journal": journal, "with_reads": with_reads}
    process = CONTEXT.Process(target=target, args=(project, "2"), kwargs=options)
    process.start()
    process.join()
    return process.exitcode, journal.read_text().splitlines() if journal.exists() else []


def kill_at(prepared: Path, folder: Path, *, target: Callable[..., None], last: int, with_reads: bool = False) -> str:
    """Kill a process before a point, let the next start complete, and return what the point was."""
    project = shutil.copytree(prepared, folder / f"{target.__name__}-{last}")
    status, reached = run(target, project, last=last, with_reads=with_reads)
    assert status == -signal.SIGKILL, (status, reached)
    status, _ = run(repeat_rollback_in if target is roll_back_in else complete_in, project)
    assert status == 0, f"point {last}, after {reached[-1:]}"
    shutil.rmtree(project)
    return reached[-1] if reached else "the start"


def points(number_of_all: int, wanted: int | None) -> Iterator[int]:
    """Yield `wanted` of all points, evenly spread, the last one included; by default all."""
    count = min(wanted or number_of_all, number_of_all)
    yield from sorted({round(1 + index * (number_of_all - 1) / max(1, count - 1)) for index in range(count)})


def main() -> None:
    """Kill at the points of the command line, and print each."""
    parser = argparse.ArgumentParser(prog="python -m tests.promotion_kills", description=__doc__)
    parser.add_argument("--points", type=int, help="number of points (default: all)")
    parser.add_argument("--reads", action="store_true", help="also kill before the database is read")
    arguments = parser.parse_args()
    start_fork_server()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_mlflow_store(folder)
        prepared = make_contest(folder, folder)
        for target in (promote_in, roll_back_in):
            if target is roll_back_in:
                assert run(promote_in, prepared)[0] == 0
            whole = shutil.copytree(prepared, folder / f"{target.__name__}-whole")
            status, reached = run(target, whole, with_reads=arguments.reads)
            assert status == 0
            for last in points(len(reached), arguments.points):
                after = kill_at(prepared, folder, target=target, last=last, with_reads=arguments.reads)
                print(f"{target.__name__} point {last} of {len(reached)}, after {after}: agrees", flush=True)


if __name__ == "__main__":
    main()
