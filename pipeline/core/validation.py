"""One-line error messages for values that pydantic refuses."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline.core.errors import redact_url


def explain(
    error: ValidationError, *, sections: Mapping[str, type[BaseModel]], origin: str, overridden: Collection[str] = ()
) -> str:
    """Return the first problem as one line: file, field, what was found, what is allowed.

    `sections` maps the name of each section to its model. For a field in `overridden` the line names `--set` in place
    of the file.
    """
    problems = error.errors()
    # a mistyped key is both unknown and missing; the message about the unknown key says more
    problem = next((found for found in problems if found["type"] == "extra_forbidden"), problems[0])
    where = ".".join(str(part) for part in problem["loc"] if not str(part).startswith("function"))
    origin = "--set" if where in overridden else origin
    types = [found["type"] for found in problems]
    num_others = len(problems) - 1 - min(types.count("extra_forbidden"), types.count("missing"))
    more = f" (and {num_others} more)" if num_others > 0 else ""
    model = sections.get(str(problem["loc"][0])) if len(problem["loc"]) > 1 else None
    fields = list(model.model_fields if model else sections)
    if problem["type"] == "extra_forbidden":
        return f"{origin}: unknown key {where!r}; allowed: {list_choices(str(problem['loc'][-1]), fields)}{more}"
    if problem["type"] == "missing":
        return f"{origin}: {where} is missing; add it (`git diff` shows what was changed){more}"
    if problem["type"] == "value_error" and len(problem["loc"]) == 1:
        return f"{origin}: {where}.{problem['ctx']['error']}{more}"
    allowed = problem["msg"].removeprefix("Value error, ").replace("Input should be ", "")
    return f"{origin}: {where} is {describe_value(problem['input'])}; allowed: {allowed}{more}"


def first_problem(error: ValidationError) -> str:
    """Return the first problem in data that a program wrote, as `field.part: what is wrong with it`."""
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc'])) or 'its content'}: {problem['msg']}"


def describe_value(value: Any) -> str:
    """Return a value as text for an error message, without secrets.

    Nested lists and mappings are not written out: by YAML's aliases, a short file can make them endless.
    """
    if isinstance(value, str):
        return repr(redact_url(value))
    if isinstance(value, Mapping):
        return "a mapping" if value else "{}"
    if isinstance(value, list | tuple):
        return (
            f"[{', '.join(map(describe_value, value))}]"
            if all(map(_is_scalar, value))
            else "a list of lists or mappings"
        )
    return repr(value)


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, Mapping | list | tuple | set)


def list_choices(found: str, names: list[str]) -> str:
    """Return the allowed names and what to do as text; suggests the allowed name that is similar to `found`, if any."""
    close = difflib.get_close_matches(found, names, n=1)
    return ", ".join(names) + (f" (did you mean {close[0]}?)" if close else "") + "; correct the name"
