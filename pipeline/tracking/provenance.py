"""The values by which a model is traced to its code, data, parameters, hardware, environment and process.

All of them are in `provenance.json`, an artifact of the run; a value `<section>.<field>` is there in an object of its
section. Values by which a person searches runs are also tags. So are those by which a program finds a run, but with a
prefix that hides them from MLflow's pages: a tag is searchable, and one process sets it without reading others.
"""

import importlib.metadata
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts import CHECKSUMS, DOWNLOAD, HISTORY, NORMALIZE, SELECTED_COLUMN, bytes_md5, file_md5, read_csv
from pipeline.core.errors import UserError, first_line
from pipeline.core.git import UNKNOWN, CodeState, code_state
from pipeline.core.processes import HOST, PID, STARTED, this_process
from pipeline.core.project import project_folder
from pipeline.core.settings import get_settings
from pipeline.core.stage_code import code_md5
from pipeline.core.yaml import read_yaml
from pipeline.params import PARAMS_FILE
from pipeline.tracking.run_title import RunSetup

COMMIT = "mlflow.source.git.commit"
NOTE = "mlflow.note.content"  # tag with the description of a run
REPRODUCES = "reproduces"  # tag of a run that reproduces another run: the id of that run
COMPARISON = "comparison"  # tag of a run that compares models and made none: what it has found
# prefix of the tags `flow_run.<id>` = DVC experiment: one for each flow run that made the model or had a cache hit
FLOW_RUN = "flow_run."
EXPERIMENT = "dvc.experiment"
PROJECT = "process.project"  # the folder of the project that made the run
HARDWARE = "hardware."  # prefix of the parts of the hardware, on which the last bits of a model depend
CHANGED_FILES = "git.changed"  # the files that differ from the commit, parameters included
DIFFERENT = "parameters.different"  # the parameters that differ from the recipe: by name, the two values
PARENT_RUN = "mlflow.parentRunId"  # MLflow's own tag: its table of runs shows the run below that one
SEEDS = "seeds"  # tag of a run over several seeds: the seeds as a list in JSON
CHILDREN = "children"  # of a run over several seeds: seed, MLflow run, experiment and model of each finished one
COMMAND_MD5 = "command.md5"  # of a run over several seeds: recipe, parameters, seeds and code, by which it is resumed
TRAINING = "training"  # the fingerprint of the training
TRAIN_OUTPUTS = "outputs.train"
NOTE_MD5 = "note.md5"  # of the description as it was written last, by which one that a user has edited is known
# values that a person searches runs by, besides MLflow's parameters, metrics and data set: at most ten tags a run, with
# `killed.reason` and `reproduction.result`
SEARCHED_BY_PEOPLE = (
    "recipe",
    "git.dirty",
    EXPERIMENT,
    "prefect.flow_run_id",
    "prefect.flow_run_name",
    REPRODUCES,
    SEEDS,
    "model.md5",
)
# values that a program searches runs by, also those of a process that was killed at once; PROJECT decides which runs a
# cleanup may remove
SEARCHED_BY_PROGRAMS = (TRAINING, HOST, PID, STARTED, PROJECT, TRAIN_OUTPUTS, NOTE_MD5, COMMAND_MD5)
HIDDEN = "mlflow.pipeline."  # MLflow's pages do not show tags that begin with `mlflow.`
# what the end of a training and an evaluation add; it stays if another process resumes the run
RESULTS = ("outputs.", "selected.", "result.")
# tags that describe the process that began the run, or its end; they are deleted when another process resumes the run
TAGS_OF_ONE_PROCESS = ("killed.reason", EXPERIMENT, "prefect.flow_run_id", "prefect.flow_run_name")
LOCK_FILE = Path("dvc.lock")

Values = Mapping[str, Any]  # by dotted name: texts, numbers, lists and objects as in JSON


def tag_name(name: str) -> str:
    """Return the name of the tag that has the value of this name: with a prefix where the tag is hidden."""
    return f"{HIDDEN}{name}" if name in SEARCHED_BY_PROGRAMS or name.startswith(FLOW_RUN) else name


def tags_of(values: Values) -> dict[str, str]:
    """Return the tags for those of the values by which people or programs search runs."""
    names = [name for name in (*SEARCHED_BY_PEOPLE, *SEARCHED_BY_PROGRAMS) if values.get(name)]
    return {tag_name(name): as_text(values[name]) for name in names}


def values_of(tags: Mapping[str, str]) -> dict[str, Any]:
    """Return the values that a run has as tags; hidden tags are under the names of their values."""
    found: dict[str, Any] = {name: tags[name] for name in (*SEARCHED_BY_PEOPLE, *SEARCHED_BY_PROGRAMS) if name in tags}
    if TRAIN_OUTPUTS in found:
        found[TRAIN_OUTPUTS] = json.loads(found[TRAIN_OUTPUTS])
    return found | ({"git.commit": tags[COMMIT]} if COMMIT in tags else {})


def as_text(value: Any) -> str:
    """Return a value as the text of a tag: lists and objects as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def nested(values: Values) -> dict[str, Any]:
    """Return `{"git.dirty": …}` as `{"git": {"dirty": …}}`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        section, _, field = name.partition(".")
        if field:
            found.setdefault(section, {})[field] = value
        else:
            found[name] = value
    return found


def flat(sections: Values) -> dict[str, Any]:
    """Return `{"git": {"dirty": …}}` as `{"git.dirty": …}`."""
    found: dict[str, Any] = {}
    for section, fields in sections.items():
        found |= {f"{section}.{name}": one for name, one in fields.items()} if isinstance(fields, dict) else {}
        found |= {} if isinstance(fields, dict) else {section: fields}
    return found


