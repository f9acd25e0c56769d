"""The result of a comparison in the terminal."""

from collections.abc import Iterator, Sequence
from string import ascii_uppercase

import numpy as np

from flows.comparison import Comparison, Question
from flows.stored_models import SHORT_ID, Model, describe_code
from flows.summary_text import GAP, WIDTH, aligned, wrapped
from pipeline.comparison.models import Difference, ModelComparison
from pipeline.comparison.paired import POWER
from pipeline.comparison.pairing import Pairing
from pipeline.comparison.recipes import RecipeComparison
from pipeline.core.errors import escape_control_chars
from pipeline.reporting.comparison import Against, Differing
from pipeline.reporting.data import shown_names
from pipeline.reporting.text import (
    MINUS,
    confidence,
    distance,
    percent,
    percentage,
    points,
    probability,
)
from pipeline.reporting.verdict import MODEL_QUESTION, RECIPE_QUESTION, model_verdict, recipe_verdict

MAX_IMAGES = 5  # that changed sides, named for each side
MAX_CODE_ROWS = 12
SEEDS_NOTE = (
    "Two seeds of one recipe are different models too, and this question often finds them different: no error, but no "
    "statement about recipes either."
)


def as_text(comparison: Comparison) -> str:
    """Return the comparison: what is compared, what differs, and the answers to both questions for each other model."""
    lines = [*aligned(list(_models(comparison))), "", *aligned(list(_what_differs(comparison)))]
    has_recipes = any(against.recipe for against in comparison.against)
    for number, against in enumerate(comparison.against, 1):
        letters = ascii_uppercase[0], ascii_uppercase[number]
        lines += ["", *_model_answer(comparison, against, letters=letters)]
        if has_recipes or number == len(comparison.against):
            lines += ["", *_recipe_answer(comparison, against, letters=letters)]
    return "\n".join([*lines, "", *wrapped(outcome(comparison))])


def outcome(comparison: Comparison) -> str:
    """Return which question decides the exit status, how, and at which level."""
    number = len(comparison.against)
    others = "B" if number == 1 else "all others"
    found = {0: f"A is better than {others}", 4: "A is worse than " + ("B" if number == 1 else "one of the others")}
    text = found.get(comparison.exit_status, f"it is not shown that A is better than {others}")
    level = f"level {percentage(comparison.level)}"
    if number > 1:
        level += f", divided by the {number} comparisons: {percentage(comparison.level / number)} each (Bonferroni)"
    return f"By the question about {comparison.question}s: {text} ({level}); exit status {comparison.exit_status}."


def _question(comparison: Comparison, question: Question, *, letters: tuple[str, str]) -> list[str]:
    """Return the lines of a question; of several comparisons, with the letters of the two that it is about."""
    text = {"model": MODEL_QUESTION, "recipe": RECIPE_QUESTION}[question]
    pair = f"{letters[0]} against {letters[1]}: " if len(comparison.against) > 1 else ""
    decides = " (This question decides the exit status.)" if comparison.question == question else ""
    return wrapped(f"{pair}{text}{decides}")


def _models(comparison: Comparison) -> Iterator[tuple[str, str]]:
    for letter, group, model in zip(ascii_uppercase, comparison.groups, comparison.models, strict=False):
        text = escape_control_chars(group.label)
        if len(group.models) > 1:
            text += f": {len(group.models)} seeds; the best on validation is {_seed(model)}"
        details = [f"model {model.model_md5[:SHORT_ID]}", describe_code(model) or "commit unknown"]
        details += [f"MLflow run {group.run_id[:SHORT_ID]}"] if group.run_id else []
        yield letter, f"{text}\n{', '.join(details)}"


def _seed(model: Model) -> str:
    seed = model.params.get("train.seed")
    return f"seed {seed}" if seed else escape_control_chars(model.label)


def _what_differs(comparison: Comparison) -> Iterator[tuple[str, str]]:
    kinds = {"parameters": comparison.parameters, "code": comparison.code, "data": comparison.data}
    for name, rows in kinds.items():
        yield name, "\n".join(_rows(rows)) if rows else "unknown of one of them" if rows is None else "the same"
    if comparison.is_one_recipe:
        same = {model.model_md5 for group in comparison.groups for model in group.models}
        yield "so", "they are the same model" if len(same) == 1 else "they are seeds of one recipe"


def _rows(rows: Sequence[Differing]) -> list[str]:
    lines = [
        f"{escape_control_chars(row.what)}: "
        + ", ".join(
            f"{letter} {'unknown' if value is None else escape_control_chars(value)}"
            for letter, value in zip(ascii_uppercase, row.values, strict=False)
        )
        for row in rows[:MAX_CODE_ROWS]
    ]
    return [*lines, f"and {len(rows) - MAX_CODE_ROWS} more"] if len(rows) > MAX_CODE_ROWS else lines


def _model_answer(comparison: Comparison, against: Against, *, letters: tuple[str, str]) -> list[str]:
    """Return the lines of the question about models."""
    found, (a, b) = against.model, letters
    lines = _question(comparison, "model", letters=letters)
    rows = [
        ("answer", str(model_verdict(found, a=a, b=b))),
        ("images", _images(found.pairing, letters=letters)),
        ("figures", _probabilities(found.pairing)),
        *_changed_sides(found, letters=letters, comparison=comparison),
        ("classes", _classes(found, letters=letters)),
        ("can show", detectable(found)),
        *([("note", SEEDS_NOTE)] if against is comparison.against[0] else []),
    ]
    first, rest = (aligned(part, width=WIDTH - GAP) for part in (rows[:2], rows[2:]))
    return [*lines, *_indented([*first, "", *_table(found, letters=letters), "", *rest])]


