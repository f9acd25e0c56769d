"""The summary of several seeds: for the terminal, for Prefect's page, and as a row of the README's table of results."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from flows.progress_page import markdown_table
from flows.seeds_results import ACCURACY, WITHOUT_DUPLICATES, SeedResult, Spread, best_on_validation, spread, spreads
from flows.summary_page import escape
from flows.summary_text import aligned, command_lines

FRACTIONS = ("accuracy", "balanced_accuracy", "macro_f1", "top_")  # how the names of metrics in percent begin
SHOWN_METRICS = (ACCURACY, "macro_f1", "loss")  # of the test split, in the tables


@dataclass(frozen=True)
class SeedsSummary:
    """The results of the seeds that are finished, and what is needed to name them.

    `errors` has the reason of each seed that failed. `train_seconds` has the duration of the trainings, as far as it is
    known. `select_by` is the metric by which the seeds are compared on the validation split.
    """

    title: str
    recipe: str
    seeds: Sequence[int]
    select_by: str
    command: str
    flow_run_id: str
    mlflow_run_id: str
    results: Sequence[SeedResult] = ()
    errors: Mapping[int, str] = field(default_factory=dict)
    train_seconds: Sequence[float] = ()
    seconds: float = 0.0

    @property
    def is_complete(self) -> bool:
        """Return whether all seeds are finished."""
        return len(self.results) == len(self.seeds)

    @property
    def best(self) -> SeedResult:
        """Return the seed that is best on the validation split."""
        return best_on_validation(self.results, select_by=self.select_by)


def format_figure(name: str, value: float) -> str:
    """Return a metric as text: a fraction in percent, any other one, such as a loss, with four decimals."""
    return f"{value:.2%}" if name.startswith(FRACTIONS) else f"{value:.4f}"


def format_spread(name: str, found: Spread) -> str:
    """Return mean and standard deviation as text, such as `99.04% ± 0.30%`."""
    return f"{format_figure(name, found.mean)} ± {format_figure(name, found.deviation)}"


def record_row(summary: SeedsSummary) -> str:
    """Return the row of the README's table of results: recipe, accuracy, the same without duplicates, time, command."""
    found, has_duplicates = spreads(summary.results), any(one.metrics.get("test_duplicates") for one in summary.results)
    without = "not measured" if WITHOUT_DUPLICATES not in found else _in_prose(found[WITHOUT_DUPLICATES])
    seconds = f"{statistics.median(summary.train_seconds):.0f} s" if summary.train_seconds else "unknown"
    cells = [
        f"`{summary.recipe}`",
        _in_prose(found[ACCURACY]),
        without if has_duplicates else "there are none",
        seconds,
    ]
    return f"| {' | '.join([*cells, f'`{summary.command}`'])} |"


def _in_prose(found: Spread) -> str:
    """Return mean and standard deviation as the README has them, such as `99.0 % ± 0.3`."""
    return f"{100 * found.mean:.1f} % ± {100 * found.deviation:.1f}"


def as_text(summary: SeedsSummary) -> str:
    """Return the end of `make run SEEDS=5`: a table of the seeds, mean and deviation, the best one, next commands."""
    best = summary.best
    accuracy = format_spread(ACCURACY, spreads(summary.results)[ACCURACY])
    rows = [
        ("test accuracy", f"{accuracy} (mean ± sample standard deviation over {len(summary.seeds)} seeds)"),
        ("best", f"seed {best.seed} on the validation split: {_validation(summary, best)}, {best.experiment}"),
        ("MLflow run", f"{summary.mlflow_run_id} (the runs of the seeds are below it)"),
        ("Prefect run", summary.flow_run_id),
        ("time", f"{summary.seconds:.1f} s"),
    ]
    commands = [
        (f".venv/bin/dvc exp apply {best.experiment}", "use the best model here (replaces the files in artifacts/)"),
        (
            f".venv/bin/python -m flows.compare {summary.mlflow_run_id} OTHER",
            "is this recipe better than another one that has several seeds too?",
        ),
        ("make ui", "open the curves, compare the seeds"),
    ]
    record = ["A row for the records, as in README.md:", f"  {record_row(summary)}"]
    return "\n".join(
        ["", *_seed_table(summary), "", *aligned(rows), "", *record, "", "Next:", *command_lines(commands)]
    )


