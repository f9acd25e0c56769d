"""State what is special about a run: its recipe, the parameters that differ from it, and a title made of both.

The title, as in `digits lr=0.03 epochs=6`, is the name of the run in MLflow and of the flow run in Prefect.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import UserError, escape_control_chars, redact_url
from pipeline.core.git import read_committed
from pipeline.core.project import project_folder
from pipeline.core.settings import get_settings
from pipeline.core.yaml import parse_yaml, read_yaml
from pipeline.params import PARAMS_FILE, POLICY, RECIPES_FOLDER

MAX_DIFFERENCES = 4  # in a title
MAX_VALUE_LENGTH = 20  # of a value in a title
FOLDER_PARAM = "download.folder"
PLACES = (FOLDER_PARAM, "download.urls", "download.timeout_seconds")  # where data are from; a title does not name them
SHORT_NAMES = {"train.learning_rate": "lr", "train.weight_decay": "wd", "train.batch_size": "batch"}

Values = Mapping[str, Any]  # raw parameters by section: {"train": {"epochs": 3, …}, …}
Differences = dict[str, tuple[Any, Any]]  # by dotted name: the value before and the value after


@dataclass(frozen=True)
class RunSetup:
    """The recipe of a run, and the parameters of the run that differ from it: `{"train.epochs": (20, 3)}`.

    `images` is the name of the folder of the user's own images; it is empty for other data sets.
    """

    recipe: str
    images: str
    differences: Differences

    @property
    def title(self) -> str:
        """Return recipe, folder of images and the first differences in one line, as in `digits lr=0.03 epochs=6`."""
        changed = {name: pair for name, pair in self.differences.items() if name not in PLACES}
        names = sorted(changed, key=lambda name: not name.startswith("train."))
        parts = [f"{_short_name(name)}={_short_value(changed[name][1])}" for name in names[:MAX_DIFFERENCES]]
        more = [f"+{len(names) - MAX_DIFFERENCES} more"] if len(names) > MAX_DIFFERENCES else []
        return " ".join([self.recipe, *([self.images] if self.images else []), *parts, *more])


def read_setup(folder: Path = Path(), *, recipe: str | None = None, params: Values | None = None) -> RunSetup:
    """Return the setup of the run in a checkout or a clone, by `params` or, by default, its `params.yaml`.

    `recipe` is by default the one that PIPELINE_RECIPE names. Without one, it is the recipe for the same data set from
    which the fewest parameters differ. The values that a recipe does not set are those of the committed `params.yaml`.
    """
    params = params or read_yaml(folder / PARAMS_FILE)
    try:
        committed = parse_yaml(read_committed(folder, "HEAD", str(PARAMS_FILE)) or "{}", origin=str(PARAMS_FILE))
    except UserError:  # git cannot be asked: only the values of the recipe are compared
        committed = {}
    base = committed or params
    recipes = {path.stem: read_yaml(path) for path in sorted((folder / RECIPES_FOLDER).glob("*.yaml"))}
    name = recipe or get_settings().recipe
    if name not in recipes:
        found = {each: differences(overlay(base, recipes[each]), params) for each in recipes}
        name = min(recipes, key=lambda each: ("download.dataset" in found[each], len(found[each])), default="")
    return setup_of(params, expected=overlay(base, recipes.get(name, {})), recipe=name)


def setup_of(params: Values, *, expected: Values, recipe: str) -> RunSetup:
    """Return the setup of a run with these parameters, where those of the recipe alone are `expected`."""
    is_own = params["download"]["dataset"] == "imagefolder"
    images = images_name(params["download"]["folder"]) if is_own else ""
    return RunSetup(recipe, images, differences(expected, params))


def images_name(folder: str) -> str:
    """Return the name of a folder of images, which may be relative to the project, as in `.` and `../birds/`."""
    return escape_control_chars(Path(os.path.abspath(project_folder() / folder)).name).strip()  # noqa: PTH100  (a link keeps its name)


def overlay(values: Values, changes: Values) -> Values:
    """Return the values with those of `changes` in place of theirs."""
    return {section: {**fields, **changes.get(section, {})} for section, fields in values.items()}


def differences(before: Values, after: Values) -> Differences:
    """Return the parameters of runs that differ between `before` and `after`: `{"train.epochs": (20, 3)}`.

    Each has its value in `before` (None if there is none) and its new value, without passwords and tokens in URLs.
    """
    pairs = {
        f"{section}.{field}": (before.get(section, {}).get(field), value)
        for section, fields in after.items()
        if section != POLICY
        for field, value in fields.items()
    }
    return {name: (_without_secrets(old), _without_secrets(new)) for name, (old, new) in pairs.items() if old != new}


def _without_secrets(value: Any) -> Any:
    """Return the value without passwords and tokens in URLs."""
    if isinstance(value, list):
        return [_without_secrets(part) for part in value]
    return redact_url(value) if isinstance(value, str) else value


def _short_name(name: str) -> str:
    """Return the name of a parameter in a title: without its section, if that is `train`."""
    return SHORT_NAMES.get(name) or name.removeprefix("train.")


def _short_value(value: Any) -> str:
    """Return a value as in YAML, shortened."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else str(value)
    return text if len(text) <= MAX_VALUE_LENGTH else f"{text[: MAX_VALUE_LENGTH - 1]}…"
