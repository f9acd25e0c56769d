"""Render the comparison of models and recipes as one HTML page, which needs no other file and no network."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifacts import Images
from pipeline.comparison.models import ModelComparison
from pipeline.comparison.recipes import RecipeComparison
from pipeline.reporting.data import Row


@dataclass(frozen=True)
class Fact:
    """A statement about a model, such as its MLflow run; `value` is None if unknown, `link` an address or empty."""

    name: str
    value: str | None
    link: str = ""


@dataclass(frozen=True)
class ComparedModel:
    """A model or recipe in the comparison: its name, what is known about it, and the commands that make it again.

    A command comes with its purpose before it. `seeds` names the seeds of a recipe, in the order of the accuracies in
    its `RecipeComparison`; it is empty for a single model.
    """

    label: str
    facts: Sequence[Fact] = ()
    commands: Sequence[tuple[str, str]] = ()
    seeds: Sequence[str] = ()


@dataclass(frozen=True)
class Differing:
    """A parameter, file of code or kind of data that differs: its value in each model, A first; None is unknown."""

    what: str
    values: Sequence[str | None]


@dataclass(frozen=True)
class Against:
    """The answers to both questions about A and one other model; without an answer, the reason why."""

    model: ModelComparison | None
    recipe: RecipeComparison | None
    model_reason: str = ""
    recipe_reason: str = ""


@dataclass(frozen=True)
class TestImages:
    """The test images (N, H, W, C) uint8 and the content hash of the file of each, as in the predictions."""

    images: Images
    content_hashes: Sequence[str]


@dataclass(frozen=True)
class ComparisonPage:
    """All that the page shows: A is the first of `models`, and `against` compares it with each of the others in order.

    `dataset` is `dataset.json` of A. `parameters`, `code` and `data` are what differs, None if unknown. `test_images`
    is None where the arrays are not in the cache. `commands` repeat the comparison, each with its purpose before it.
    """

    title: str
    models: Sequence[ComparedModel]
    against: Sequence[Against]
    dataset: Row
    parameters: Sequence[Differing] | None
    code: Sequence[Differing] | None
    data: Sequence[Differing] | None
    test_images: TestImages | None
    commands: Sequence[tuple[str, str]]
    output: Path


def render(page: ComparisonPage) -> str:
    """Return the page as text; names from files and from the runs are escaped."""
    raise NotImplementedError(page.title)
