"""Describe a run in a short Markdown text: its result, what differs from the recipe, where the rest is."""

import json
import re
from collections.abc import Iterator
from typing import Any

from pipeline.core.git import UNKNOWN
from pipeline.tracking.links import run_page
from pipeline.tracking.provenance import CHILDREN, DIFFERENT, EXPERIMENT, REPRODUCES, SEEDS, Values

REPORT_KEY = "report"  # the value of the provenance that names the report among the run's artifacts
ACCURACY = "result.accuracy"
MAX_ROWS = 20  # of the table of parameters: MLflow cuts a description at 8000 characters
MAX_VALUE_LENGTH = 60
# all but letters, digits, `,`, `%`, `-`, spaces and the point of a number
_PUNCTUATION = re.compile(r"(?!(?<=\d)\.(?=\d))[^\w ,%-]|_")


def escape_markdown(text: str) -> str:
    """Return the text with punctuation as HTML entities, so that Markdown shows it as it is and makes no link of it."""
    return _PUNCTUATION.sub(lambda match: f"&#{ord(match[0])};", text)


def describe(values: Values, *, run_id: str, experiment_id: str) -> str:
    """Return the description of a run with the values of its provenance."""
    if SEEDS in values:
        return describe_seeds(values, experiment_id=experiment_id)
    report = values.get(REPORT_KEY, "")
    page = run_page(run_id, experiment_id=experiment_id, artifact=report)
    is_evaluated = "outputs.evaluate" in values  # a run that failed has no experiment
    places = {
        "Report": f"[{escape_markdown(report)}]({page})" if report else "",
        "Prefect": _link(values),
        "DVC experiment": _code(f"dvc exp apply {values[EXPERIMENT]}") if is_evaluated and EXPERIMENT in values else "",
        "Reproduces": _code(values[REPRODUCES]) if REPRODUCES in values else "",
    }
    listed = "\n".join(f"- {name}: {place}" for name, place in places.items() if place)
    # MLflow folds all but the first lines, so that a long table comes last
    return "\n\n".join(filter(None, [_result(values), listed, "\n".join(_differences(values))]))


def describe_seeds(values: Values, *, experiment_id: str) -> str:
    """Return the description of a run over several seeds: a table of the finished ones, and the best of them."""
    lines = ["| seed | test accuracy | validation | MLflow run | DVC experiment |", "| --- | --- | --- | --- | --- |"]
    for row in values.get(CHILDREN, []):
        run_id = row["run_id"]
        link = f"[{run_id[:8]}]({run_page(run_id, experiment_id=experiment_id)})" if run_id else UNKNOWN
        cells = [str(row["seed"]), f"{row['test_accuracy']:.2%}", f"{row['validation_accuracy']:.2%}"]
        lines.append(f"| {' | '.join([*cells, link, _code(row['experiment'])])} |")
    head, record = "", ""
    if "best.experiment" in values:
        mean = f"**Test accuracy {values['result.spread']}** (mean and sample standard deviation over the seeds)"
        head = f"{mean}; best on validation: {_code('dvc exp apply ' + values['best.experiment'])}"
        record = f"A row for the records:\n\n```\n{values['result.record']}\n```"
    flow_run = _link(values)
    parts = [head, "\n".join(lines), f"- Prefect: {flow_run}" if flow_run else "", record]
    return "\n\n".join(filter(None, parts))


def _result(values: Values) -> str:
    """Return test accuracy with its interval, and validation accuracy of the selected epoch, as far as known."""
    parts = []
    if ACCURACY in values:
        low, high = (values.get(f"result.accuracy_{end}") for end in ("low", "high"))
        interval = "" if low is None or high is None else f" (95% interval {low:.2%} to {high:.2%})"
        parts.append(f"**Test accuracy {values[ACCURACY]:.2%}**{interval}")
    if "selected.validation_accuracy" in values:
        accuracy, epoch = float(values["selected.validation_accuracy"]), escape_markdown(str(values["selected.epoch"]))
        parts.append(f"validation accuracy {accuracy:.2%} in epoch {epoch}, whose weights are selected")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _differences(values: Values) -> Iterator[str]:
    """Yield the lines of a table of the parameters that differ from the recipe; a run without a recipe has none."""
    if "recipe" not in values:
        return
    recipe, differences = escape_markdown(values["recipe"]), values.get(DIFFERENT, {})
    if differences == UNKNOWN:
        yield f"Recipe {recipe}; the parameters that differ from it are unknown."
        return
    if not differences:
        yield f"Parameters: those of the recipe {recipe}."
        return
    yield from (f"| parameter | recipe {recipe} | this run |", "| --- | --- | --- |")
    for name, pair in list(differences.items())[:MAX_ROWS]:
        yield f"| {escape_markdown(name)} | {' | '.join(map(_cell, pair))} |"
    if len(differences) > MAX_ROWS:
        yield f"| {len(differences) - MAX_ROWS} more | | |"


def _cell(value: Any) -> str:
    """Return a value of a parameter as in YAML, shortened and escaped."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return escape_markdown(text if len(text) <= MAX_VALUE_LENGTH else f"{text[: MAX_VALUE_LENGTH - 1]}…")


def _link(values: Values) -> str:
    """Return a link to the flow run, or its id where no link is known; empty where no flow run made the run."""
    run_id, link = values.get("prefect.flow_run_id", ""), values.get("prefect.flow_run_link", "")
    name = escape_markdown(values.get("prefect.flow_run_name") or run_id)
    return f"[{name}]({link})" if re.fullmatch(r"https?://[^\s()<>\"'\\]+", link) else name


def _code(text: str) -> str:
    """Return a text in one line as code."""
    return "`" + re.sub(r"[`\s]+", " ", text) + "`"
