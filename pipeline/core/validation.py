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

    `sections` maps the name of each section to its model; a field in `overridden` is reported as an override.
    """
    problems = error.errors()
    # a mistyped key also counts as missing: the key that was typed is the better message
    problem = next((found for found in problems if found["type"] == "extra_forbidden"), problems[0])
    where = ".".join(str(part) for part in problem["loc"] if not str(part).startswith("function"))
    origin = "override" if where in overridden else origin
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
    """`field.part: what is wrong with it`, of data that a program wrote."""
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc'])) or 'the whole'}: {problem['msg']}"


def describe_value(value: Any) -> str:
    """A value as it was written, without secrets; lists and mappings, which YAML can fold without end, only if flat."""
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
    """The names, the closest match named where one is close to what was found."""
    close = difflib.get_close_matches(found, names, n=1)
    return ", ".join(names) + (f" (did you mean {close[0]}?)" if close else "")
