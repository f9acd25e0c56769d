"""The ledger of looks at test splits and the history of champions, as tags of the registered model, one an entry.

A look is charged before its result is seen, and stays charged whatever happens afterwards. The key of its tag ends in
random digits: two machines that charge a look at the same time then charge two.
"""

import json
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from pipeline.comparison.promotion import ROUNDING, Look, LookAllowed, LookResult
from pipeline.core.errors import TemporaryError
from pipeline.params import PromoteParams
from pipeline.tracking.registry import read_tags, remove_tag, set_tag

LOOK, CHANGE = "promote.look.", "promote.champion."  # prefixes of the keys
NUM_SPLIT_DIGITS = 12  # of the MD5 of the test split in the key of a look


@dataclass(frozen=True)
class Change:
    """A change of the champion: the version that has been champion since `time` (UTC, ISO 8601), and why.

    `version` is None where the registered model had no champion from then on, `previous` where it had none before.
    `commit` has the `dvc.lock` of the model; it is None if unknown, and so is `model_md5` without a version.
    `rolled_back` is the MD5 of the model from which a rollback went back, else None.
    """

    time: str
    version: str | None
    model_md5: str | None
    commit: str | None
    reason: str
    previous: str | None
    rolled_back: str | None = None

    @property
    def key(self) -> str:
        """Return the key of the change's tag, which sorts by time."""
        return f"{CHANGE}{datetime.fromisoformat(self.time):%Y%m%dT%H%M%S.%fZ}"


def now() -> str:
    """Return the time in UTC, ISO 8601 with microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def history(name: str) -> list[Change]:
    """Return the changes of the champion, newest first."""
    tags = read_tags(name)
    changes = [Change(**json.loads(value)) for key, value in tags.items() if key.startswith(CHANGE)]
    return sorted(changes, key=lambda change: change.key, reverse=True)


def champion_at(changes: list[Change], time: datetime) -> Change | None:
    """Return the change that was the newest one at a time, or None before the first; `changes` are newest first."""
    return next((change for change in changes if datetime.fromisoformat(change.time) <= time), None)


def write_change(name: str, change: Change) -> None:
    """Add a change to the history; adding it again changes nothing."""
    set_tag(name, change.key, json.dumps(asdict(change)))


def read_looks(name: str, test_md5: str) -> list[Look]:
    """Return the looks that were charged to a test split, in the order of their numbers."""
    return sorted((look for _, look in _looks(name, test_md5)), key=lambda look: (look.number, look.time))


def charge(name: str, test_md5: str, allowed: LookAllowed, *, params: PromoteParams) -> Look:
    """Charge a look to a test split, and return it; its result is unknown until `record_result`.

    Raises TemporaryError, and charges nothing, where another machine has charged the rest of the budget meanwhile.
    """
    number = 1 + max((look.number for _, look in _looks(name, test_md5)), default=0)
    look = Look(
        number=number,
        challenger=allowed.challenger.model_md5,
        champion=allowed.champion_md5,
        level=allowed.level,
        time=now(),
        predictions=allowed.predictions,
    )
    key = f"{_prefix(test_md5)}{number:04d}-{secrets.token_hex(3)}"
    set_tag(name, key, json.dumps(asdict(look)))
    levels = [each.level for each in read_looks(name, test_md5)]
    if len(levels) > params.max_looks or sum(levels) > params.false_promotion_budget + ROUNDING * look.level:
        remove_tag(name, key)  # nothing was seen yet
        raise TemporaryError(
            f"{name}: another machine has charged the last look at this test split at the same time; run the same "
            "command again, which reports what is left of the budget"
        )
    return look


def record_result(name: str, test_md5: str, look: Look, result: LookResult) -> None:
    """Record the result of a look that was charged."""
    for key, charged in _looks(name, test_md5):
        if replace(charged, result=look.result) == look:
            set_tag(name, key, json.dumps(asdict(replace(look, result=result))))


def _looks(name: str, test_md5: str) -> Iterator[tuple[str, Look]]:
    """Yield the key and the content of each look at a test split."""
    prefix = _prefix(test_md5)
    for key, value in read_tags(name).items():
        if key.startswith(prefix):
            yield key, Look(**json.loads(value))


def _prefix(test_md5: str) -> str:
    return f"{LOOK}{test_md5[:NUM_SPLIT_DIGITS]}."
