"""Compare models and recipes on the same test images, to see whether A is better than B.

`python -m flows.compare A B [C …]`. Each of them is an id or a name of an MLflow run (8 digits are enough), a DVC
experiment, a git commit, `.` for the checkout, a registered version (`digits/3`, `models:/digits@champion`),
`champion`, `challenger`, `previous`, or the run over several seeds of a recipe. Two questions are kept apart: whether
this model is better on images like these, and whether this recipe is better, whatever its seed. Exit status: 0 A is
better than all others, 3 not shown, 4 worse than one of them, 2 refused, 75 another try may help.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path

from flows import PROJECT
from flows.candidates import ALIASES, Group, find_models
from flows.compare_page import write_page
from flows.compare_record import record
from flows.compare_text import as_text
from flows.comparison import Comparison, compare
from flows.lineage import Sources
from flows.reports import COMPARISON, REPORTS
from flows.ui import is_mlflow_served
from pipeline.comparison.paired import LEVEL
from pipeline.core.errors import TemporaryError, UserError, first_line, report_errors
from pipeline.tracking.registry import registered_name

MAX_MODELS = 10
MAX_NAME_LENGTH = 60  # of one model, in the name of a page's file
MAX_FILE_NAME_LENGTH = 200


def main() -> None:
    """Compare what the command line names, print the result, and exit with the status that states it."""
    arguments = parse_arguments()
    with report_errors(), chdir(PROJECT):
        sources = Sources(PROJECT)
        comparison = compare(find_groups(sources, arguments.names), level=arguments.level, question=arguments.question)
        print(as_text(comparison))
        path = arguments.page or page_path(arguments.names)
        page = write_page(sources, comparison, names=arguments.names, path=path)
        places = [f"page: {page.absolute().as_uri()}"]
        if not arguments.no_mlflow:
            places += _record(sources, comparison, page=page)
        print("\n".join(["", *places]), flush=True)
    sys.exit(comparison.exit_status)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, by default this process's own."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.compare",
        description="Compare models and recipes on the same test images: is A better than each of the others?",
        epilog="Exit status: 0 A is better than all others, 3 not shown, 4 worse than one of them, 2 refused, 75 "
        "another try may help.",
    )
    parser.add_argument(
        "names",
        nargs="+",
        metavar="MODEL",
        help="two or more: id or name of an MLflow run, also of one over several seeds; DVC experiment; git commit; . "
        "for the checkout; digits/3; models:/digits@champion; champion, challenger or previous",
    )
    parser.add_argument(
        "--question",
        choices=("model", "recipe"),
        help="the question that decides the exit status (default: recipe if all have two seeds or more, else model)",
    )
    parser.add_argument(
        "--level", type=float, default=LEVEL, help=f"of the test, all comparisons together (default: {LEVEL})"
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help=f"the HTML page (default: in {REPORTS}/)")
    parser.add_argument("--no-mlflow", action="store_true", help="do not record the comparison in MLflow")
    values = parser.parse_args(arguments)
    if len(values.names) < 2:
        parser.error("found one model; allowed: two or more; name another one, such as champion")
    if len(values.names) > MAX_MODELS:
        parser.error(f"found {len(values.names)} models; allowed: at most {MAX_MODELS}; leave some out")
    if not 0 < values.level < 1:
        parser.error(f"--level: found {values.level:g}; allowed: more than 0 and less than 1, such as 0.05")
    return values


def find_groups(sources: Sources, names: Sequence[str]) -> list[Group]:
    """Return what the texts name; an alias is of the data set of the first text that is none."""
    others = {name: find_models(sources.project, name, sources=sources) for name in names if name not in ALIASES}
    first = next(iter(others.values()), None)
    registered = registered_name(first.models[0].data_set) if first else None
    return [
        others.get(name) or find_models(sources.project, name, registered=registered, sources=sources) for name in names
    ]


def page_path(names: Sequence[str]) -> Path:
    """Return the default path of the page, which git ignores."""
    parts = [re.sub(r"[^\w.-]+", "-", name).strip("-.")[:MAX_NAME_LENGTH] or "checkout" for name in names]
    return REPORTS / f"{COMPARISON}{'-'.join(parts)[:MAX_FILE_NAME_LENGTH]}.html"


def _record(sources: Sources, comparison: Comparison, *, page: Path) -> list[str]:
    """Record the comparison in MLflow, and return where; a failure is only a warning."""
    try:
        if not sources.has_mlflow:
            raise UserError("; ".join(sources.warnings) or "MLflow was not reached")
        link = record(sources.project, comparison, page=page)
    except (UserError, TemporaryError) as error:
        print(f"warning: the comparison is not recorded in MLflow: {first_line(error)}", file=sys.stderr, flush=True)
        return []
    return [
        f"MLflow: {link}" if is_mlflow_served(sources.project) else f"MLflow: no server runs: `make ui`, then {link}"
    ]


if __name__ == "__main__":
    main()
