"""Decide whether a challenger replaces the champion, by pure functions of predictions, ledger and policy.

All looks at a test split together promote a model that is no better with at most the probability
`false_promotion_budget`: each has the level `false_promotion_budget / max_looks` (Bonferroni's correction, valid
however the looks depend on each other), and is charged before its result is seen. What comes before a look reads no
test predictions of the challenger, and what comes after it can only refuse; neither raises that probability. All this
holds as long as no challenger is trained or tuned by what earlier looks showed of the test images.

The test on the validation split only saves looks: with equal models and `validation_level` 0.05, 16 of 365 nights need
one on average, and 93 where the champion was unlucky on validation (the 95th percentile), for which `max_looks` 100 is
made; benchmarks/promotion.py measures these numbers, and how soon a better model is promoted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from pipeline.comparison.models import ClassDifference, Difference, compare_classes
from pipeline.comparison.paired import detectable_difference, difference_interval, mcnemar_greater
from pipeline.comparison.pairing import Candidate, Pairing
from pipeline.core.git import UNKNOWN
from pipeline.evaluation.calibration import expected_calibration_error
from pipeline.params import PromoteParams

Outcome = Literal["promoted", "refused", "unchanged"]
LookResult = Literal["promoted", "refused", "unknown"]
MAX_LISTED, MAX_NAME_LENGTH = 5, 40  # of classes in a check
ROUNDING = 1e-6  # of a look: the sum of the levels of all looks may exceed the budget by rounding


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
    `predictions` identifies what both models predicted, which depends on more than the weights.
    """

    number: int
    challenger: str
    champion: str
    level: float
    time: str
    result: LookResult = "unknown"
    predictions: str = ""


