"""State the answers of a comparison in the same words on the page, in the terminal and in Prefect."""

from dataclasses import dataclass

from pipeline.comparison.models import ModelComparison
from pipeline.comparison.paired import POWER
from pipeline.comparison.recipes import RecipeComparison
from pipeline.reporting.text import distance, percent, points, probability

MODEL_QUESTION = "Is this model better on images like these?"
RECIPE_QUESTION = "Is this recipe better, whatever its seed?"


@dataclass(frozen=True)
class Sentence:
    """The answer to a question: what is claimed, and the figures behind it or the reason why there is no answer."""

    claim: str
    evidence: str

    def __str__(self) -> str:
        return f"{self.claim}: {self.evidence}."


def model_verdict(comparison: ModelComparison | None, *, a: str, b: str, reason: str = "") -> Sentence:
    """Answer whether model A is better than model B on images like these; without a comparison, give the reason.

    The names `a` and `b` are inserted as they are: the caller escapes them for a page or for Markdown.
    """
    if comparison is None:
        return Sentence(f"Whether model {a} is better than model {b} is not answered", reason.rstrip("."))
    difference = comparison.accuracy
    interval = f"{percent(1 - comparison.level, 0)} interval"
    p_value = f"p {probability(comparison.p_value)}"
    if comparison.verdict == "not shown":
        return Sentence(
            f"It is not shown that model {a} is better or worse than model {b} on images like these",
            f"the difference of accuracies is {points(difference.difference)} points ({interval} "
            f"{points(difference.low)} to {points(difference.high)}; {p_value}); {_model_limit(comparison)}",
        )
    return Sentence(
        f"Model {a} is {comparison.verdict} than model {b} on images like these",
        f"its accuracy is {_size(comparison.verdict, difference.difference)} ({interval} "
        f"{_ends(difference.low, difference.high)}; {p_value})",
    )


def recipe_verdict(comparison: RecipeComparison | None, *, a: str, b: str, reason: str = "") -> Sentence:
    """Answer whether recipe A is better than recipe B, whatever the seed; without a comparison, give the reason.

    The names `a` and `b` are inserted as they are: the caller escapes them for a page or for Markdown.
    """
    if comparison is None:
        return Sentence(f"Whether recipe {a} is better than recipe {b} is not answered", reason.rstrip("."))
    difference = comparison.accuracy
    seeds = f"{len(comparison.accuracies_a)} and {len(comparison.accuracies_b)} seeds"
    interval = f"{percent(1 - comparison.level, 0)} interval"
    if comparison.verdict == "not shown":
        return Sentence(
            f"It is not shown that recipe {a} is better or worse than recipe {b}",
            f"the difference of the mean accuracies of {seeds} is {points(difference.difference)} points ({interval} "
            f"{points(difference.low)} to {points(difference.high)}); the smallest difference that these seeds can "
            f"show is {distance(comparison.detectable)} points",
        )
    return Sentence(
        f"Recipe {a} is {comparison.verdict} than recipe {b}",
        f"the mean accuracy of its seeds is {_size(comparison.verdict, difference.difference)} ({interval} "
        f"{_ends(difference.low, difference.high)}; {seeds})",
    )


def _model_limit(comparison: ModelComparison) -> str:
    """Return what difference the images of a comparison can show."""
    images = f"{len(comparison.pairing):,} test images"
    if comparison.detectable is None:
        return f"the models disagree on too few of these {images} to show any difference with {percent(POWER, 0)} power"
    return f"the smallest difference that these {images} can show is {distance(comparison.detectable)} points"


def _size(verdict: str, difference: float) -> str:
    return f"{distance(difference)} points {'higher' if verdict == 'better' else 'lower'}"


def _ends(low: float, high: float) -> str:
    """Return the ends of an interval without 0, as sizes of the difference: the smaller one first."""
    return " to ".join(map(distance, sorted((low, high), key=abs)))