def _validation(summary: SeedsSummary, one: SeedResult) -> str:
    """Return the figure by which a seed is compared with the others, as in `accuracy 99.28%`."""
    return f"{summary.select_by} {format_figure(summary.select_by, one.validation[summary.select_by])}"


def _seed_table(summary: SeedsSummary) -> Iterator[str]:
    """Yield the lines of a table with a line for each seed, then mean and standard deviation."""
    heads, rows = _table(summary)
    lines = [heads, *rows, *([*row, ""] for row in _spread_rows(summary))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    for line in lines:
        cells = [f"{cell:>{width}}" for cell, width in zip(line[:-1], widths[:-1], strict=True)]
        yield "  ".join([*cells, line[-1]]).rstrip()


def _columns(summary: SeedsSummary) -> dict[str, list[tuple[str, float]]]:
    """Return the columns of figures by their heads: for each seed the name of the metric and its value."""
    names = [name for name in SHOWN_METRICS if all(name in one.metrics for one in summary.results)]
    columns = {f"test {name}": [(name, one.metrics[name]) for one in summary.results] for name in names}
    chosen = [(summary.select_by, one.validation[summary.select_by]) for one in summary.results]
    return {**columns, f"validation {summary.select_by}": chosen}


def _table(summary: SeedsSummary) -> tuple[list[str], list[list[str]]]:
    """Return the heads and the rows of a table of the seeds; the last column is the experiment."""
    columns = _columns(summary)
    cells = [[format_figure(*figure) for figure in row] for row in zip(*columns.values(), strict=True)]
    rows = [[str(one.seed), *row, one.experiment] for one, row in zip(summary.results, cells, strict=True)]
    return ["seed", *columns, "experiment"], rows


def _spread_rows(summary: SeedsSummary) -> list[list[str]]:
    """Return the rows of mean and standard deviation, without the column of the experiment."""
    columns = [(figures[0][0], spread([value for _, value in figures])) for figures in _columns(summary).values()]
    return [
        ["mean", *(format_figure(name, one.mean) for name, one in columns)],
        ["sd", *(format_figure(name, one.deviation) for name, one in columns)],
    ]


def as_markdown(summary: SeedsSummary, *, mlflow_link: str) -> str:
    """Return the Prefect artifact of the parent flow run, also while seeds are missing."""
    parts = [f"# {_headline(summary)}"]
    if summary.is_complete:
        best, found = summary.best, spreads(summary.results)
        parts += [
            markdown_table(
                ["metric of the test split", "mean", "standard deviation"],
                [
                    (escape(name), format_figure(name, one.mean), format_figure(name, one.deviation))
                    for name, one in found.items()
                ],
            ),
            f"Best on validation: seed {best.seed}. Use it in the checkout: `dvc exp apply {best.experiment}`",
        ]
    heads, rows = _table(summary)
    if rows:
        parts += ["## Seeds", markdown_table(heads, [[*map(escape, row[:-1]), f"`{row[-1]}`"] for row in rows])]
    if missing := [seed for seed in summary.seeds if seed not in {one.seed for one in summary.results}]:
        lines = [f"- seed {seed}: {escape(summary.errors.get(seed, 'not finished yet'))}" for seed in missing]
        parts += ["## Missing", "\n".join(lines), f"The same command resumes with them: `{summary.command}`"]
    if summary.is_complete:
        parts += ["## For the records", f"```\n{record_row(summary)}\n```"]
        parts += [f"Compare with another recipe: `python -m flows.compare {summary.mlflow_run_id} OTHER`"]
    return "\n\n".join([*parts, f"[MLflow run over the seeds]({mlflow_link})"]) + "\n"


def as_title(summary: SeedsSummary) -> str:
    """Return the description of the artifact, as Markdown."""
    return f"{escape(summary.title)}: {_headline(summary)}"


def _headline(summary: SeedsSummary) -> str:
    """Return mean and deviation of the test accuracy, or how many seeds are finished."""
    if not summary.is_complete:
        return f"{len(summary.results)} of {len(summary.seeds)} seeds are finished"
    return (
        f"{format_spread(ACCURACY, spreads(summary.results)[ACCURACY])} test accuracy over {len(summary.seeds)} seeds"
    )
