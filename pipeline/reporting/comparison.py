"""Render the comparison of models and recipes as one HTML page, which needs no other file and no network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

from markupsafe import Markup

from pipeline.artifacts import Images
from pipeline.comparison.models import ClassDifference, ModelComparison
from pipeline.comparison.paired import POWER
from pipeline.comparison.recipes import RecipeComparison
from pipeline.reporting import comparison_figures as figures
from pipeline.reporting.changed_images import ChangedImage, only_right, with_known_pictures
from pipeline.reporting.data import Row, shown_names
from pipeline.reporting.gallery import Picture
from pipeline.reporting.template import render_template
from pipeline.reporting.text import label
from pipeline.reporting.verdict import (
    MODEL_QUESTION,
    RECIPE_QUESTION,
    Answer,
    detectable_by_images,
    model_verdict,
    recipe_verdict,
)

MAX_NAME_LENGTH = 80  # in an answer
MAX_CHANGED_LISTED = 300  # in the table of the images that only one model gets right
# the metrics in the table: key, name, whether it is a fraction, whether it is better if higher
METRICS = (
    ("accuracy", "accuracy", True, True),
    ("macro_f1", "macro F1", True, True),
    ("loss", "cross-entropy in nats", False, False),
    ("calibration_error", "expected calibration error", True, False),
)


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
    """The answers to both questions about A and one other model; without one about recipes, the reason why."""

    model: ModelComparison
    recipe: RecipeComparison | None
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


@dataclass(frozen=True)
class _Side:
    """The images that only one model gets right, the letter of that model, and the first of them with pictures."""

    letter: str
    images: Sequence[ChangedImage]
    pictures: Sequence[tuple[ChangedImage, Picture | None]]


@dataclass(frozen=True)
class _Pair:
    """A and one other model as the template shows them; the letters `a` and `b` stand for their names."""

    a: str
    b: str
    model: ModelComparison
    recipe: RecipeComparison | None
    figure: Markup
    strip: Markup | None
    classes: Sequence[ClassDifference]  # the lowest p-value first
    changed: Sequence[_Side]


def render(page: ComparisonPage) -> str:
    """Return the page as text; names from files and from the runs are escaped."""
    letters = ascii_uppercase[: len(page.models)]
    rows = {} if page.test_images is None else {key: row for row, key in enumerate(page.test_images.content_hashes)}
    pairs = [_pair(page, against, b=b, rows=rows) for against, b in zip(page.against, letters[1:], strict=True)]
    return render_template(
        "comparison.html.j2",
        page=page,
        letters=letters,
        questions=_questions(page),
        pairs=pairs,
        is_calibrated=all(each.model.pairing.is_calibrated for each in pairs),
        recipe_pairs=[each for each in pairs if each.recipe],
        metrics=METRICS,
        detectable_by_images=detectable_by_images,
        max_listed=MAX_CHANGED_LISTED,
        power=POWER,
    )


def _answers(page: ComparisonPage, names: Sequence[str]) -> list[tuple[str, list[Answer]]]:
    """Return each question with its answers for A and each of the other models, which have these names."""
    models, recipes = list[Answer](), list[Answer]()
    for each, b in zip(page.against, names[1:], strict=True):
        models.append(model_verdict(each.model, a=names[0], b=b))
        recipes.append(recipe_verdict(each.recipe, a=names[0], b=b, reason=each.recipe_reason))
    return [(MODEL_QUESTION, models), (RECIPE_QUESTION, recipes)]


def _questions(page: ComparisonPage) -> list[tuple[str, list[tuple[Answer, Markup]]]]:
    """Return each question with its answers, and the claim of each as markup in which the names are isolated."""
    names = [_short_name(each.label) for each in page.models]
    places = [f"{{{index}}}" for index in range(len(names))]  # the claims name the models {0}, {1}, …
    return [
        (question, [(each, Markup(each.claim).format(*names)) for each in found])  # noqa: S704  # only places
        for question, found in _answers(page, places)
    ]


def _short_name(name: str) -> Markup:
    """Return a name as markup, the end of a long one only as a tooltip: the page lists the whole names besides."""
    short = name if len(name) <= MAX_NAME_LENGTH else f"{name[:MAX_NAME_LENGTH].rstrip()}…"
    return Markup('<bdi title="{}">{}</bdi>').format(label(name), label(short))


def _pair(page: ComparisonPage, against: Against, *, b: str, rows: Mapping[str, int]) -> _Pair:
    a, model, recipe = ascii_uppercase[0], against.model, against.recipe
    return _Pair(
        a=a,
        b=b,
        model=model,
        recipe=recipe,
        figure=figures.advantages(model, a=a, b=b, name=f"advantages-{b}"),
        strip=figures.seeds(recipe, a=a, b=b, name=f"seeds-{b}") if recipe else None,
        classes=sorted(model.classes, key=lambda each: each.p_value),
        changed=_changed(page, model, letters=(a, b), rows=rows),
    )


def _changed(
    page: ComparisonPage, model: ModelComparison, *, letters: tuple[str, str], rows: Mapping[str, int]
) -> list[_Side]:
    names = shown_names(model.pairing.a.names, dataset=page.dataset)
    images = page.test_images.images if page.test_images else None
    found = [(letter, only_right(model.pairing, names, of_a=letter == letters[0])) for letter in letters]
    return [_Side(letter, changed, with_known_pictures(changed, images, rows=rows)) for letter, changed in found]
