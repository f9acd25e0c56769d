"""Decide whether a version becomes the champion, and carry the decision out; `flows.promote` is the command."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from flows.candidates import Model
from flows.champion_ref import champion_commit
from flows.file_lock import hold_promotion
from flows.promotion_change import Pending, carry_out, complete, read_pending
from flows.promotion_ledger import Change, charge, history, now, read_looks
from flows.promotion_models import (
    NotComparableError,
    champion_on,
    check_weights,
    describe,
    describe_differences,
    identify_predictions,
    known_commit,
    model_of,
    pair_on,
    read_test_split,
)
from pipeline.comparison.pairing import Candidate
from pipeline.comparison.promotion import (
    Challenger,
    Decision,
    Look,
    LookAllowed,
    LookResult,
    after_look,
    before_look,
    looks_left,
)
from pipeline.core.errors import UserError
from pipeline.params import Params, PromoteParams
from pipeline.tracking.registry import (
    CHAMPION,
    DECISION,
    MAX_TAG_LENGTH,
    PREVIOUS,
    Version,
    version_of_alias,
)

RECORD = "promote.decision"  # tag of a version: its last decision with all figures, as JSON
# The tag of the pending decision has the record, the reason twice, and less than 1,000 characters besides
MAX_REASON_LENGTH = 450
MAX_RECORD_LENGTH = MAX_TAG_LENGTH - 2 * MAX_REASON_LENGTH - 1_000
NUM_CLASSES_RECORDED = 10  # those with the smallest p-values

Log = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """What a promotion decided about a version: `decision`, or `allowed` where a dry run ended before the look.

    `champion` is the version that was champion before, None where there was none.
    """

    challenger: Version
    champion: Version | None
    decision: Decision | None
    allowed: LookAllowed | None = None
    is_dry_run: bool = False

    @property
    def name(self) -> str:
        """Return the name of the registered model."""
        return self.challenger.name


@dataclass(frozen=True)
class _Contest:
    """A challenger and the champion; their models are None where both are the same, or there is no champion."""

    version: Version
    champion: Version | None
    model: Model | None
    champion_model: Model | None
    params: Params


def promote_version(project: Path, challenger: Version, *, params: Params, is_dry_run: bool, log: Log) -> Result:
    """Decide whether a version becomes the champion, and carry that out; a dry run changes and charges nothing.

    The policy is `params.promote`. `log` is called with a line for each thing that a person must know. Raises UserError
    where a file is missing or no commit has the model, TemporaryError where MLflow fails or another machine interferes.
    """
    name = challenger.name
    if is_dry_run:
        if read_pending(name):
            log("an interrupted promotion is not complete; the next one completes it first")
        return replace(_decide(_open(project, challenger, params=params), charges=False)[0], is_dry_run=True)
    with hold_promotion(project, name, command="a promotion", on_wait=log):
        _complete(project, name, log=log)
        contest = _open(project, challenger, params=params)
        commit = None
        if model := contest.model:  # without a commit, the champion could not be checked out
            commit = champion_commit(project, model_md5=model.model_md5, experiment=model.experiment)
        result, look = _decide(contest, charges=True)
        champion = result.champion.number if result.champion else None
        if challenger.number != champion:
            carry_out(project, name, _pending(result, look=look, commit=commit), champion=champion)
        return result


def _open(project: Path, challenger: Version, *, params: Params) -> _Contest:
    """Find the files of a challenger and of the champion."""
    champion = version_of_alias(challenger.name, CHAMPION)
    if champion and champion.model_md5 == challenger.model_md5:
        return _Contest(challenger, champion, None, None, params)
    champion_model = model_of(project, champion) if champion else None
    return _Contest(challenger, champion, model_of(project, challenger), champion_model, params)


def _decide(contest: _Contest, *, charges: bool) -> tuple[Result, Look | None]:
    """Return the result, and the look that was made; without `charges`, it ends before a look."""
    version, champion, policy = contest.version, contest.champion, contest.params.promote
    try:
        found, test = _before_look(contest, read_looks(version.name, version.test_md5))
        if isinstance(found, Decision):
            return Result(version, champion, found), None
        if not charges:
            return Result(version, champion, None, allowed=found), None
        look = found.charged or charge(version.name, version.test_md5, found, params=policy)
        assert test
        assert contest.model
        decision = after_look(found, pair_on(contest.model, test, "test"), params=policy)
    except NotComparableError as error:
        return Result(version, champion, _refusal(version, str(error), policy=policy)), None
    outcome: LookResult = "promoted" if decision.outcome == "promoted" else "refused"
    return Result(version, champion, decision), replace(look, result=outcome)


def _refusal(version: Version, reason: str, *, policy: PromoteParams) -> Decision:
    """Return the decision for a version that no figures can be computed of, with the looks that are charged by now."""
    looks = read_looks(version.name, version.test_md5)
    return Decision("refused", reason, (), looks_used=len(looks), looks_left=looks_left(looks, policy))


def _rolled_back(version: Version) -> str:
    """Return when a rollback went back from a version, if that is the last that happened to its model; else ""."""
    md5 = version.model_md5
    last = next((one for one in history(version.name) if md5 in (one.model_md5, one.rolled_back)), None)
    if last is None or last.rolled_back != md5:
        return ""
    return f"at {last.time[:16]} UTC from the challenger to version {last.version}"


def _before_look(contest: _Contest, looks: list[Look]) -> tuple[Decision | LookAllowed, Candidate | None]:
    """Return what the figures without a look allow, and the champion's predictions for the challenger's test images."""
    params, rollback = contest.params, _rolled_back(contest.version)
    challenger, champion = (None, None) if rollback else (contest.model, contest.champion_model)
    validation, test, split, predictions, differences = None, None, None, "", list[str]()
    for model in filter(None, (challenger, champion)):
        check_weights(model)
    if challenger and champion:
        with suppress(NotComparableError):  # the decision reports that there is no validation image
            images = champion_on(champion, challenger, "validation", params=params)
            validation = pair_on(challenger, images, "validation")
        test = champion_on(champion, challenger, "test", params=params)
        split = read_test_split(challenger, test)
        predictions = identify_predictions(challenger, test)
        differences = describe_differences(challenger, champion)
    nothing = Challenger(contest.version.model_md5, None, None, None)
    found = before_look(
        describe(challenger, params=params) if challenger else nothing,
        champion_md5=contest.champion.model_md5 if contest.champion else None,
        validation=validation,
        test=split,
        looks=looks,
        params=params.promote,
        predictions=predictions,
        differences=differences,
        rollback=rollback,
    )
    return found, test


def _pending(result: Result, *, look: Look | None, commit: str | None) -> Pending:
    """Return all that the steps of a decision need."""
    version, champion, decision, time = result.challenger, result.champion, result.decision, now()
    assert decision
    reason = shorten(decision.reason, MAX_REASON_LENGTH)
    change = Change(
        time=time,
        version=version.number,
        model_md5=version.model_md5,
        commit=commit,
        reason=reason,
        previous=champion.number if champion else None,
    )
    return Pending(
        version=version.number,
        tags={DECISION: f"{decision.outcome}: {reason}", RECORD: as_record(decision, time=time)},
        change=change if decision.outcome == "promoted" else None,
        look=look,
        test_md5=version.test_md5,
        stays_challenger=decision.outcome == "refused",
    )


def as_record(decision: Decision, *, time: str) -> str:
    """Return a decision with all figures as JSON, which has at most MAX_RECORD_LENGTH characters as a JSON string.

    Of many classes, those with the smallest p-values are in it; long texts are shortened.
    """
    values = {"time": time, **asdict(decision)}
    if figures := values["figures"]:
        figures["classes"] = sorted(figures["classes"], key=lambda each: each["p_value"])[:NUM_CLASSES_RECORDED]
        while _is_too_long(values) and figures["classes"]:
            figures["classes"].pop()
    length = MAX_REASON_LENGTH
    while _is_too_long(values):
        length = length * 3 // 4
        values = _shorten_all(values, length)
    return json.dumps(values)


def _is_too_long(record: object) -> bool:
    return len(json.dumps(json.dumps(record))) > MAX_RECORD_LENGTH


def _shorten_all(value: Any, length: int) -> Any:
    """Return JSON values with each text shortened."""
    if isinstance(value, dict):
        return {key: _shorten_all(each, length) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_shorten_all(each, length) for each in value]
    return shorten(value, length) if isinstance(value, str) else value


def shorten(text: str, length: int) -> str:
    """Return the beginning of a text that has at most `length` characters, 8 or more, as a JSON string."""
    kept = len(text)
    shortened = text
    while len(json.dumps(shortened)) > length:
        kept = kept * 9 // 10
        shortened = f"{text[:kept]}…"
    return shortened


def roll_back(project: Path, name: str, *, log: Log) -> Change:
    """Make the version with the alias `previous` the champion again, and return that change.

    The former champion becomes `previous`. A rollback that was interrupted is completed instead. Raises UserError where
    there is no such version, no commit has its model, or the last change was a rollback: another one would bring back
    the model from which that one went back.
    """
    with hold_promotion(project, name, command="a rollback", on_wait=log):
        pending = read_pending(name)
        _complete(project, name, log=log)
        last = next(iter(history(name)), None)
        if last and last.rolled_back:
            if pending and pending.change == last:
                return last
            raise UserError(
                f"--rollback: the last change of {name}'s champion was a rollback, to version {last.version} at "
                f"{last.time[:16]} UTC; allowed: one rollback after a promotion; to go forward again, set the alias "
                f"{CHAMPION} by hand in MLflow"
            )
        champion, previous = version_of_alias(name, CHAMPION), version_of_alias(name, PREVIOUS)
        if previous is None or champion is None:
            missing = PREVIOUS if champion else CHAMPION
            raise UserError(
                f"--rollback: no version of {name} has the alias {missing}, so there is no earlier champion to go back "
                "to; allowed: after a promotion that replaced a champion; name the version to promote instead"
            )
        known = next((one.commit for one in history(name) if one.version == previous.number and one.commit), None)
        change = Change(
            time=now(),
            version=previous.number,
            model_md5=previous.model_md5,
            commit=known or champion_commit(project, model_md5=previous.model_md5),
            reason=f"rolled back from version {champion.number}",
            previous=champion.number,
            rolled_back=champion.model_md5,
        )
        pending = Pending(version=previous.number, tags={DECISION: f"promoted: {change.reason}"}, change=change)
        carry_out(project, name, pending, champion=champion.number)
        _complete(project, name, log=log)  # reports a commit that is missing here
        return change


def _complete(project: Path, name: str, *, log: Log) -> None:
    """Complete what an interrupted promotion has left, with a line in the log for each thing done."""
    for line in complete(project, name, commit_of=partial(known_commit, project)):
        log(line)
