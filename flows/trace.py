"""From any one id to all the others and the files.

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
from typing import Any

from flows import PROJECT
from flows.identity import MODEL, Experiment, FlowRun, Trace, trace
from pipeline.core.errors import report_errors

UNKNOWN = "not known"


def as_text(found: Trace) -> str:
    """A table of what belongs together."""
    rows = [
        *_code(found),
        ("data", f"{found.data_set or UNKNOWN}, MD5 {found.data_md5 or UNKNOWN}"),
        *(
            ("parameters" if not index else "", f"{name} {new} (committed: {old})")
            for index, (name, (old, new)) in enumerate(found.changed.items())
        ),
        *([] if found.changed else [("parameters", "as committed")]),
        *_mlflow(found),
        *_several("experiment", [_experiment(one) for one in found.experiments]),
        *_several("flow run", [_flow_run(one) for one in found.flow_runs]),
        ("model", f"MD5 {found.model_md5}" if found.model_md5 else "none"),
        *_several(
            "files", [f"{file.path} {file.md5}  {file.cached or 'not in the DVC cache'}" for file in found.files]
        ),
    ]
    return "\n".join(f"{name:<12}{value}" for name, value in rows)


def _code(found: Trace) -> Iterator[tuple[str, str]]:
    how = {None: "uncommitted changes not known", True: "with uncommitted changes", False: "nothing uncommitted"}
    yield "code", f"commit {found.commit or UNKNOWN}, {how[found.dirty]}"
    if found.uncommitted:
        yield "", f"not committed: {', '.join(found.uncommitted)}"


def _mlflow(found: Trace) -> Iterator[tuple[str, str]]:
    run = found.run
    if run is None:
        yield "MLflow run", "none"
        return
    yield "MLflow run", f"{run.run_id} ({run.name}) {run.status}, {_time(run.started)}"
    if found.run_link:
        yield "", found.run_link
    shown = {name: value for name, value in run.metrics.items() if name.startswith(("test_", "validation_"))}
    yield from (("", f"{name} {value:.6g}") for name, value in sorted(shown.items()))
    yield from (("", f"made again by {run_id}: {result}") for run_id, result in found.reproductions)


def _experiment(one: Experiment) -> str:
    return f"{one.name}  (dvc exp apply {one.name})" if one.commit else f"{one.name}  (no longer in this repository)"


def _flow_run(one: FlowRun) -> str:
    return "  ".join(filter(None, [one.run_id, one.name, one.state or "state not known", one.link]))


def _several(name: str, values: Sequence[str]) -> list[tuple[str, str]]:
    return [(name if not index else "", value) for index, value in enumerate(values or ["none"])]


def _time(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")


def as_json(traces: Sequence[Trace], notes: Sequence[str]) -> str:
    """The same, for programs: {"traces": […], "notes": […]}; MLflow's system metrics and own tags are left out."""
    return json.dumps({"traces": [_plain(found) for found in traces], "notes": notes}, indent=2)


def _plain(found: Trace) -> dict[str, Any]:
    values = asdict(found)
    if values["run"]:
        for kind, own in (("metrics", "system/"), ("tags", "mlflow.")):
            values["run"][kind] = {
                name: value for name, value in values["run"][kind].items() if not name.startswith(own)
            }
    return values


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
    file = next((candidate.resolve() for candidate in (path / MODEL, path) if os.path.isfile(candidate)), None)  # noqa: PTH113  (no error where an id is no path)
    with report_errors(), chdir(PROJECT):
        traces, notes = trace(PROJECT, arguments.id, file=file)
        print(as_json(traces, notes) if arguments.json else _page(traces, notes))


def _page(traces: Sequence[Trace], notes: Sequence[str]) -> str:
    head = [f"{len(traces)} belong to this, newest first:"] if len(traces) > 1 else []
    return "\n\n".join([*head, *map(as_text, traces), *(f"note: {note}" for note in notes)])


if __name__ == "__main__":
    main()
