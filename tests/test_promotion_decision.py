"""The decision whether a challenger becomes champion: each rule, their order, and what is charged."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipeline.comparison.models import ClassDifference
from pipeline.comparison.pairing import Candidate, Pairing
from pipeline.comparison.promotion import (
    Challenger,
    Decision,
    Look,
    LookAllowed,
    TestSplit,
    _classes_check,
    after_look,
    before_look,
    describe_challenger,
    describe_test_split,
)
from pipeline.evaluation.predictions import Predictions
from pipeline.params import PromoteParams
from tests.conftest import params

POLICY = params().promote
GOOD = Challenger("new", leaked_fraction=0.0, calibration_error=0.02, megabytes=1.0)
SPLIT = TestSplit(images=1000, champion_errors=200)


def policy(**changes: Any) -> PromoteParams:
    return POLICY.model_copy(update=changes)


def predictions(right: list[int] | np.ndarray, *, classes: int = 2, confidence: float = 0.9) -> Predictions:
    """Return predictions that are right where `right` is 1; image i is of class i modulo the number of classes."""
    actual = np.arange(len(right), dtype=np.int64) % classes
    predicted = np.where(np.asarray(right, bool), actual, (actual + 1) % classes)
    probabilities = np.full((len(right), classes), (1 - confidence) / (classes - 1), np.float32)
    probabilities[np.arange(len(right)), predicted] = confidence
    hashes = [f"{row:016x}" for row in range(len(right))]
    return Predictions(tuple("abcdefghij"[:classes]), hashes, hashes, actual, predicted, probabilities, None)


def pairing(*, both: int, only_challenger: int, only_champion: int, neither: int, **options: Any) -> Pairing:
    """Return a pairing of a challenger and a champion with these numbers of images."""
    counts = [both, only_challenger, only_champion, neither]
    right = [np.repeat(pattern, counts) for pattern in ([1, 1, 0, 0], [1, 0, 1, 0])]
    return Pairing(tuple(predictions(each, **options) for each in right), True, (0, 0), 0, 0, 0)


BETTER = pairing(both=780, only_challenger=80, only_champion=20, neither=120)
EQUAL = pairing(both=750, only_challenger=50, only_champion=50, neither=150)


def looks(number: int, *, level: float | None = None) -> list[Look]:
    level = POLICY.look_level if level is None else level
    return [Look(each, f"old-{each}", "champion", level, "2026-01-01", "refused") for each in range(number)]


class Gate:
    """The gate with its arguments: its decision, and whether it allowed a look and had that charged."""

    def __init__(self, **changes: Any) -> None:
        test: Pairing = changes.pop("paired_test", BETTER)
        values: dict[str, Any] = {
            "challenger": GOOD,
            "champion_md5": "champion",
            "validation": BETTER,
            "test": SPLIT,
            "looks": [],
            "params": POLICY,
            **changes,
        }
        found = before_look(values.pop("challenger"), **values)
        self.has_look = isinstance(found, LookAllowed)
        self.is_charged = isinstance(found, LookAllowed) and found.charged is None
        self.decision = found if isinstance(found, Decision) else after_look(found, test, params=values["params"])


def failed(decision: Decision) -> list[str]:
    return [check.name for check in decision.checks if not check.passed]


def test_a_better_challenger_is_promoted_by_one_look_that_is_charged() -> None:
    gate = Gate()
    assert gate.is_charged
    assert (gate.decision.outcome, gate.decision.looks_used, gate.decision.looks_left) == ("promoted", 1, 99)
    assert gate.decision.level == pytest.approx(0.0005)
    assert "better than the champion on 1,000 test images: +6.00% of accuracy" in gate.decision.reason
    assert len(gate.decision.checks) == 12
    assert all(check.passed and check.found and check.allowed for check in gate.decision.checks)


def test_the_same_weights_are_unchanged_and_cost_no_look() -> None:
    gate = Gate(challenger=replace(GOOD, model_md5="champion"))
    assert (gate.decision.outcome, gate.decision.looks_used, gate.has_look) == ("unchanged", 0, False)


def test_without_a_champion_the_first_model_that_passes_its_checks_is_promoted_without_a_look() -> None:
    gate = Gate(champion_md5=None, validation=None, test=None)
    assert (gate.decision.outcome, gate.decision.looks_used, gate.has_look) == ("promoted", 0, False)
    assert [check.name for check in gate.decision.checks][-1] == "calibration error"
    assert Gate(champion_md5=None, challenger=replace(GOOD, calibration_error=0.2)).decision.outcome == "refused"


@pytest.mark.parametrize(
    ("challenger", "limits", "reason"),
    [
        ({"leaked_fraction": 0.08}, {}, "leaked test images: 8.00%; allowed: at most 5.00%"),
        ({"leaked_fraction": None}, {}, "leaked test images: unknown; allowed: at most 5.00%"),
        ({"megabytes": 501.0}, {}, "size of the weights: 501 MB; allowed: at most 500 MB"),
        ({}, {"max_latency_milliseconds": 20.0}, "time for one image: unknown; allowed: at most 20 ms"),
        (
            {"latency_milliseconds": 21.0},
            {"max_latency_milliseconds": 20.0},
            "time for one image: 21 ms; allowed: at most 20 ms",
        ),
    ],
)
def test_a_failed_check_refuses_and_costs_no_look(
    challenger: dict[str, Any], limits: dict[str, Any], reason: str
) -> None:
    gate = Gate(challenger=replace(GOOD, **challenger), params=policy(**limits))
    assert (gate.decision.outcome, gate.decision.reason, gate.has_look) == ("refused", reason, False)
    first = Gate(challenger=replace(GOOD, **challenger), params=policy(**limits), champion_md5=None)
    assert (first.decision.outcome, first.decision.reason) == ("refused", reason)


def test_an_unknown_time_passes_where_no_limit_is_set() -> None:
    check = next(check for check in Gate().decision.checks if check.name == "time for one image")
    assert (check.found, check.allowed, check.passed) == ("unknown", "any", True)


def test_planted_leakage_blocks_a_better_model() -> None:
    split = predictions(np.ones(100, int), confidence=0.99)
    planted = Candidate(
        "new", split, leaked=frozenset(split.content_hashes[:4]), trained_on=frozenset(["0" * 15 + "9"])
    )
    challenger = describe_challenger(planted, model_md5="new", megabytes=1.0)
    assert challenger.leaked_fraction == 0.05
    assert Gate(challenger=challenger).decision.outcome == "promoted"
    planted = replace(planted, leaked=frozenset(split.content_hashes[:6]))
    gate = Gate(challenger=describe_challenger(planted, model_md5="new", megabytes=1.0))
    assert (gate.decision.outcome, failed(gate.decision), gate.has_look) == ("refused", ["leaked test images"], False)


def test_the_figures_of_a_challenger_are_those_of_its_whole_test_split() -> None:
    challenger = describe_challenger(Candidate("new", predictions([1, 1, 1, 0])), model_md5="new", megabytes=2.0)
    assert challenger.calibration_error == pytest.approx(0.15)
    assert (challenger.leaked_fraction, challenger.latency_milliseconds) == (0.0, None)


def test_the_errors_of_the_champion_are_counted_without_leaked_images() -> None:
    champion = Candidate("old", predictions([0, 0, 1, 0]), leaked=frozenset(["0" * 16]))
    assert describe_test_split(champion) == TestSplit(images=3, champion_errors=2)


def test_where_even_a_perfect_model_is_not_shown_to_be_better_no_look_is_charged() -> None:
    gate = Gate(test=TestSplit(images=374, champion_errors=10))
    assert not gate.has_look
    assert gate.decision.reason == (
        "room for a gain on test: the champion is wrong on 10 of 374 images; allowed: at least 11, else even a perfect "
        "model is not shown to be better; evaluate on more test images"
    )
    assert Gate(test=TestSplit(images=374, champion_errors=11)).decision.outcome == "promoted"


def test_too_few_errors_for_the_minimum_gain_are_reported() -> None:
    gate = Gate(test=TestSplit(images=100_000, champion_errors=150))
    assert "wrong on 150 of 100,000 images; allowed: at least 200" in gate.decision.reason


def test_too_few_errors_on_validation_are_reported() -> None:
    few = pairing(both=96, only_challenger=4, only_champion=0, neither=0)
    gate = Gate(validation=few)
    assert (failed(gate.decision), gate.has_look) == (["room for a gain on validation"], False)
    assert "wrong on 4 of 100 images; allowed: at least 5" in gate.decision.reason


@pytest.mark.parametrize("validation", [EQUAL, None], ids=["no better", "no common image"])
def test_a_challenger_that_is_not_better_on_validation_costs_no_look(validation: Pairing | None) -> None:
    gate = Gate(validation=validation)
    assert (gate.decision.outcome, failed(gate.decision), gate.has_look) == ("refused", ["better on validation"], False)


def test_a_spent_budget_asks_for_new_test_data() -> None:
    gate = Gate(looks=looks(100))
    assert (gate.decision.outcome, gate.decision.looks_left, gate.has_look) == ("refused", 0, False)
    assert gate.decision.reason == (
        "looks at this test split: 100 charged, 0 left; allowed: 100, with levels of 0.05 in total; the budget is "
        "spent: new test data are needed"
    )
    assert Gate(looks=looks(99)).decision.looks_left == 0
    assert Gate(looks=looks(99)).decision.outcome == "promoted"


@pytest.mark.parametrize(("spent", "left"), [(0.04, 19), (0.05, 0), (0.0496, 0)])
def test_a_changed_policy_does_not_give_back_what_was_charged(spent: float, left: int) -> None:
    gate = Gate(looks=looks(5, level=spent / 5))
    assert gate.decision.looks_left == left
    assert gate.decision.outcome == ("promoted" if left else "refused")


def test_a_look_that_the_ledger_has_is_completed_at_its_level_without_being_charged_again() -> None:
    charged = Look(7, "new", "champion", 0.001, "2026-01-01")
    gate = Gate(looks=[*looks(99), charged])
    assert (gate.has_look, gate.is_charged) == (True, False)
    assert (gate.decision.outcome, gate.decision.level, gate.decision.looks_used) == ("promoted", 0.001, 100)


def test_a_look_at_other_models_is_charged() -> None:
    others = [Look(1, "new", "former", 0.0005, ""), Look(2, "other", "champion", 0.0005, "")]
    gate = Gate(looks=others)
    assert (gate.is_charged, gate.decision.looks_used) == (True, 3)


def test_a_look_at_other_predictions_of_the_same_models_is_charged() -> None:
    charged = Look(1, "new", "champion", 0.0005, "", predictions="former")
    assert Gate(looks=[charged], predictions="other").is_charged
    assert not Gate(looks=[charged], predictions="former").is_charged


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"differences": ["evaluate.checkpoint is last, that of the champion best"]}, "evaluated in the same way"),
        ({"rollback": "at 2026-01-01T00:00 UTC from the challenger to version 1"}, "rollback"),
    ],
)
def test_another_evaluation_or_a_rollback_refuses_and_costs_no_look(arguments: dict[str, Any], name: str) -> None:
    gate = Gate(**arguments)
    assert (failed(gate.decision), gate.has_look) == ([name], False)


def test_a_challenger_that_is_not_better_on_test_is_refused_and_the_look_is_spent() -> None:
    gate = Gate(paired_test=EQUAL)
    assert (gate.decision.outcome, gate.decision.looks_used, gate.decision.looks_left) == ("refused", 1, 99)
    assert failed(gate.decision) == ["better on test", "gain of accuracy on test"]
    assert gate.decision.figures is not None
    assert gate.decision.figures.detectable == pytest.approx(0.0412, abs=1e-4)


@pytest.mark.parametrize(("only_challenger", "outcome"), [(11, "promoted"), (10, "refused")])
def test_the_look_has_its_own_level(only_challenger: int, outcome: str) -> None:
    """11 of 11 images give p = 0.00049, just below 0.05 / 100; 10 of 10 give 0.00098."""
    test = pairing(both=900, only_challenger=only_challenger, only_champion=0, neither=89)
    assert Gate(paired_test=test).decision.outcome == outcome


def test_a_gain_below_the_minimum_is_refused() -> None:
    gate = Gate(params=policy(minimum_gain=0.07))
    assert failed(gate.decision) == ["gain of accuracy on test"]
    assert "+6.00%; allowed: at least +7.00%" in gate.decision.reason
    assert Gate(params=policy(minimum_gain=0.06)).decision.outcome == "promoted"


@pytest.mark.parametrize(("error", "found"), [(0.2, "0.2000"), (None, "unknown")])
def test_a_badly_calibrated_challenger_is_refused_after_the_look(error: float | None, found: str) -> None:
    gate = Gate(challenger=replace(GOOD, calibration_error=error))
    assert gate.decision.reason == f"calibration error: {found}; allowed: at most 0.1000"
    assert gate.is_charged


def test_of_many_worse_classes_five_are_listed_with_short_names() -> None:
    names = tuple(f"{number}" * 200 for number in range(8))
    worse = tuple(ClassDifference(name, 50, 0.5, 0.9, 1e-9, 1e-7) for name in names)
    check = _classes_check(worse, POLICY)
    assert not check.passed
    assert check.found.endswith(f", {'4' * 40} -40.00%, and 3 more")


def test_a_class_that_is_shown_to_be_worse_refuses_a_better_model() -> None:
    challenger, champion = np.ones(1000, int), np.ones(1000, int)
    champion[1::2][:200] = 0
    challenger[0::2][:40] = 0
    test = Pairing((predictions(challenger), predictions(champion)), True, (0, 0), 0, 0, 0)
    gate = Gate(paired_test=test)
    assert failed(gate.decision) == ["recall of classes shown to be worse"]
    assert "a -8.00%; allowed: at least -5.00%" in gate.decision.reason
    assert Gate(paired_test=test, params=policy(max_class_recall_loss=0.08)).decision.outcome == "promoted"
