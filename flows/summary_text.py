"""The end of `make run` in the terminal: a table of results and places, and suggested next commands."""

import shlex
import textwrap
from collections.abc import Sequence

from flows.summary import Summary, describe_baseline, describe_results, describe_time
from pipeline.core.errors import escape_control_chars

SUGGESTED_RECIPE = "cifar10_lenet"
MAX_CLASSES_PRINTED = 20
UNEQUAL_CLASSES = 3.0  # train images of the largest class / those of the smallest one from which weights are suggested
WIDTH = 80  # columns
GAP = 2  # columns between a name and its value


def as_text(summary: Summary, *, recipe: str, images: str | None = None, overrides: Sequence[str] = ()) -> str:
    """Return the table at the end of `make run`, followed by suggested next commands.

    `images` is the folder of the user's own images, if the command named one, and `overrides` are its values of SET.
    """
    use = [(f".venv/bin/dvc exp apply {summary.experiment}", "use this model here (replaces the files in artifacts/)")]
    commands = [("make ui", "open the curves, compare runs")]
    lines = ["", *aligned(_rows(summary))]
    if recipe == "digits":
        commands.append((f"make run RECIPE={SUGGESTED_RECIPE}", "train on CIFAR-10 (downloads 170 MB)"))
    elif summary.params.download.dataset == "imagefolder":
        use.append((".venv/bin/python -m pipeline.predict photo.jpg", "then classify other images"))
        commands += _suggestions(summary, recipe=recipe, images=images, overrides=overrides)
        lines += ["", *_class_table(summary)]
    else:
        commands.append(("make experiments", "list the experiments since the last commit"))
    compared = summary.baseline.comparison
    is_worse = compared is not None and compared.is_significant and compared.difference < 0
    read = ["  open the report in a browser: its address is above"] if summary.report else []
    return "\n".join([*lines, "", "Next:", *read, *command_lines([*commands, *use] if is_worse else [*use, *commands])])


def _rows(summary: Summary) -> list[tuple[str, str]]:
    """Return name and value of each row of the table, in the order in which a reader asks."""
    mlflow = (summary.mlflow_run_id or "unknown") + (
        " (an earlier one, which made this model)" if summary.mlflow_run_id and summary.has_cached_model else ""
    )
    return [
        *describe_results(summary),
        ("differs", _differences(summary)),
        ("baseline", describe_baseline(summary)),
        ("report", summary.report.absolute().as_uri() if summary.report else "none; the log above has the reason"),
        ("MLflow run", mlflow),
        ("Prefect run", summary.flow_run_id),
        ("experiment", f"{summary.experiment} (your checkout is unchanged)"),
        ("time", describe_time(summary)),
    ]


def _differences(summary: Summary) -> str:
    """Return the parameters that differ from the recipe, with the recipe's values, one a line."""
    found = summary.setup.differences
    if not found:
        return f"nothing: all parameters are those of recipe {summary.setup.recipe}"
    return "\n".join(f"{name} {_value(old)} → {_value(new)}" for name, (old, new) in found.items())


def _value(value: object) -> str:
    return "null" if value is None else escape_control_chars(str(value))


def aligned(rows: Sequence[tuple[str, str]], *, width: int = WIDTH) -> list[str]:
    """Return the rows as lines of at most `width` columns, with the second column aligned; links are not broken."""
    indent = max(len(name) for name, _ in rows) + GAP
    lines = []
    for name, value in rows:
        parts = wrapped(value, width=width - indent)
        lines += [f"{name if number == 0 else '':<{indent}}{part}" for number, part in enumerate(parts)]
    return lines


def wrapped(text: str, *, width: int = WIDTH) -> list[str]:
    """Return the lines of a text, broken between words so that they have at most `width` columns."""
    return [
        part
        for line in text.splitlines()
        for part in textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)
    ]


def command_lines(commands: Sequence[tuple[str, str]]) -> list[str]:
    """Return a line for each command with what it does, or two where a line would be longer than WIDTH."""
    width = WIDTH - GAP
    short = [command for command, purpose in commands if len(command) + GAP + len(purpose) <= width]
    column = max(map(len, short), default=0) + GAP
    lines = []
    for command, purpose in commands:
        if len(command) < column and column + len(purpose) <= width:
            lines.append(f"{command:<{column}}{purpose}")
        else:
            lines += [command, f"{'':<{GAP}}{purpose}"]
    return [f"  {line}" for line in lines]


def _class_table(summary: Summary) -> list[str]:
    """Return a table of the classes, those of the lowest recall first where there are many."""
    classes = summary.classes
    if more := max(0, len(classes) - MAX_CLASSES_PRINTED):
        classes = sorted(classes, key=lambda each: 2.0 if each.recall is None else each.recall)[:MAX_CLASSES_PRINTED]
    names = [escape_control_chars(each.name) for each in classes]
    width = max(len("class"), *map(len, names))
    lines = [f"{'class':<{width}}  test images   recall  precision"]
    lines += [
        f"{name:<{width}}  {each.test_images:>11,}  {_percent(each.recall):>7}  {_percent(each.precision):>9}"
        for name, each in zip(names, classes, strict=True)
    ]
    return (
        [*lines, f"{more} more classes, of higher recall, are in artifacts/evaluate/per_class.csv"] if more else lines
    )


def _percent(fraction: float | None) -> str:
    """Return a fraction in percent, or a dash where it is undefined."""
    return "-" if fraction is None else f"{fraction:.1%}"


def _suggestions(
    summary: Summary, *, recipe: str, images: str | None, overrides: Sequence[str]
) -> list[tuple[str, str]]:
    """Return what to try next on the user's own images, as commands and what they do."""

    def command(recipe: str, *more: str) -> str:
        values = " ".join([*overrides, *more])
        return f"make run RECIPE={recipe}{folder}" + (f' SET="{values}"' if values else "")

    folder = f" IMAGES={shlex.quote(images)}" if images else ""
    counts = [each.train_images for each in summary.classes]
    train = summary.params.train
    suggestions = []
    if recipe == "my_images":
        suggestions.append((command("my_images_finetune"), "train the whole network (a GPU helps): docs/own-images.md"))
    if (train.class_weights, train.sampler) == ("none", "shuffle") and max(counts) >= UNEQUAL_CLASSES * min(counts):
        suggestions.append((command(recipe, "train.class_weights=balanced"), "give rare classes more weight"))
    return suggestions
