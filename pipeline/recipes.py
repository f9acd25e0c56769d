"""Compose the parameters of a run from `params.yaml`, a recipe and single values.

Run as a program, this module writes a recipe and single values into `params.yaml`, whose comments stay:
`python -m pipeline.recipes --recipe cifar10_lenet --set train.epochs=3`.
"""

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.artifacts import write_text
from pipeline.core.errors import UserError, redact_url, report_errors
from pipeline.core.validation import describe_value, list_choices
from pipeline.core.yaml import dump_yaml, read_yaml
from pipeline.params import PARAMS_FILE, POLICY, RECIPES_FOLDER, STEPS, check_params


def compose(recipe: str | None, overrides: Mapping[str, Any]) -> Any:
    """Return the values of `params.yaml`, replaced by those of a recipe and then by overrides; comments stay.

    `overrides` has dotted names, as in `{"train.epochs": 3}`. Raises UserError for a bad name or value.
    """
    values = read_yaml(PARAMS_FILE)
    check_params(values, origin=str(PARAMS_FILE))
    path = None if recipe is None else recipe_path(recipe)
    for section, fields in ({} if path is None else read_yaml(path)).items():
        if not isinstance(fields, Mapping):
            raise UserError(f"{path}: {section} is {describe_value(fields)}; allowed: a section with fields under it")
        for field, value in fields.items():
            _assign(values, f"{section}.{field}", value, origin=str(path))
    for name, value in overrides.items():
        _assign(values, name, value, origin="--set")
    origins = [str(PARAMS_FILE), *([str(path)] if path else []), *(["--set"] if overrides else [])]
    check_params(values, origin=" with ".join(origins), overridden=overrides)
    return values


def recipe_path(recipe: str) -> Path:
    """Return `recipes/<recipe>.yaml`; raises UserError with the names of all recipes where there is no such file."""
    names = sorted(path.stem for path in RECIPES_FOLDER.glob("*.yaml"))
    if recipe not in names:
        allowed = list_choices(recipe, names) if names else f"none, since {RECIPES_FOLDER}/ has no recipe"
        raise UserError(f"--recipe: found {recipe!r}; allowed: {allowed}")
    return RECIPES_FOLDER / f"{recipe}.yaml"


def parse_override(text: str) -> tuple[str, Any]:
    """Return name and value of an override: `("train.epochs", 3)` for `"train.epochs=3"`; the value is YAML.

    Raises UserError where the text is not of this form.
    """
    name, separator, value = text.partition("=")
    if not separator or "." not in name:
        raise UserError(f"--set: found {text!r}; allowed: section.field=value, as in train.epochs=3; correct it")
    try:
        return name.strip(), YAML(typ="safe", pure=True).load(value)
    except Exception:  # ruamel raises nearly anything: see read_yaml
        raise UserError(
            f"--set: the value in {redact_url(text)!r} is not valid YAML; allowed: a number, true, false, null, text "
            "or [a list]; put text with special characters into double quotes"
        ) from None


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """Return the values of several `--set` options by parameter; raises UserError where two set the same one."""
    overrides: dict[str, Any] = {}
    for text in texts:
        name, value = parse_override(text)
        if name in overrides:
            raise UserError(f"--set: found {name} twice; allowed: each parameter once; leave one of them out")
        overrides[name] = value
    return overrides


def _assign(values: Any, name: str, value: Any, *, origin: str) -> None:
    """Set the value with the dotted name; raises UserError, naming `origin`, where the name is unknown."""
    section, _, field = name.partition(".")
    if section == POLICY:
        raise UserError(
            f"{origin}: found {name}, which is no parameter of a run but the policy of the checkout; allowed: "
            f"{', '.join(STEPS)}; edit {PARAMS_FILE} of the checkout to change it"
        )
    if section not in STEPS:
        raise UserError(f"{origin}: unknown section {section!r}; allowed: {list_choices(section, list(STEPS))}")
    if field not in values[section]:
        raise UserError(f"{origin}: unknown key {name!r}; allowed: {list_choices(field, list(values[section]))}")
    values[section][field] = value


def main() -> None:
    """Write a recipe and single values into `params.yaml`."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.recipes", description="Write values into params.yaml.")
    parser.add_argument("--recipe", help="a name from recipes/")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        dest="overrides",
        help="set one value, as in train.epochs=3; may be repeated",
    )
    arguments = parser.parse_args()
    with report_errors():
        overrides = parse_overrides(arguments.overrides)
        write_text(PARAMS_FILE, dump_yaml(compose(arguments.recipe, overrides)))
        print(f"{PARAMS_FILE} written; `git diff {PARAMS_FILE}` shows what changed, `dvc repro` runs the pipeline")


if __name__ == "__main__":
    main()
