"""The seeds of a flow run: consecutive ones for several seeds, or that of the day, and the title of such a run."""

import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, date, datetime

from pipeline.core.errors import UserError
from pipeline.tracking.run_title import RunSetup

SEED_PARAM = "train.seed"
NUM_SEEDS = 2**32  # the seeds that train.seed allows are smaller than this
FIRST_DAY = date(1970, 1, 1)


def parse_seeds(text: str) -> int:
    """Return the number of seeds that an option names; raises UserError unless it is a whole number of 1 or more."""
    if not re.fullmatch(r"0*[1-9][0-9]{0,8}", text):
        raise UserError(f"--seeds: found {text!r}; allowed: a whole number of 1 or more, as in SEEDS=5; correct it")
    return int(text)


def seeds_from(first: int, number: int) -> range:
    """Return this many consecutive seeds; raises UserError where the last one is too large for train.seed."""
    if first + number > NUM_SEEDS:
        raise UserError(
            f"seeds: found {number} from {SEED_PARAM}={first} on; allowed: seeds below {NUM_SEEDS}; lower one of both"
        )
    return range(first, first + number)


def seed_of_day(scheduled: datetime, *, seeds: int = 1) -> int:
    """Return the first seed of a run: the number of days from 1970-01-01 to its scheduled start (UTC), times `seeds`.

    A retry of the run has the same one, and two days have no seed in common.
    """
    return (scheduled.astimezone(UTC).date() - FIRST_DAY).days * seeds


def seeds_title(setup: RunSetup, seeds: Sequence[int]) -> str:
    """Return the title of a run over these seeds, as in `digits lr=0.03 seeds=0-4`."""
    others = {name: pair for name, pair in setup.differences.items() if name != SEED_PARAM}
    return f"{replace(setup, differences=others).title} seeds={seeds[0]}-{seeds[-1]}"
