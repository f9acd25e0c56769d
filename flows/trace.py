"""Print all that belongs to a model, from any one id of it.

`python -m flows.trace ID [--json]`. ID: a git commit, a DVC experiment, id or name of an MLflow run or of a Prefect
flow run, the MD5 of a model, or the path of one. Of commits and MLflow runs, the first 7 digits or more are enough. Of
a name that several runs have, all are printed. Exit status: 0 found, 2 not found.
"""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import chdir
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from flows import PROJECT
from flows.lineage import trace
from flows.lineage_records import Experiment, Trace
from pipeline.artifacts import BEST_WEIGHTS
from pipeline.core.errors import report_errors
from pipeline.core.git import PARAMETER_FILES

# with a `_` instead of a `/` in the metrics of earlier versions
SHOWN_METRICS = ("selected/", "selected_", "test/", "test_", "validation/", "validation_")


def as_text(found: Trace) -> str:
    """Return a trace as a table: one topic a row, of one line or more."""
    return "\n".join(
        f"{name if not index else '':<12}{line}"
        for name, lines in _rows(found)
        for index, line in enumerate(lines or ["none"])
    )


def _rows(found: Trace) -> Iterator[tuple[str, list[str]]]:
    """Yield the name and the lines of each row."""
    yield "code", list(_code_lines(found))
    yield "data", [f"{found.data_set or 'not known'}, MD5 {found.data_md5 or 'not known'}"]
    changed = [f"{name} {new} (committed: {old})" for name, (old, new) in found.changed.items()]
    yield "parameters", changed or ["as committed"]
    yield "MLflow run", list(_run_lines(found))
    yield "experiment", [f"{one.name}  ({_experiment_hint(one)})" for one in found.experiments]
    parts = [(run.run_id, run.name, run.state or "state not known", run.link) for run in found.flow_runs]
    yield "flow run", ["  ".join(filter(None, one)) for one in parts]
    yield "model", [f"MD5 {found.model_md5}"] if found.model_md5 else []
    yield "files", [f"{file.path} {file.md5}  {file.cached or 'not in the DVC cache'}" for file in found.files]


def _experiment_hint(experiment: Experiment) -> str:
    """Return the command that applies the experiment, or the reason why none can."""
    return f"dvc exp apply {experiment.name}" if experiment.commit else "no longer in this repository"


def _code_lines(found: Trace) -> Iterator[str]:
    """Yield the commit and what differed from it."""
    commit = f"commit {found.commit or 'not known'}"
    others = [name for name in found.uncommitted if name not in PARAMETER_FILES]
    if found.dirty is False and found.changed and found.uncommitted and not others:
        yield f"{commit}, parameters overridden (below), no other uncommitted changes"
        return
    changes = {None: "uncommitted changes not known", True: "with uncommitted changes", False: "no uncommitted changes"}
    changes |= {False: "no uncommitted changes of code"} if others else {}
    yield f"{commit}, {changes[found.dirty]}"
    if found.uncommitted and (found.dirty or others):
        yield f"not committed: {', '.join(found.uncommitted)}"


def _run_lines(found: Trace) -> Iterator[str]:
    """Yield the MLflow run, its page, metrics and reproductions."""
    if run := found.run:
        started = datetime.fromtimestamp(run.started / 1000).astimezone()
        yield f"{run.run_id} ({run.name}) {run.status}, {started:%Y-%m-%d %H:%M:%S %z}"
        if found.run_link:
            yield found.run_link if found.run_link_served else f"no server runs: `make ui`, then {found.run_link}"
        metrics = {name: value for name, value in run.metrics.items() if name.startswith(SHOWN_METRICS)}
        yield from (f"{name} {value:.6g}" for name, value in sorted(metrics.items()))
        yield from (f"reproduced by {run_id}: {result}" for run_id, result in found.reproductions)


def as_json(traces: Sequence[Trace], warnings: Sequence[str]) -> str:
    """Return {"traces": […], "warnings": […]} as JSON, without MLflow's system metrics and its own tags."""
    plain = [asdict(found) for found in traces]
    for run in filter(None, (values["run"] for values in plain)):
        for kind, prefix in (("metrics", "system/"), ("tags", "mlflow.")):
            run[kind] = {name: value for name, value in run[kind].items() if not name.startswith(prefix)}
    return json.dumps({"traces": plain, "warnings": warnings}, indent=2)


def main() -> None:
    """Print all that belongs to the id of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.trace",
        description="Print code, data, parameters, MLflow run, experiment, flow run, model and files of an id.",
        epilog="Exit status: 0 found, 2 not found.",
    )
    parser.add_argument(
        "id",
        metavar="ID",
        help="git commit, DVC experiment, id or name of an MLflow run or a Prefect flow run, MD5 or path of a model; "
        "of commits and MLflow runs, 7 digits are enough",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    arguments = parser.parse_args()
    path = Path(arguments.id)
    file = next((candidate.resolve() for candidate in (path / BEST_WEIGHTS, path) if os.path.isfile(candidate)), None)  # noqa: PTH113  (no error where an id is no path)
    with report_errors(), chdir(PROJECT):
        traces, warnings = trace(PROJECT, arguments.id, file=file)
        head = [f"{len(traces)} trainings belong to this id, newest first:"] if len(traces) > 1 else []
        text = "\n\n".join([*head, *map(as_text, traces), *(f"warning: {line}" for line in warnings)])
        print(as_json(traces, warnings) if arguments.json else text)


if __name__ == "__main__":
    main()
