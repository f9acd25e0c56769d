"""State the commands that make the model and its report again."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from pipeline.artifacts import ARTIFACTS
from pipeline.reporting.facts import RunFacts
from pipeline.reporting.text import as_yaml
from pipeline.tracking.run_title import FOLDER_PARAM, RunSetup

REPORT = ARTIFACTS / "report.html"
PYTHON = ".venv/bin/python"
OWN_IMAGES_RECIPE = "my_images"  # that `make run IMAGES=…` uses where no recipe is named
PLAIN_VALUE = re.compile(r"[\w.,:/+=@%\[\]-]+")  # neither make nor the shell changes it between double quotes


def commands(facts: RunFacts, *, output: Path) -> Sequence[tuple[str, str]]:
    """Return what the commands that make the model of `facts` again do, and the commands; `output` is the page."""
    found = []
    if facts.recorded:
        command = f"{PYTHON} -m flows.reproduce {shlex.quote(facts.recorded.run_id)}"
        found.append(("run the steps again as they were recorded, and compare every file", command))
    if facts.setup and facts.setup.recipe:
        found.append(("run it as a new experiment", run_command(facts.setup)))
    if facts.experiment:
        command = f".venv/bin/dvc exp apply {shlex.quote(facts.experiment)}"
        found.append(("copy the files and parameters of this model into the checkout, for the commands below", command))
    found.append(("reproduce the checkout in place", ".venv/bin/dvc repro"))
    option = "" if output == REPORT else f" --output {shlex.quote(str(output))}"
    found.append(("make this page again", f"{PYTHON} -m pipeline.report{option}"))
    return found


def run_command(setup: RunSetup) -> str:
    """Return the command that runs a recipe with other values: of make or, for unusual values, of Python."""
    changes = {name: as_yaml(after) for name, (_, after) in setup.differences.items()}
    images = changes.pop(FOLDER_PARAM, "") if setup.images else ""
    values = [f"{name}={value}" for name, value in changes.items()]
    if not all(map(PLAIN_VALUE.fullmatch, values)):
        parts = [f" --images {shlex.quote(images)}"] * bool(images) + [f" --set {shlex.quote(each)}" for each in values]
        return f"{PYTHON} -m flows.train_classifier --recipe {shlex.quote(setup.recipe)}{''.join(parts)}"
    command = "make run"
    if not images or setup.recipe != OWN_IMAGES_RECIPE:
        command += f" RECIPE={shlex.quote(setup.recipe)}"
    if images:
        command += f" IMAGES={_quote(images)}"
    return command + (f' SET="{" ".join(values)}"' if values else "")


def _quote(path: str) -> str:
    """Return a path for the shell: between double quotes, if these suffice."""
    return f'"{path}"' if re.fullmatch(r"[\w .,:/+=@%-]+", path) else shlex.quote(path)
