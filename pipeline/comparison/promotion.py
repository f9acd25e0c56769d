"""Decide whether a challenger replaces the champion, by pure functions of predictions, ledger and policy.

All looks at a test split together promote a model that is no better with at most the probability
`false_promotion_budget`: each has the level `false_promotion_budget / max_looks` (Bonferroni's correction, valid
however the looks depend on each other), and is charged before its result is seen. What comes before a look reads no
test predictions of the challenger, and what comes after it can only refuse; neither raises that probability.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.comparison.models import ClassDifference, Difference
from pipeline.comparison.pairing import Candidate, Pairing
from pipeline.evaluation.calibration import expected_calibration_error
from pipeline.params import PromoteParams

Outcome = Literal["promoted", "refused", "unchanged"]
LookResult = Literal["promoted", "refused", "unknown"]
ROUNDING = 1e-9  # relative: a sum of levels may exceed the budget by rounding


@dataclass(frozen=True)
class Challenger:
    """The figures of a challenger that need no champion; None where one is unknown.

    `leaked_fraction` and `calibration_error` are of its whole test split. The latter is the expected calibration error,
    of calibrated probabilities where the model has them; it is read after the look. `megabytes` (10**6 bytes) is the
    size of the weights, `latency_milliseconds` the time for one image.
    """

    model_md5: str
    leaked_fraction: float | None
    calibration_error: float | None
    megabytes: float | None
    latency_milliseconds: float | None = None


@dataclass(frozen=True)
class TestSplit:
    """The test images on which challenger and champion are compared, and how many the champion gets wrong."""

    __test__ = False  # for pytest, this is no test

    images: int
    champion_errors: int


@dataclass(frozen=True)
class Look:
    """A look at a test split that was charged to its budget, from the ledger.

    `challenger` and `champion` are the MD5s of the weights; `result` is "unknown" until the look has been seen.
    """

    number: int
    challenger: str
    champion: str
    level: float
    time: str
    result: LookResult = "unknown"


@dataclass(frozen=True)
class Check:
    """A check of a decision: what was found, what is allowed, and whether it passed."""

    name: str
    found: str
    allowed: str
    passed: bool


@dataclass(frozen=True)
class Figures:
    """What a look showed: the challenger is A, the champion B, on the paired test images.

    The interval of `accuracy` has the confidence 95 %. `p_value` is the one-sided exact one of McNemar's test, and
    `detectable` the smallest gain that these images show at the look's level with 80 % power (None: no gain).
    """

    images: int
    only_challenger: int
    only_champion: int
    accuracy: Difference
    p_value: float
    detectable: float | None
    classes: tuple[ClassDifference, ...]


@dataclass(frozen=True)
class Decision:
    """The outcome, its reason in one sentence, and the checks that were made, in their order.

    `level` and `figures` are those of the look, None where there was none. `looks_used` includes this look.
    """

    outcome: Outcome
    reason: str
    checks: tuple[Check, ...]
    looks_used: int
    looks_left: int
    level: float | None = None
    figures: Figures | None = None


@dataclass(frozen=True)
class LookAllowed:
    """The permission for a look at this level, with the checks that the challenger passed before.

    `charged` is the look of the same two models that the ledger has already, as after a kill: it is not charged again,
    since the same test of the same images has the same result. Without one, the look must be charged before the test
    predictions are compared. `looks_used` includes this look.
    """

    challenger: Challenger
    champion_md5: str
    level: float
    charged: Look | None
    checks: tuple[Check, ...]
    looks_used: int
    looks_left: int


def describe_challenger(
    candidate: Candidate, *, model_md5: str, megabytes: float | None, latency_milliseconds: float | None = None
) -> Challenger:
    """Return the figures of a challenger from its predictions for its whole test split."""
    predictions = candidate.predictions
    unfit = candidate.leaked | candidate.trained_on
    confidences = predictions.confidences(predictions.best_probabilities)
    return Challenger(
        model_md5=model_md5,
        leaked_fraction=sum(each in unfit for each in predictions.content_hashes) / len(predictions),
        calibration_error=expected_calibration_error(confidences, predictions.is_correct),
        megabytes=megabytes,
        latency_milliseconds=latency_milliseconds,
    )


def decide(
    challenger: Challenger,
    *,
    champion_md5: str | None,
    validation: Pairing | None,
    test: TestSplit | None,
    looks: Sequence[Look],
    params: PromoteParams,
    charge: Callable[[LookAllowed], None],
    read_test: Callable[[], Pairing],
) -> Decision:
    """Decide by `before_look` and, where it allows a look, by `after_look`; the arguments are those of `before_look`.

    `charge` writes the look into the ledger, and is called first; `read_test` returns the pairing of the test split.
    """
    found = before_look(
        challenger, champion_md5=champion_md5, validation=validation, test=test, looks=looks, params=params
    )
    if isinstance(found, Decision):
        return found
    if found.charged is None:
        charge(found)
    return after_look(found, read_test(), params=params)


def before_look(
    challenger: Challenger,
    *,
    champion_md5: str | None,
    validation: Pairing | None,
    test: TestSplit | None,
    looks: Sequence[Look],
    params: PromoteParams,
) -> Decision | LookAllowed:
    """Return the decision where no look is needed or allowed, else the permission for one.

    In `validation`, the challenger is A and the champion B; None where they have no validation image in common. `test`
    is None only without a champion. `looks` are all that the ledger has for this test split.
    """
    raise NotImplementedError


def after_look(look: LookAllowed, test: Pairing, *, params: PromoteParams) -> Decision:
    """Return the decision by the test predictions, of which the challenger's are A and the champion's B."""
    raise NotImplementedError
