"""The page of a comparison: figures are recomputed, nothing is requested, no name injects anything."""

import base64
import io
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import f1_score, log_loss

from pipeline.comparison import models
from pipeline.comparison.models import Difference, ModelComparison, compare_models
from pipeline.comparison.pairing import Candidate, pair
from pipeline.comparison.recipes import RecipeComparison, compare_recipes
from pipeline.evaluation.predictions import Predictions
from pipeline.reporting.comparison import (
    Against,
    ComparedModel,
    ComparisonPage,
    Differing,
    Fact,
    render,
)
from pipeline.reporting.comparison import (
    TestImages as KnownImages,
)
from pipeline.reporting.verdict import model_verdict, recipe_verdict
from tests.browser import needs_chromium, open_browser
from tests.report_page import HOSTILE_FILE, HOSTILE_NAMES, Page

HOSTILE = "\"><script>alert('x')</script>{{ 7*7 }} {0} {a}"
CLASSES = [*HOSTILE_NAMES, *(f"class {index}" for index in range(100))][:100]
NUMBER = 400
GENERATOR = np.random.default_rng(3)
ACTUAL = np.arange(NUMBER) % len(CLASSES)
IMAGES = GENERATOR.integers(0, 256, (NUMBER, 32, 32, 3), dtype=np.uint8)
HASHES = [f"{index:016x}" for index in range(NUMBER)]


def predictions(accuracy: float, *, seed: int, numbers: Sequence[int] = range(NUMBER)) -> Predictions:
    """Return predictions for some of the images, of which about this fraction is right."""
    generator, chosen = np.random.default_rng(seed), np.array(numbers)
    logits = generator.normal(0, 1, (NUMBER, len(CLASSES)))
    right = generator.random(NUMBER) < accuracy
    logits[np.arange(NUMBER), np.where(right, ACTUAL, (ACTUAL + 1) % len(CLASSES))] += 9
    probabilities = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True))[chosen].astype(np.float32)
    calibrated = (probabilities**0.5 / (probabilities**0.5).sum(1, keepdims=True)).astype(np.float32)
    return Predictions(
        class_names=tuple(CLASSES),
        names=[f"{HOSTILE_FILE}{index}.png" for index in numbers],
        content_hashes=[HASHES[index] for index in numbers],
        actual=ACTUAL[chosen],
        predicted=probabilities.argmax(1),
        probabilities=probabilities,
        calibrated_probabilities=calibrated,
    )


A, B, C = predictions(0.9, seed=1), predictions(0.7, seed=2), predictions(0.88, seed=3, numbers=range(20, NUMBER))


