"""Carry out a decision so that aliases, tags, ledger, history and git ref agree again after a kill at any moment.

The alias `champion` is the truth. A decision is first written as a whole into the tag `promote.pending`. Its steps
follow, each of which can be repeated, and the tag is removed last. The history comes right after the alias, so that an
alias that moved back later is known to be the work of a person. The next promotion repeats the steps of a decision that
it finds there, and brings history and git ref in line with an alias that somebody has moved in MLflow.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from flows.champion_ref import read_ref, write_ref
from flows.promotion_ledger import Change, history, now, record_result, write_change
from pipeline.comparison.promotion import Look
from pipeline.core.errors import TemporaryError
from pipeline.core.git import find_commit
from pipeline.tracking.registry import (
    CHALLENGER,
    CHAMPION,
    DECISION,
    PREVIOUS,
    Version,
    find_versions,
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

    `tags` are those of the version `version`, which gets the alias `challenger` if it `stays_challenger`. `change` is
    the change of the champion, None where it stays. `look` was made at the test split `test_md5`, and is recorded with
    its result; it is None where there was none.
    """

    version: str
    tags: Mapping[str, str]
    change: Change | None = None
    look: Look | None = None
    test_md5: str = ""
    stays_challenger: bool = False

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
        _move_aliases(name, change)
        write_change(name, change)
    elif pending.stays_challenger:
        set_alias(name, CHALLENGER, pending.version)
    _record_decision(name, pending)
    if change and _has_commit(project, change.commit):  # else `_follow_alias` reports it
        write_ref(project, name, change.commit)
    remove_tag(name, PENDING)


def _move_aliases(name: str, change: Change) -> None:
    """Set the aliases of a change of the champion; a version that was deleted in MLflow does not become `previous`."""
    assert change.version
    if change.previous and _exists(name, change.previous):
        set_alias(name, PREVIOUS, change.previous)
    set_alias(name, CHAMPION, change.version)
    for alias in (CHALLENGER, PREVIOUS):
        other = version_of_alias(name, alias)
        if other and other.number == change.version:
            remove_alias(name, alias)


def _record_decision(name: str, pending: Pending) -> None:
    """Set the tags of the version, unless it was deleted in MLflow, and record the result of the look."""
    if _exists(name, pending.version):
        set_version_tags(name, pending.version, pending.tags)
    if pending.look:
        record_result(name, pending.test_md5, pending.look, pending.look.result)


def _exists(name: str, number: str) -> bool:
    return any(one.number == number for one in find_versions(name))


def _has_commit(project: Path, commit: str | None) -> bool:
    """Return whether the git ref can be set to a commit; with None, it can be removed."""
    return commit is None or find_commit(project, commit) is not None


def complete(project: Path, name: str, *, commit_of: Callable[[Version], str | None]) -> list[str]:
    """Complete the decision that a killed promotion has left, then follow an alias that was moved in MLflow.

    `commit_of` returns the git commit with the `dvc.lock` of a version, or None. Returns a line for each thing done.
    The decision is dropped where somebody has moved the alias since, or deleted the version; what the look
    showed is recorded all the same.
    """
    lines = []
    if pending := read_pending(name):
        if reason := _why_dropped(name, pending):
            _record_decision(name, _as_dropped(name, pending, reason=reason))
            remove_tag(name, PENDING)
            lines.append(f"dropped the interrupted decision on version {pending.version}: {reason}")
        else:
            _repeat_steps(project, name, pending)
            lines.append(f"completed the decision on version {pending.version}, which was interrupted")
    return [*lines, *_follow_alias(project, name, commit_of=commit_of)]


def _why_dropped(name: str, pending: Pending) -> str:
    """Return why an interrupted decision must not be carried out any more, else "".

    Before the history has the change, an alias that a person moved back looks like one that never moved.
    """
    change, champion = pending.change, version_of_alias(name, CHAMPION)
    number = champion.number if champion else None
    if not _exists(name, pending.version):
        return "this version was deleted in MLflow"
    if change and number != change.version and (number != change.previous or change in history(name)):
        return "the alias champion was moved in MLflow since"
    return ""


def _as_dropped(name: str, pending: Pending, *, reason: str) -> Pending:
    """Return the decision with a tag that says so, if its change of the champion never came into force."""
    if pending.change is None or pending.change in history(name):
        return pending
    return replace(pending, tags={**pending.tags, DECISION: f"{pending.tags[DECISION]}; not carried out: {reason}"})


def _follow_alias(project: Path, name: str, *, commit_of: Callable[[Version], str | None]) -> Iterator[str]:
    """Bring `previous`, history and git ref in line with the alias; yields a line for each thing that was done."""
    champion, last = version_of_alias(name, CHAMPION), next(iter(history(name)), None)
    number, former = champion.number if champion else None, last.version if last else None
    if number != former:
        if former and _exists(name, former):
            set_alias(name, PREVIOUS, former)
        last = Change(
            time=now(),
            version=number,
            model_md5=champion.model_md5 if champion else None,
            commit=commit_of(champion) if champion else None,
            reason=f"{MOVED}; noticed at this time",
            previous=former,
        )
        write_change(name, last)
        yield f"recorded that the champion is {f'version {number}' if number else 'removed'}: {MOVED}"
    commit = last.commit if last else None
    if read_ref(project, name) == commit:
        return
    if not _has_commit(project, commit):
        yield f"git has no commit {commit}, which has the champion's dvc.lock; `git fetch` or `dvc exp pull` brings it"
        return
    write_ref(project, name, commit)
    yield f"set the git ref of the champion to {commit}" if commit else "removed the git ref: no commit is known"