def _probabilities(pairing: Pairing) -> str:
    """Return which probabilities the last two rows of the table are of: `compare_models` uses one kind for both."""
    kind = "calibrated" if pairing.is_calibrated else "raw (one of the models has no known temperature)"
    return f"cross-entropy and calibration error are of the {kind} probabilities"


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"{'':<{GAP}}{line}".rstrip() for line in lines]


def detectable(found: ModelComparison) -> str:
    """Return the smallest difference that the test images can show."""
    start = (
        f"the smallest difference that this test set can show at the {percentage(found.level)} level with "
        f"{percentage(POWER)} power"
    )
    if found.detectable is None:
        return f"{start}: none, since the models disagree on too few images"
    disagree = percent((found.only_a + found.only_b) / len(found.pairing))
    return (
        f"{start}: {distance(found.detectable)} points of accuracy, between models of which one alone is right on as "
        f"many images as here ({disagree})"
    )


def _images(pairing: Pairing, *, letters: tuple[str, str]) -> str:
    """Return the number of images that are compared, and of those that are left out, with the reasons."""
    splits = "the same test split" if pairing.same_split else "different test splits: only images in both are compared"
    reasons = [
        f"{number:,} {text}"
        for number, text in (
            *(
                (each, f"are only in the test split of {x}")
                for each, x in zip(pairing.not_common, letters, strict=True)
            ),
            (pairing.trained_on, "were used to train one of them"),
            (pairing.leaked, "have a duplicate or near-duplicate in the training data of one of them"),
            (pairing.relabeled, "have different classes in the two data sets"),
        )
        if number
    ]
    return f"{len(pairing):,} test images, {splits}; left out: {', '.join(reasons) or 'none'}"


def _table(found: ModelComparison, *, letters: tuple[str, str]) -> list[str]:
    """Return the figures side by side, with the intervals of the differences."""
    a, b = letters
    interval = f"{confidence(found.level)} interval"
    lines = [f"{'':<18}{a:>8}  {b:>8}  {f'{a} {MINUS} {b}':>8}  {interval}"]
    for name, each in (("accuracy", found.accuracy), ("macro F1", found.macro_f1)):
        values = f"{percent(each.a, 2):>8}  {percent(each.b, 2):>8}  {points(each.difference):>8}"
        lines.append(f"{name:<18}{values}  {points(each.low)} to {points(each.high)} points")
    for name, each in (("cross-entropy", found.loss), ("calibration error", found.calibration_error)):
        values = f"{each.a:>8.4f}  {each.b:>8.4f}  {_signed(each.difference):>8}"
        lines.append(f"{name:<18}{values}  {_signed(each.low)} to {_signed(each.high)}")
    return lines


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", MINUS)


def _changed_sides(
    found: ModelComparison, *, letters: tuple[str, str], comparison: Comparison
) -> Iterator[tuple[str, str]]:
    """Yield how many images each model alone gets right, and the names of the first of them."""
    a, b = letters
    yield (
        "right",
        f"{found.both:,} images by both, {found.only_a:,} by {a} only, {found.only_b:,} by {b} only, "
        f"{found.neither:,} by neither (McNemar's exact p {probability(found.p_value)})",
    )
    right_a, right_b = found.pairing.a.is_correct, found.pairing.b.is_correct
    for letter, rows in ((a, right_a & ~right_b), (b, right_b & ~right_a)):
        names = [found.pairing.a.names[row] for row in np.flatnonzero(rows)[:MAX_IMAGES]]
        if names:
            more = f", and {int(rows.sum()) - len(names):,} more" if rows.sum() > len(names) else ""
            shown = map(escape_control_chars, shown_names(names, dataset=comparison.dataset))
            yield f"only {letter}", f"{', '.join(shown)}{more}"


def _classes(found: ModelComparison, *, letters: tuple[str, str]) -> str:
    """Return the classes where one model recognizes more images than the other."""
    parts = []
    for letter, verdict in zip(letters, ("better", "worse"), strict=True):
        if names := [escape_control_chars(each.name) for each in found.classes if each.verdict == verdict]:
            parts.append(f"{letter} is better on {', '.join(names)}")
    text = "; ".join(parts) or "no difference is shown for any class"
    return f"{text} (recall; corrected for looking at {len(found.classes)} classes, Holm)"


def _recipe_answer(comparison: Comparison, against: Against, *, letters: tuple[str, str]) -> list[str]:
    """Return the lines of the question about recipes."""
    found, (a, b) = against.recipe, letters
    rows = [("answer", str(recipe_verdict(found, a=a, b=b, reason=against.recipe_reason)))]
    if found is not None:
        rows += [*_accuracies(found, letters=letters)]
        rows.append(
            (
                "can show",
                f"the smallest difference of recipes that these seeds can show with {percentage(POWER)} power: "
                f"{distance(found.detectable)} points of accuracy",
            )
        )
    return [*_question(comparison, "recipe", letters=letters), *_indented(aligned(rows, width=WIDTH - GAP))]


def _accuracies(found: RecipeComparison, *, letters: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """Yield mean and standard deviation of the accuracies of each recipe, and the interval of the difference."""
    for letter, values in zip(letters, (found.accuracies_a, found.accuracies_b), strict=True):
        listed = ", ".join(percent(each, 2) for each in values)
        yield letter, f"{percent(float(np.mean(values)), 2)} ± {100 * np.std(values, ddof=1):.2f} points ({listed})"
    yield f"{letters[0]} {MINUS} {letters[1]}", _interval(found.accuracy, level=found.level)


def _interval(each: Difference, *, level: float) -> str:
    ends = f"{points(each.low)} to {points(each.high)}"
    return f"{points(each.difference)} points ({confidence(level)} interval {ends})"
