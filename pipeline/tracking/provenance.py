"""The tags and files by which a model is traced to its code, data, parameters, hardware, environment and process."""

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts import CHECKSUMS, DOWNLOAD, HISTORY, NORMALIZE, SELECTED_COLUMN, bytes_md5, file_md5, read_csv
from pipeline.core.errors import UserError, first_line
from pipeline.core.git import UNKNOWN, CodeState, code_state
from pipeline.core.processes import this_process
from pipeline.core.project import project_folder
from pipeline.core.settings import get_settings
from pipeline.core.stage_code import code_md5
from pipeline.core.yaml import read_yaml
from pipeline.params import PARAMS_FILE

COMMIT = "mlflow.source.git.commit"
REPRODUCES = "reproduces"  # tag of a run that reproduces another run: the id of that run
# prefix of the tags `flow_run.<id>` = DVC experiment: one for each flow run that made the model or had a cache hit
FLOW_RUN = "flow_run."
EXPERIMENT = "dvc.experiment"
PROJECT = "process.project"  # tag with the folder of the project that made the run
HARDWARE = "hardware."  # prefix of the tags `hardware.<part>`, on which the last bits of a model depend
# tags that describe the process that began the run, or its end; they are deleted when another process resumes the run
TAGS_OF_ONE_PROCESS = (
    "killed.reason",
    "dvc.experiment",
    "prefect.flow_run_id",
    "prefect.flow_run_name",
    "mlflow.note.content",
)
LOCK_FILE = Path("dvc.lock")


def find_code_state() -> CodeState:
    """Return the commit and the uncommitted changes of this project; print a warning where git cannot report them."""
    found = code_state(Path.cwd(), tracked=str(PARAMS_FILE))
    if found.problem:
        print(f"warning: the run is recorded with unknown code, and cannot be reproduced: {found.problem}", flush=True)
    return found


def origin_tags(code: CodeState) -> dict[str, str]:
    """Return the tags that name the code, the DVC experiment, the flow run and the process of a run."""
    settings = get_settings()
    tags = {
        "mlflow.source.name": "python -m pipeline.train",
        COMMIT: code.commit or UNKNOWN,
        "git.dirty": code.dirty,
        "code.md5": code_md5("train"),
        EXPERIMENT: settings.experiment,
        PROJECT: str(project_folder()),
        "prefect.flow_run_id": settings.flow_run_id,
        "prefect.flow_run_name": settings.flow_run_name,
        "mlflow.note.content": f"[Prefect flow run]({settings.flow_run_link})" if settings.flow_run_link else "",
        REPRODUCES: settings.reproduces or "",
    }
    return {name: value for name, value in tags.items() if value} | flow_run_tags() | this_process()


def flow_run_tags() -> dict[str, str]:
    """Return the tag `flow_run.<id>` if this process belongs to a flow run, else no tag."""
    settings = get_settings()
    return {f"{FLOW_RUN}{settings.flow_run_id}": settings.experiment} if settings.flow_run_id else {}


def input_tags(params: Mapping[str, Any]) -> dict[str, str]:
    """Return tags with the hashes of the parameters, of the weights file that they name, and of the data.

    The hashes of the data are those in `dvc.lock`, "unknown" where it cannot be read.
    """
    text = json.dumps(params, sort_keys=True, default=str)
    tags = {"params.md5": bytes_md5(text.encode())}
    if params.get("train.weights_md5"):
        tags["weights.md5"] = params["train.weights_md5"]
    paths = {f"dvc.{folder.name}": str(folder) for folder in (DOWNLOAD, NORMALIZE)}
    try:
        stages = read_yaml(LOCK_FILE).get("stages", {}) if LOCK_FILE.exists() else {}
        hashes = {out["path"]: out.get("md5") for stage in stages.values() for out in stage.get("outs", [])}
    except (UserError, AttributeError, KeyError, TypeError) as error:
        print(f"warning: the run is recorded without DVC's hashes of the data: {first_line(error)}", flush=True)
        return tags | dict.fromkeys(paths, UNKNOWN)
    return tags | {name: hashes[path] for name, path in paths.items() if hashes.get(path)}


def hardware_tags(hardware: Mapping[str, str]) -> dict[str, str]:
    """Return the tag `hardware.<part>` of each part."""
    return {f"{HARDWARE}{part}": value for part, value in hardware.items()}


def output_tags(folder: Path, *, names: Sequence[str] = ()) -> dict[str, str]:
    """Return the tag `outputs.<step>`: the MD5 of each file that the step wrote, as JSON; by default of all files."""
    everything = (path for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS)
    files = [folder / name for name in names] or sorted(everything)
    return {f"outputs.{folder.name}": json.dumps({path.name: file_md5(path) for path in files})}


def selected_epoch_tags(folder: Path) -> dict[str, str]:
    """Return the tags `selected.epoch` and `selected.reason`: the epoch of the recorded model, and why it was selected.

    Returns no tags where the history has no such column, because an earlier version wrote it.
    """
    rows = [row for row in read_csv(folder / HISTORY) if row.get(SELECTED_COLUMN)]
    return {"selected.epoch": rows[0]["epoch"], "selected.reason": rows[0][SELECTED_COLUMN]} if rows else {}


def environment_files(difference: bytes) -> dict[str, bytes]:
    """Return the files to record with a run: the difference to the commit, if any, and the installed packages."""
    packages = "".join(f"{line}\n" for line in _packages()).encode()
    return ({"uncommitted.diff": difference} if difference else {}) | {"packages.txt": packages}


def _packages() -> list[str]:
    """Return `name==version` of each installed package, sorted by name."""
    packages = [package.metadata for package in importlib.metadata.distributions()]  # each access parses a file
    named = {f"{package['Name']}=={package['Version'] or UNKNOWN}" for package in packages if package["Name"]}
    return sorted(named, key=str.lower)
