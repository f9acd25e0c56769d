"""State the answers of a comparison in the same words on the page, in the terminal and in Prefect."""

from dataclasses import dataclass
from typing import Literal

from pipeline.comparison.models import Difference, ModelComparison, Verdict
from pipeline.comparison.recipes import RecipeComparison
from pipeline.reporting.text import NO_BREAK_SPACE, confidence, distance, points, probability

MODEL_QUESTION = "Is this model better on images like these?"
RECIPE_QUESTION = "Is this recipe better, whatever its seed?"


@dataclass(frozen=True)
class Answer:
    """The answer to a question: what is claimed, and the figures behind it or the reason why there is no answer.

    `str` gives one sentence of plain text. The names in `claim` are those that the caller passed, so that a caller
    escapes them for HTML or Markdown before; `evidence` has no names of models, but a reason may have any text.
    """

    verdict: Verdict | Literal["not answered"]
    claim: str
    evidence: str

    def __str__(self) -> str:
        return f"{self.claim}: {self.evidence}."


def model_verdict(comparison: ModelComparison, *, a: str, b: str) -> Answer:
    """Answer whether model A is better than model B on images like these."""
    verdict, p_value = comparison.verdict, f"p{NO_BREAK_SPACE}{probability(comparison.p_value)}"
    size, interval = _describe(verdict, comparison.accuracy, level=comparison.level)
    if verdict == "not shown":
        claim = f"It is not shown that model {a} is better or worse than model {b} on images like these"
        limit = detectable_by_images(comparison)
        return Answer(verdict, claim, f"the difference of accuracies is {size} ({interval}; {p_value}), and {limit}")
    claim = f"Model {a} is {verdict} than model {b} on images like these"
    return Answer(verdict, claim, f"its accuracy is {size} ({interval}; {p_value})")


def recipe_verdict(comparison: RecipeComparison | None, *, a: str, b: str, reason: str = "") -> Answer:
    """Answer whether recipe A is better than recipe B, or give the reason without a comparison."""
    if comparison is None:
        return Answer(
            "not answered", f"Whether recipe {a} is better than recipe {b} is not answered", reason.rstrip(".")
        )
    verdict = comparison.verdict
    size, interval = _describe(verdict, comparison.accuracy, level=comparison.level)
    seeds = f"{len(comparison.accuracies_a)} and {len(comparison.accuracies_b)} seeds"
    if verdict == "not shown":
        claim = f"It is not shown that recipe {a} is better or worse than recipe {b}"
        limit = f"the smallest difference that {seeds} can show is {distance(comparison.detectable)} points"
        return Answer(verdict, claim, f"the difference of mean accuracies is {size} ({interval}), and {limit}")
    claim = f"Recipe {a} is {verdict} than recipe {b}"
    return Answer(verdict, claim, f"its mean accuracy is {size} ({interval}; {seeds})")


def detectable_by_images(comparison: ModelComparison) -> str:
    """Return, as a clause, the smallest difference that the images of a comparison show with 80 % power."""
    images = f"these {len(comparison.pairing):,} test images"
    if comparison.detectable is None:
        disagreeing = f"{comparison.only_a + comparison.only_b:,}"
        return f"{images} are too few to show a difference of models that disagree on {disagreeing} of them"
    return f"the smallest difference that {images} can show is {distance(comparison.detectable)} points"


def _describe(verdict: str, difference: Difference, *, level: float) -> tuple[str, str]:
    """Return the difference of accuracies and its interval: with signs where no difference is shown."""
    low, high, value = difference.low, difference.high, difference.difference
    decimals = 1 if all(distance(end) != "0.0" for end in (low, high)) else 2  # an end is hardly ever rounded to 0
    found = f"{confidence(level)} interval"
    if verdict == "not shown":
        return f"{points(value, decimals)} points", f"{found} {points(low, decimals)} to {points(high, decimals)}"
    near, far = sorted((distance(low, decimals), distance(high, decimals)), key=float)
    return f"{distance(value, decimals)} points {'higher' if value > 0 else 'lower'}", f"{found} {near} to {far} points"
