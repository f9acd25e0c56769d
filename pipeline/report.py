"""Make the report: one HTML page about the model in `artifacts/`, for reading in a browser.

`python -m pipeline.report [--output FILE] [--seconds STEP=SECONDS …]`

It is no stage of DVC, as the page has what changes from run to run: times, commit, MLflow run. `dvc repro` makes it
after `evaluate`, a flow run at its end. Where MLflow knows the run of the model, the page is recorded with it too.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.artifacts import write_text
from pipeline.core.errors import TemporaryError, UserError, first_line, report_errors
from pipeline.core.project import project_folder
from pipeline.core.settings import get_settings
from pipeline.params import load_params
from pipeline.reporting.baseline import find_baseline
from pipeline.reporting.commands import REPORT
from pipeline.reporting.data import read_content
from pipeline.reporting.facts import find_facts
from pipeline.reporting.model import best_weights_md5, describe_model
from pipeline.reporting.page import STEPS, Report, render
from pipeline.tracking.provenance_file import Provenance
from pipeline.tracking.report import log_report


def collect(*, seconds: dict[str, float], output: Path = REPORT) -> Report:
    """Collect all that the page in the file `output` shows; `seconds` are the durations of steps that are known.

    Raises UserError where a file of the steps is missing, damaged or does not fit the others.
    """
    params, content = load_params(), read_content()
    return Report(
        content=content,
        model=describe_model(params, content.info, images=content.test_images, predictions=content.predictions),
        baseline=find_baseline(content.metrics, data_md5=content.dataset.get("md5", {})),
        facts=find_facts(best_weights_md5(), seconds=seconds),
        params=params,
        output=_in_project(output),
    )


def _in_project(path: Path) -> Path:
    """Return a path relative to the project, or the name of a file that is elsewhere: a page names no user's folder."""
    absolute, project = path.resolve(), project_folder()
    if absolute == REPORT.resolve():
        return REPORT
    return absolute.relative_to(project) if absolute.is_relative_to(project) else Path(path.name)


def main() -> None:
    """Write the page, and record it with the MLflow run of the model; a failure of MLflow is only a warning."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.report", description="Make the report of the model.")
    parser.add_argument("--output", type=Path, default=REPORT, metavar="FILE", help=f"default: {REPORT}")
    parser.add_argument(
        "--seconds",
        action="append",
        default=[],
        metavar="STEP=SECONDS",
        help="the duration of a step that ran, as in --seconds train=12.3; repeat the option for more",
    )
    arguments = parser.parse_args()
    with report_errors():
        report = collect(seconds=parse_seconds(arguments.seconds), output=arguments.output)
        if arguments.output.is_dir():
            raise UserError(f"--output: {arguments.output} is a folder; allowed: a file; name one")
        write_text(arguments.output, render(report))
        print(f"report {arguments.output.resolve().as_uri()}", flush=True)
        run = report.facts.recorded
        if run and _is_its_page(run):
            try:
                log_report(run.run_id, arguments.output)
            except (UserError, TemporaryError) as error:
                print(f"warning: the report is not in MLflow: {first_line(error)}", file=sys.stderr, flush=True)


def _is_its_page(run: Provenance) -> bool:
    """Return whether the page is that of the run's own experiment, or the first one of the run.

    A later flow run that has a cache hit for the model knows neither the times of the training nor its other names.
    """
    return run.experiment == get_settings().experiment or not run.has_report


def parse_seconds(values: Sequence[str]) -> dict[str, float]:
    """Return the durations of steps that `STEP=SECONDS` states; raises UserError."""
    seconds = {}
    for value in values:
        step, _, number = value.partition("=")
        try:
            seconds[step] = float(number)
        except ValueError:
            seconds[step] = math.nan
        if step not in STEPS or not 0 <= seconds[step] < math.inf:
            raise UserError(
                f"--seconds: found {value!r}; allowed: STEP=SECONDS, where STEP is one of {', '.join(STEPS)} and "
                "SECONDS is 0 or more, as in train=12.3; correct it or leave it out"
            )
    return seconds


if __name__ == "__main__":
    main()
