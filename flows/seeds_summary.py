"""The summary of several seeds: for the terminal, for Prefect's page, and as a row of the README's table of results."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from flows.progress_page import markdown_table
from flows.seeds_results import ACCURACY, WITHOUT_DUPLICATES, SeedResult, Spread, best_on_validation, spreads
from flows.summary_page import escape
from flows.summary_text import aligned, command_lines

FRACTIONS = ("accuracy", "balanced_accuracy", "macro_f1", "top_")  # how the names of metrics in percent begin


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
    figure = format_figure(summary.select_by, best.validation[summary.select_by])
    rows = [
        *((f"test {name}", format_spread(name, found)) for name, found in spreads(summary.results).items()),
        ("mean ± sd", f"over {len(summary.seeds)} seeds; sd is the standard deviation of a sample (divisor n - 1)"),
        ("best", f"seed {best.seed}: {figure} validation {summary.select_by}, experiment {best.experiment}"),
        ("MLflow run", f"{summary.mlflow_run_id}, with the runs of the seeds below it"),
        ("Prefect run", summary.flow_run_id),
        ("record", record_row(summary)),
        ("time", f"{summary.seconds:.1f} s"),
    ]
    commands = [
        (f".venv/bin/dvc exp apply {best.experiment}", "use the best model here (replaces the files in artifacts/)"),
        (
            f".venv/bin/python -m flows.compare {summary.mlflow_run_id} OTHER",
            "is this recipe better than another one, with several seeds too?",
        ),
        ("make ui", "open the curves, compare the seeds"),
    ]
    return "\n".join(["", *_seed_table(summary), "", *aligned(rows), "", "Next:", *command_lines(commands)])


def _seed_table(summary: SeedsSummary) -> Iterator[str]:
    """Yield the lines of a table with a line for each seed."""
    heads, rows = _table(summary)
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    for row in [heads, *rows]:
        yield "  ".join(f"{cell:>{width}}" for cell, width in zip(row[:-1], widths, strict=False)) + f"  {row[-1]}"


def _table(summary: SeedsSummary) -> tuple[list[str], list[list[str]]]:
    """Return the heads and the rows of a table of the seeds."""
    heads = ["seed", "test accuracy", "test loss", f"validation {summary.select_by}", "experiment"]
    rows = [
        [
            str(one.seed),
            format_figure(ACCURACY, one.metrics[ACCURACY]),
            format_figure("loss", one.metrics["loss"]) if "loss" in one.metrics else "",
            format_figure(summary.select_by, one.validation[summary.select_by]),
            one.experiment,
        ]
        for one in summary.results
    ]
    return heads, rows


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
