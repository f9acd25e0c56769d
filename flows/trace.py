"""Print all that belongs to a model, from any one id of it.

`python -m flows.trace ID [--json]`. ID: a git commit, a DVC experiment, an MLflow run id, a Prefect flow run's id or
name, the MD5 of a model, or the path of one. Exit status: 0 found, 2 nothing known of it.
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
from flows.lineage import Trace, trace
from pipeline.artifacts import BEST_WEIGHTS
from pipeline.core.errors import report_errors


def as_text(found: Trace) -> str:
    """Return a table of what belongs together."""
    return "\n".join(
        f"{name if not index else '':<12}{line}"
        for name, lines in _rows(found)
        for index, line in enumerate(lines or ["none"])
    )


def _rows(found: Trace) -> Iterator[tuple[str, list[str]]]:
    changes = {None: "uncommitted changes not known", True: "with uncommitted changes", False: "nothing uncommitted"}
    code = [f"commit {found.commit or 'not known'}, {changes[found.dirty]}"]
    yield "code", code + ([f"not committed: {', '.join(found.uncommitted)}"] if found.uncommitted else [])
    yield "data", [f"{found.data_set or 'not known'}, MD5 {found.data_md5 or 'not known'}"]
    changed = [f"{name} {new} (committed: {old})" for name, (old, new) in found.changed.items()]
    yield "parameters", changed or ["as committed"]
    yield "MLflow run", list(_run_lines(found))
    here = {True: "dvc exp apply {}", False: "no longer in this repository"}
    yield "experiment", [f"{one.name}  ({here[bool(one.commit)].format(one.name)})" for one in found.experiments]
    parts = [(run.run_id, run.name, run.state or "state not known", run.link) for run in found.flow_runs]
    yield "flow run", ["  ".join(filter(None, one)) for one in parts]
    yield "model", [f"MD5 {found.model_md5}"] if found.model_md5 else []
    yield "files", [f"{file.path} {file.md5}  {file.cached or 'not in the DVC cache'}" for file in found.files]


def _run_lines(found: Trace) -> Iterator[str]:
    if run := found.run:
        started = datetime.fromtimestamp(run.started / 1000).astimezone()
        yield f"{run.run_id} ({run.name}) {run.status}, {started:%Y-%m-%d %H:%M:%S %z}"
        yield from filter(None, [found.run_link])
        metrics = {name: value for name, value in run.metrics.items() if name.startswith(("test_", "validation_"))}
        yield from (f"{name} {value:.6g}" for name, value in sorted(metrics.items()))
        yield from (f"made again by {run_id}: {result}" for run_id, result in found.reproductions)


def as_json(traces: Sequence[Trace], notes: Sequence[str]) -> str:
    """Return the same for programs: {"traces": […], "notes": […]}, without MLflow's system metrics and own tags."""
    plain = [asdict(found) for found in traces]
    for run in filter(None, (values["run"] for values in plain)):
        for kind, prefix in (("metrics", "system/"), ("tags", "mlflow.")):
            run[kind] = {name: value for name, value in run[kind].items() if not name.startswith(prefix)}
    return json.dumps({"traces": plain, "notes": notes}, indent=2)


def main() -> None:
    """Look everywhere, print what belongs together."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.trace",
        description="From any one id to code, data, parameters, MLflow run, experiment, flow run, model and files.",
        epilog="Exit status: 0 found, 2 nothing known of it.",
    )
    parser.add_argument(
        "id", metavar="ID", help="git commit, DVC experiment, MLflow run, Prefect flow run, MD5 or path of a model"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    arguments = parser.parse_args()
    path = Path(arguments.id)
    file = next((candidate.resolve() for candidate in (path / BEST_WEIGHTS, path) if os.path.isfile(candidate)), None)  # noqa: PTH113  (no error where an id is no path)
    with report_errors(), chdir(PROJECT):
        traces, notes = trace(PROJECT, arguments.id, file=file)
        head = [f"{len(traces)} belong to this, newest first:"] if len(traces) > 1 else []
        text = "\n\n".join([*head, *map(as_text, traces), *(f"note: {note}" for note in notes)])
        print(as_json(traces, notes) if arguments.json else text)


if __name__ == "__main__":
    main()