@pytest.fixture(scope="module", autouse=True)
def few_draws() -> Iterator[None]:
    """Draw less often for the intervals by bootstrap, on which no test depends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "RESAMPLES", 100)
        yield


@pytest.fixture(scope="module")
def comparison() -> ModelComparison:
    return compare_models(pair(Candidate("A", A), Candidate("B", B)))


@pytest.fixture(scope="module")
def recipes() -> RecipeComparison:
    correct = [[predictions(accuracy, seed=seed).is_correct for seed in range(4)] for accuracy in (0.9, 0.7)]
    return compare_recipes(*map(np.array, correct))


@pytest.fixture(scope="module")
def made(comparison: ModelComparison, recipes: RecipeComparison) -> ComparisonPage:
    """Return the content of a page of three models with hostile names and 100 classes."""
    other = compare_models(
        pair(Candidate("A", A, trained_on=frozenset(HASHES[20:22])), Candidate("C", C, leaked=frozenset(HASHES[30:35])))
    )
    fact = Fact(HOSTILE, HOSTILE, "javascript:alert(1)")
    return ComparisonPage(
        title=HOSTILE,
        models=[
            ComparedModel(HOSTILE, [fact, Fact("flow run", None)], [(HOSTILE, HOSTILE)], [HOSTILE] * 4),
            ComparedModel("b" * 300, seeds=["1", "2", "3", "4"]),
            ComparedModel("third"),
        ],
        against=[Against(comparison, recipes), Against(other, None, recipe_reason=f"one seed, {HOSTILE}; `run` it")],
        dataset={"dataset": "imagefolder"},
        parameters=[Differing(HOSTILE, [HOSTILE, None, "3"])],
        code=[],
        data=None,
        test_images=KnownImages(IMAGES, HASHES),
        commands=[("compare again", f"compare {HOSTILE}")],
        output=Path("artifacts/comparison.html"),
    )


@pytest.fixture(scope="module")
def page(made: ComparisonPage) -> Page:
    return Page(render(made))


def test_every_figure_of_two_models_is_recomputed(page: Page) -> None:
    right_a, right_b = A.predicted == ACTUAL, B.predicted == ACTUAL
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    exact = binomtest(only_a, only_a + only_b).pvalue
    expected = {
        "accuracy/B/a": right_a.mean(),
        "accuracy/B/b": right_b.mean(),
        "accuracy/B/difference": right_a.mean() - right_b.mean(),
        "macro_f1/B/a": f1_score(ACTUAL, A.predicted, average="macro"),
        "loss/B/b": log_loss(ACTUAL, B.calibrated_probabilities, labels=range(len(CLASSES))),
        "agreement/B/both": (right_a & right_b).sum(),
        "agreement/B/only_a": only_a,
        "agreement/B/only_b": only_b,
        "agreement/B/neither": (~right_a & ~right_b).sum(),
        "p/B": exact,
        "changed/B/A": only_a,
        "changed/B/B": only_b,
        "images/B": NUMBER,
    }
    expected |= {f"class/recall_a/B/{name}": right_a[i == ACTUAL].mean() for i, name in enumerate(CLASSES[20:], 20)}
    shown = dict(page.metrics)
    assert {name: shown[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_the_images_left_out_are_counted(page: Page) -> None:
    shown = dict(page.metrics)
    left_out = {name.rpartition("/")[2]: value for name, value in page.metrics if name.startswith("left_out/C/")}
    assert left_out == {"0": 20, "1": 0, "trained_on": 2, "leaked": 5, "relabeled": 0}
    assert shown["images/C"] == NUMBER - 20 - 2 - 5
    assert "same test split\nno" in re.sub(r"(?<=split)(?=no)", "\n", page.text)


def test_the_gallery_shows_the_surest_changed_images_with_their_pictures(
    comparison: ModelComparison, page: Page
) -> None:
    assert A.calibrated_probabilities is not None
    assert B.calibrated_probabilities is not None
    sure = A.calibrated_probabilities.max(1) + B.calibrated_probabilities.max(1)
    changed = np.flatnonzero((A.predicted == ACTUAL) & (B.predicted != ACTUAL))
    first = changed[np.argsort(-sure[changed])][:12]
    shown = [str(each["src"]).partition(",")[2] for each in page.all("img")][:12]
    for index, source in zip(first, shown, strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(source)))), IMAGES[index])
    probabilities = dict(page.metrics)
    assert probabilities[f"changed/B/a/{first[0]}"] == pytest.approx(A.calibrated_probabilities[first[0]].max())
    assert comparison.only_a > 12


def test_a_picture_that_is_missing_is_unknown(made: ComparisonPage) -> None:
    html = render(replace(made, test_images=KnownImages(IMAGES[:0], [])))
    assert '<div class="no-picture">picture<br>unknown</div>' in html
    without = Page(render(replace(made, test_images=None)))
    assert not without.all("img")
    assert "The pictures are unknown: the arrays of the test images are not in the cache." in without.text


def test_the_page_requests_nothing_and_is_accessible(page: Page) -> None:
    page.check_requests_nothing()
    page.check_links_and_alternatives()
    assert len(page.all("svg")) == 3
    assert len(page.all("img")) > 30


def test_names_from_outside_are_text_and_nothing_else(page: Page) -> None:
    for name in [HOSTILE, *(each.replace("\u202e", "\\u202e") for each in HOSTILE_NAMES)]:
        assert name in page.text
    assert page.text.count(f"Model {HOSTILE} is better than model {'b' * 80}… on images like these") == 1
    assert "javascript:" not in page.html
    assert "\x1b" not in page.html
    assert not [each for each in page.all("a") if not str(each["href"]).startswith("#")]


def test_the_page_of_100_classes_and_three_models_is_small_and_soon_made(made: ComparisonPage) -> None:
    start = time.process_time()
    assert len(render(made).encode()) <= 3_000_000
    assert time.process_time() - start < 5


def test_a_question_without_an_answer_has_its_reason_and_no_section(made: ComparisonPage) -> None:
    against = [replace(each, recipe=None, recipe_reason="one seed") for each in made.against]
    page = Page(render(replace(made, against=against)))
    assert page.text.count("is not answered: one seed.") == 2
    assert "seeds" not in {str(each.get("id")) for each in page.all("section")}
    page.check_links_and_alternatives()


def test_levels_and_calibration_are_those_of_all_pairs(made: ComparisonPage) -> None:
    raw = Candidate("C", replace(C, calibrated_probabilities=None))
    third = compare_models(pair(Candidate("A", A), raw), level=0.05 / 3)
    text = Page(render(replace(made, against=[made.against[0], Against(third, None)]))).text.replace("\u00a0", " ")
    assert "where p is at most 1.667 % and" in text
    assert "(level 1.667 %, 80 % power" in text
    assert "with its probability. Those" in text
    calibrated = Page(render(made)).text
    assert "with its probability, which is calibrated. Those" in calibrated


def test_what_differs_is_shown_as_different_same_or_unknown(made: ComparisonPage, page: Page) -> None:
    part = page.text[page.text.index("What differs\n") :]
    assert re.search(r"unknown3\n[\s\S]*The code is the same\.\n[\s\S]*What differs: unknown\.", part)
    assert page.text.count(f"compare {HOSTILE}") == len(made.commands)


def test_the_page_has_the_answers_in_the_words_of_the_terminal(made: ComparisonPage) -> None:
    named = [replace(model, label=name) for model, name in zip(made.models, ("one", "two", "three"), strict=True)]
    words = re.sub(r"\s+", " ", Page(render(replace(made, models=named))).text)
    for against, b in zip(made.against, ("two", "three"), strict=True):
        answer = model_verdict(against.model, a="one", b=b)
        assert re.sub(r"\s+", " ", str(answer)) in words
    assert re.sub(r"\s+", " ", str(recipe_verdict(made.against[0].recipe, a="one", b="two"))) in words


def with_difference(comparison: ModelComparison, *values: float, p_value: float) -> ModelComparison:
    return replace(comparison, accuracy=Difference(*values), p_value=p_value)


@pytest.mark.parametrize(
    ("values", "p_value", "text"),
    [
        (
            (0.921, 0.9, 0.014, 0.028),
            0.0004,
            "Model x is better than model y on images like these: its accuracy is 2.1 points higher "
            "(95 % interval 1.4 to 2.8 points; p < 0.001).",
        ),
        (
            (0.9, 0.921, -0.028, -0.0003),
            0.041,
            "Model x is worse than model y on images like these: its accuracy is 2.10 points lower "
            "(95 % interval 0.03 to 2.80 points; p = 0.041).",
        ),
        (
            (0.903, 0.9, -0.01, 0.016),
            0.61,
            "It is not shown that model x is better or worse than model y on images like these: the difference of "
            "accuracies is +0.3 points (95 % interval \u22121.0 to +1.6; p = 0.61), and the smallest difference that "
            "these 400 test images can show is 3.3 points.",
        ),
        (
            (0.92, 0.9, 0.014, 0.028),
            0.06,
            "It is not shown that model x is better or worse than model y on images like these: the difference of "
            "accuracies is +2.0 points (95 % interval +1.4 to +2.8; p = 0.06), and the smallest difference that these "
            "400 test images can show is 3.3 points.",
        ),
    ],
)
def test_the_answer_for_models_is_one_plain_sentence(
    comparison: ModelComparison, values: tuple[float, ...], p_value: float, text: str
) -> None:
    found = with_difference(replace(comparison, detectable=0.033), *values, p_value=p_value)
    assert str(model_verdict(found, a="x", b="y")).replace("\u00a0", " ") == text


def test_images_that_can_show_no_difference_are_called_too_few(comparison: ModelComparison) -> None:
    found = replace(with_difference(comparison, 0.9, 0.9, -0.1, 0.1, p_value=1.0), detectable=None, only_a=1, only_b=1)
    end = "and these 400 test images are too few to show a difference of models that disagree on 2 of them."
    assert str(model_verdict(found, a="x", b="y")).endswith(end)


def test_the_answer_for_recipes_is_one_plain_sentence(recipes: RecipeComparison) -> None:
    found = replace(recipes, accuracy=Difference(0.72, 0.55, 0.16, 0.18))
    assert str(recipe_verdict(found, a="x", b="y")).replace("\u00a0", " ") == (
        "Recipe x is better than recipe y: its mean accuracy is 17.0 points higher "
        "(95 % interval 16.0 to 18.0 points; 4 and 4 seeds)."
    )
    equal = replace(recipes, accuracy=Difference(0.72, 0.72, -0.01, 0.01), detectable=0.012)
    assert str(recipe_verdict(equal, a="x", b="y")).endswith(
        "and the smallest difference that 4 and 4 seeds can show is 1.2 points."
    )


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
def test_the_page_fits_the_window_of_a_real_browser(tmp_path: Path, page: Page, width: int, dark: bool) -> None:
    file = tmp_path / "comparison.html"
    file.write_text(page.html)
    with open_browser() as browser:
        browser.open(file.as_uri(), width=width, dark=dark)
        assert browser.value_of("document.documentElement.scrollWidth") <= width
        assert browser.value_of("[...document.images].filter(each => !each.naturalWidth).length") == 0
        assert {url for url in browser.requested if not url.startswith("data:")} == {file.as_uri()}
