"""Carry out a decision so that aliases, tags, ledger, history and git ref agree again after a kill at any moment.

The alias `champion` is the truth. A decision is first written as a whole into the tag `promote.pending`. Its steps
follow, each of which can be repeated, and the tag is removed last. The next promotion repeats the steps of a decision
that it finds there, and brings history and git ref in line with an alias that somebody has moved in MLflow.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from flows.champion_ref import read_ref, write_ref
from flows.promotion_ledger import Change, history, now, record_result, write_change
from pipeline.comparison.promotion import Look
from pipeline.core.errors import TemporaryError
from pipeline.core.git import find_commit
from pipeline.tracking.registry import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    Version,
    read_tags,
    remove_alias,
    remove_tag,
    set_alias,
    set_tag,
    set_version_tags,
    version_of_alias,
)

PENDING = "promote.pending"
MOVED = "the alias was moved in MLflow, not by a promotion"


@dataclass(frozen=True)
class Pending:
    """A decision that is being carried out: all that its steps need.

    `tags` are those of the version `version`. `change` is the change of the champion, None where it stays. `look` was
    made at the test split `test_md5`, and is recorded with its result; it is None where there was none.
    """

    version: str
    tags: Mapping[str, str]
    change: Change | None = None
    look: Look | None = None
    test_md5: str = ""

    def as_json(self) -> str:
        """Return the text of the tag."""
        return json.dumps(asdict(self))


def read_pending(name: str) -> Pending | None:
    """Return the decision that a killed promotion has left, or None."""
    text = read_tags(name).get(PENDING)
    if text is None:
        return None
    values = json.loads(text)
    change, look = values.pop("change"), values.pop("look")
    return Pending(**values, change=Change(**change) if change else None, look=Look(**look) if look else None)


def carry_out(project: Path, name: str, pending: Pending, *, champion: str | None) -> None:
    """Carry out a decision that was made against the champion of this number, in steps that `complete` repeats.

    Raises TemporaryError where another machine has changed the champion since, or is about to.
    """
    found = version_of_alias(name, CHAMPION)
    if (found.number if found else None) != champion or read_pending(name):
        raise TemporaryError(_changed_elsewhere(name))
    set_tag(name, PENDING, pending.as_json())
    if read_pending(name) != pending:  # MLflow has no lock: of two machines, the later one has replaced the tag
        raise TemporaryError(_changed_elsewhere(name))
    _repeat_steps(project, name, pending)


def _changed_elsewhere(name: str) -> str:
    return (
        f"{name}: the champion was changed from another machine or in MLflow while this promotion was deciding; "
        "nothing was changed here; run the same command again, which decides against the new champion"
    )


def _repeat_steps(project: Path, name: str, pending: Pending) -> None:
    """Carry out all steps of a decision; each gives the same result when it is repeated."""
    change = pending.change
    if change and change.version:
        if change.previous:
            set_alias(name, PREVIOUS, change.previous)
        set_alias(name, CHAMPION, change.version)
        challenger = version_of_alias(name, CHALLENGER)
        if challenger and challenger.number == change.version:
            remove_alias(name, CHALLENGER)
    set_version_tags(name, pending.version, pending.tags)
    if pending.look:
        record_result(name, pending.test_md5, pending.look, pending.look.result)
    if change:
        write_ref(project, name, change.commit)
        write_change(name, change)
    remove_tag(name, PENDING)


def complete(project: Path, name: str, *, commit_of: Callable[[Version], str | None]) -> list[str]:
    """Complete the decision that a killed promotion has left, then follow an alias that was moved in MLflow.

    `commit_of` returns the git commit with the `dvc.lock` of a version, or None. Returns a line for each thing done.
    Where the alias points neither to the champion before the change nor to the new one, somebody has moved it since:
    the change is dropped.
    """
    lines = []
    if pending := read_pending(name):
        change, champion = pending.change, version_of_alias(name, CHAMPION)
        number = champion.number if champion else None
        if change is None or number in (change.previous, change.version):
            _repeat_steps(project, name, pending)
            lines.append(f"completed the decision on version {pending.version}, which was interrupted")
        else:
            remove_tag(name, PENDING)
            lines.append(
                f"dropped the interrupted change to version {pending.version}: the champion is another one now"
            )
    return [*lines, *_follow_alias(project, name, commit_of=commit_of)]


def _follow_alias(project: Path, name: str, *, commit_of: Callable[[Version], str | None]) -> Iterator[str]:
    """Bring `previous`, history and git ref in line with the alias; yields a line for each thing that was done."""
    champion, last = version_of_alias(name, CHAMPION), next(iter(history(name)), None)
    number, former = champion.number if champion else None, last.version if last else None
    if number != former:
        if former:
            set_alias(name, PREVIOUS, former)
        last = Change(
            time=now(),
            version=number,
            model_md5=champion.model_md5 if champion else None,
            commit=commit_of(champion) if champion else None,
            reason=MOVED,
            previous=former,
        )
        write_change(name, last)
        yield f"recorded that the champion is {f'version {number}' if number else 'removed'}: {MOVED}"
    commit = last.commit if last else None
    if read_ref(project, name) == commit:
        return
    if commit and find_commit(project, commit) is None:
        yield f"git has no commit {commit}, which has the champion's dvc.lock; `git fetch` or `dvc exp pull` brings it"
        return
    write_ref(project, name, commit)
    yield f"set the git ref of the champion to {commit}" if commit else "removed the git ref: no commit is known"