def find_code_state() -> CodeState:
    """Return the commit and the uncommitted changes of this project; print a warning where git cannot report them."""
    found = code_state(Path.cwd(), tracked=str(PARAMS_FILE))
    if found.problem:
        print(f"warning: the run is recorded with unknown code, and cannot be reproduced: {found.problem}", flush=True)
    return found


def origin(code: CodeState, *, setup: RunSetup | None = None) -> dict[str, Any]:
    """Return code, setup, DVC experiment, flow run and process of a run."""
    settings = get_settings()
    values = {
        "recipe": setup.recipe if setup else "",
        DIFFERENT: {name: list(pair) for name, pair in setup.differences.items()} if setup else {},
        "git.commit": code.commit or UNKNOWN,
        "git.dirty": code.dirty,
        CHANGED_FILES: [name.encode("utf-8", "replace").decode() for name in code.files],
        "code.md5": code_md5("train"),
        EXPERIMENT: settings.experiment,
        PROJECT: str(project_folder()),
        "prefect.flow_run_id": settings.flow_run_id,
        "prefect.flow_run_name": settings.flow_run_name,
        "prefect.flow_run_link": settings.flow_run_link,
        REPRODUCES: settings.reproduces or "",
    }
    return {name: value for name, value in values.items() if value} | this_process()


def source_tags(code: CodeState, *, program: str = "pipeline.train") -> dict[str, str]:
    """Return the tags in which MLflow itself expects the program and the commit of a run."""
    return {"mlflow.source.name": f"python -m {program}", COMMIT: code.commit or UNKNOWN}


def flow_run_tags() -> dict[str, str]:
    """Return the tag `flow_run.<id>` if this process belongs to a flow run, else no tag."""
    settings = get_settings()
    name = f"{FLOW_RUN}{settings.flow_run_id}"
    return {tag_name(name): settings.experiment} if settings.flow_run_id else {}


def parent_tags() -> dict[str, str]:
    """Return the tag by which MLflow shows the run below that of several seeds, or no tag."""
    parent = get_settings().parent_run
    return {PARENT_RUN: parent} if parent else {}


def inputs(params: Mapping[str, Any]) -> dict[str, str]:
    """Return the hashes of the parameters, of the weights file that they name, and of the data.

    The hashes of the data are those in `dvc.lock`, "unknown" where it cannot be read.
    """
    text = json.dumps(params, sort_keys=True, default=str)
    values = {"params.md5": bytes_md5(text.encode())}
    if params.get("train.weights_md5"):
        values["weights.md5"] = params["train.weights_md5"]
    paths = {f"dvc.{folder.name}": str(folder) for folder in (DOWNLOAD, NORMALIZE)}
    try:
        stages = read_yaml(LOCK_FILE).get("stages", {}) if LOCK_FILE.exists() else {}
        hashes = {out["path"]: out.get("md5") for stage in stages.values() for out in stage.get("outs", [])}
    except (UserError, AttributeError, KeyError, TypeError) as error:
        print(f"warning: the run is recorded without DVC's hashes of the data: {first_line(error)}", flush=True)
        return values | dict.fromkeys(paths, UNKNOWN)
    return values | {name: hashes[path] for name, path in paths.items() if hashes.get(path)}


def hardware_values(hardware: Mapping[str, str]) -> dict[str, str]:
    """Return the value `hardware.<part>` of each part."""
    return {f"{HARDWARE}{part}": value for part, value in hardware.items()}


def output_values(folder: Path, *, names: Sequence[str] = ()) -> dict[str, dict[str, str]]:
    """Return `outputs.<step>`: the MD5 of each file that the step wrote; by default of all files."""
    everything: Iterable[Path] = (path for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS)
    files = [folder / name for name in names] or sorted(everything)
    return {f"outputs.{folder.name}": {path.name: file_md5(path) for path in files}}


def selected_epoch_values(folder: Path) -> dict[str, str]:
    """Return number, validation accuracy and reason of the epoch whose weights are the recorded model.

    Returns nothing where the history has no such column, because an earlier version wrote it.
    """
    rows = [row for row in read_csv(folder / HISTORY) if row.get(SELECTED_COLUMN)]
    names = {"epoch": "epoch", "reason": SELECTED_COLUMN, "validation_accuracy": "validation_accuracy"}
    return {f"selected.{name}": rows[0][column] for name, column in names.items() if column in rows[0]} if rows else {}


def result_values(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the accuracy on the test split, a fraction, with the ends of its interval."""
    names = ("accuracy", "accuracy_low", "accuracy_high")
    return {f"result.{name}": metrics[name] for name in names if name in metrics}


def metrics_of_models(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics in `metrics.json` that compare models, accuracy first: those of which MLflow draws charts.

    The ends of the interval and the numbers of images are left out: they follow from the accuracy and the data set.
    """
    return {
        name: value
        for name, value in sorted(metrics.items(), key=lambda item: item[0] != "accuracy")
        if isinstance(value, float) and not name.endswith(("_low", "_high"))
    }


def environment_files(difference: bytes) -> dict[str, bytes]:
    """Return the files to record with a run: the difference to the commit, if any, and the installed packages."""
    packages = "".join(f"{line}\n" for line in _packages()).encode()
    return ({"uncommitted.diff": difference} if difference else {}) | {"packages.txt": packages}


def _packages() -> list[str]:
    """Return `name==version` of each installed package, sorted by name."""
    packages = [package.metadata for package in importlib.metadata.distributions()]  # each access parses a file
    named = {f"{package['Name']}=={package['Version'] or UNKNOWN}" for package in packages if package["Name"]}
    return sorted(named, key=str.lower)