@dataclass(frozen=True)
class Check:
    """A check of a decision: what was found, what is allowed, whether it passed, and what to do if it did not."""

    name: str
    found: str
    allowed: str
    passed: bool
    remedy: str = ""

    @property
    def failure(self) -> str:
        """Return what was found, what is allowed and the remedy as one line."""
        return f"{self.name}: {self.found}; allowed: {self.allowed}" + (f"; {self.remedy}" if self.remedy else "")


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

    @property
    def gain(self) -> float:
        """Return the accuracy of the challenger minus that of the champion, without the rounding of either."""
        return (self.only_challenger - self.only_champion) / self.images


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

    `charged` is the look at the same predictions of the same two models that the ledger has already, as after a kill:
    it is not charged again, since the same test of the same predictions has the same result. Without one, the look must
    be charged before the test predictions are compared. `looks_used` includes this look.
    """

    challenger: Challenger
    champion_md5: str
    level: float
    charged: Look | None
    checks: tuple[Check, ...]
    looks_used: int
    looks_left: int
    predictions: str = ""


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


def describe_test_split(champion: Candidate) -> TestSplit:
    """Return how many test images may be used to compare the champion, and how many of them it gets wrong.

    The comparison may have fewer images, since those that leaked into the challenger's training data are left out.
    """
    unfit = champion.leaked | champion.trained_on
    is_fit = np.array([each not in unfit for each in champion.predictions.content_hashes], bool)
    return TestSplit(int(is_fit.sum()), int((is_fit & ~champion.predictions.is_correct).sum()))


def before_look(
    challenger: Challenger,
    *,
    champion_md5: str | None,
    validation: Pairing | None,
    test: TestSplit | None,
    looks: Sequence[Look],
    params: PromoteParams,
    predictions: str = "",
    differences: Sequence[str] = (),
    rollback: str = "",
) -> Decision | LookAllowed:
    """Return the decision where no look is needed or allowed, else the permission for one.

    In `validation`, the challenger is A and the champion B; None where they have no validation image in common. `test`
    is None only without a champion. `looks` are all that the ledger has for this test split. `predictions` identifies
    what both models predict for the test images they are compared on: a look at other predictions is another look.
    `differences` are those of their parameters of evaluation, whose gain would be credited to the model. `rollback`
    describes the rollback that went back from the challenger, and is empty where there was none.

    Models that no figures can be computed of, as with other classes, are refused by the caller, not here.
    """
    used, left = len(looks), looks_left(looks, params)
    if challenger.model_md5 == champion_md5:
        reason = "the challenger is the champion: their weights have the same MD5"
        return Decision("unchanged", reason, (), looks_used=used, looks_left=left)
    if rollback:
        return _decision((_rollback_check(rollback),), "", looks_used=used, looks_left=left)
    if champion_md5 is None:
        checks = (*_own_checks(challenger, params), _calibration_check(challenger, params))
        reason = "there is no champion yet, and the challenger passes all checks that need none"
        return _decision(checks, reason, looks_used=used, looks_left=left)
    assert test is not None
    own = challenger.model_md5, champion_md5, predictions
    charged = next((each for each in looks if (each.challenger, each.champion, each.predictions) == own), None)
    level = charged.level if charged else params.look_level
    checks = (*_own_checks(challenger, params), _evaluation_check(differences))
    if _all_passed(checks):
        checks += _room_checks(test, validation, level=level, params=params)
    if _all_passed(checks):
        checks += (_validation_check(validation, params),)
    if _all_passed(checks) and not charged:
        checks += (_budget_check(looks, params),)
    if not _all_passed(checks):
        return _decision(checks, "", looks_used=used, looks_left=left)
    new = 0 if charged else 1
    used, left = used + new, left - new
    return LookAllowed(challenger, champion_md5, level, charged, checks, used, left, predictions=predictions)


def after_look(look: LookAllowed, test: Pairing, *, params: PromoteParams) -> Decision:
    """Return the decision by the test predictions, of which the challenger's are A and the champion's B."""
    figures = _figures(test, level=look.level)
    gain = figures.gain
    checks = (
        *look.checks,
        Check(
            "better on test",
            _found(figures.only_challenger, figures.only_champion, figures.p_value),
            f"p at most {look.level:.2g}",
            passed=figures.p_value <= look.level,
        ),
        Check(
            "gain of accuracy on test",
            f"{gain:+.2%}",
            f"at least {params.minimum_gain:+.2%}",
            passed=gain >= params.minimum_gain,
        ),
        _calibration_check(look.challenger, params),
        _classes_check(figures.classes, params),
    )
    reason = (
        f"the challenger is better than the champion on {figures.images:,} test images: {gain:+.2%} of accuracy, "
        f"p = {figures.p_value:.3g} at the level {look.level:.2g}"
    )
    decision = _decision(checks, reason, looks_used=look.looks_used, looks_left=look.looks_left)
    return replace(decision, level=look.level, figures=figures)


def _figures(test: Pairing, *, level: float) -> Figures:
    """Return what the test predictions show at the level of a look."""
    a, b, number = test.a.is_correct, test.b.is_correct, len(test)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return Figures(
        images=number,
        only_challenger=only_a,
        only_champion=only_b,
        accuracy=Difference(float(a.mean()), float(b.mean()), *difference_interval(only_a, only_b, number)),
        p_value=mcnemar_greater(only_a, only_b),
        detectable=detectable_difference(number, discordance=(only_a + only_b) / number, level=level, sides=1),
        classes=compare_classes(test),
    )


def _decision(checks: tuple[Check, ...], reason: str, *, looks_used: int, looks_left: int) -> Decision:
    """Return "promoted" with the reason if all checks passed, else "refused" with those that failed as the reason."""
    failed = "; ".join(each.failure for each in checks if not each.passed)
    outcome: Outcome = "refused" if failed else "promoted"
    return Decision(outcome, failed or reason, checks, looks_used=looks_used, looks_left=looks_left)


def _all_passed(checks: Sequence[Check]) -> bool:
    return all(each.passed for each in checks)


def _own_checks(challenger: Challenger, params: PromoteParams) -> tuple[Check, ...]:
    """Return the checks that need neither a champion nor predictions."""
    return (
        _limit("leaked test images", challenger.leaked_fraction, params.max_leaked_fraction, form="{:.2%}"),
        _limit("size of the weights", challenger.megabytes, params.max_megabytes, form="{:.3g} MB"),
        _limit(
            "time for one image", challenger.latency_milliseconds, params.max_latency_milliseconds, form="{:.3g} ms"
        ),
    )


def _rollback_check(rollback: str) -> Check:
    remedy = "train another model, or set the alias champion by hand in MLflow"
    return Check("rollback", rollback, "none from the challenger", passed=False, remedy=remedy)


def _evaluation_check(differences: Sequence[str]) -> Check:
    return Check(
        "evaluated in the same way",
        "; ".join(differences) or "yes",
        "yes, else a gain of the evaluation would count as one of the model",
        passed=not differences,
        remedy="evaluate the challenger with the champion's parameters",
    )


def _calibration_check(challenger: Challenger, params: PromoteParams) -> Check:
    return _limit("calibration error", challenger.calibration_error, params.max_calibration_error, form="{:.4f}")


def _limit(name: str, found: float | None, limit: float | None, *, form: str) -> Check:
    """Return the check of a figure against its upper limit; an unknown figure fails where there is a limit."""
    return Check(
        name,
        UNKNOWN if found is None else form.format(found),
        "any" if limit is None else f"at most {form.format(limit)}",
        passed=limit is None or (found is not None and found <= limit),
    )


def _room_checks(
    test: TestSplit, validation: Pairing | None, *, level: float, params: PromoteParams
) -> tuple[Check, ...]:
    """Return the checks that a perfect model would reach the levels of both tests, and the minimum gain.

    A perfect model is right on all `errors` of the champion and wrong on no image, which has the p-value 0.5 ** errors.
    """
    splits = [
        ("test", test.images, test.champion_errors, max(_fewest_errors(level), params.minimum_gain * test.images))
    ]
    if validation is not None:
        errors = int((~validation.b.is_correct).sum())
        splits.append(("validation", len(validation), errors, _fewest_errors(params.validation_level)))
    return tuple(
        Check(
            f"room for a gain on {name}",
            f"the champion is wrong on {errors} of {images:,} images",
            f"at least {math.ceil(fewest)}, else even a perfect model is not shown to be better",
            passed=errors >= fewest,
            remedy=f"evaluate on more {name} images",
        )
        for name, images, errors, fewest in splits
    )


def _fewest_errors(level: float) -> int:
    """Return the smallest number of discordant images, all in favor of one model, with a p-value of at most `level`."""
    return math.ceil(-math.log2(level))


def _validation_check(validation: Pairing | None, params: PromoteParams) -> Check:
    """Return the check that the challenger is better on the validation split by more than noise."""
    name, allowed = "better on validation", f"p at most {params.validation_level:.2g}"
    if validation is None:
        return Check(name, "no image on which both models can be compared", allowed, passed=False)
    a, b = validation.a.is_correct, validation.b.is_correct
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p_value = mcnemar_greater(only_a, only_b)
    return Check(name, _found(only_a, only_b, p_value), allowed, passed=p_value <= params.validation_level)


def _found(only_challenger: int, only_champion: int, p_value: float) -> str:
    return (
        f"{only_challenger} images only the challenger gets right, {only_champion} only the champion: p = {p_value:.3g}"
    )


def _budget_check(looks: Sequence[Look], params: PromoteParams) -> Check:
    """Return the check that the budget of the test split allows another look."""
    return Check(
        "looks at this test split",
        f"{len(looks)} charged, {looks_left(looks, params)} left",
        f"{params.max_looks}, with levels of {params.false_promotion_budget:g} in total",
        passed=looks_left(looks, params) > 0,
        remedy="the budget is spent: new test data are needed",
    )


def looks_left(looks: Sequence[Look], params: PromoteParams) -> int:
    """Return how many more looks the budget allows: by their number, and by the levels that were charged so far.

    The levels differ where the policy was changed.
    """
    rest = params.false_promotion_budget - sum(each.level for each in looks)
    return max(0, min(params.max_looks - len(looks), math.floor(rest / params.look_level + ROUNDING)))


def _classes_check(classes: Sequence[ClassDifference], params: PromoteParams) -> Check:
    """Return the check that no class is shown to lose more recall than allowed."""
    worse = [each for each in classes if each.verdict == "worse"]
    lost = [f"{each.name[:MAX_NAME_LENGTH]} {each.recall_a - each.recall_b:+.2%}" for each in worse[:MAX_LISTED]]
    if len(worse) > MAX_LISTED:
        lost.append(f"and {len(worse) - MAX_LISTED} more")
    return Check(
        "recall of classes shown to be worse",
        ", ".join(lost) or "no class is shown to be worse",
        f"at least {-params.max_class_recall_loss:+.2%}",
        passed=all(each.recall_b - each.recall_a <= params.max_class_recall_loss for each in worse),
    )
