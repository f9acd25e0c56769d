"""The flow's parameters as types: Prefect makes the form of them, and refuses what they refuse.

`overrides` is flat, {"train.epochs": 3}: the words of the form are then those of `--set`, of `prefect deployment run
-p overrides=…`, of the errors and of MLflow, and the server, which checks against the form, takes no other shape.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model, model_serializer
from pydantic.fields import FieldInfo

from flows import PROJECT
from pipeline.params import RECIPES_FOLDER, SECTIONS

_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def _adapt(schema: Any) -> None:
    """Give the bounds JSON Schema's names, which pydantic does not where a validator stands before them.

    A switch that nobody touched would be sent as false, over the recipe's true; a choice may stay empty.
    """
    if isinstance(schema, dict) and schema.get("type") == "boolean":
        schema["enum"] = [True, False]
        del schema["type"]
    for key, value in list(schema.items()) if isinstance(schema, dict) else []:
        for part in value if isinstance(value, list) else [value]:
            _adapt(part)
        if key in _BOUNDS and not isinstance(value, dict):
            schema[_BOUNDS[key]] = schema.pop(key)


class _Overrides(BaseModel):
    """Values over the recipe's. What is left out stays as it is there."""

    model_config = ConfigDict(frozen=True, extra="forbid", json_schema_extra=_adapt)

    @model_serializer
    def flat(self) -> dict[str, Any]:
        """`{"train.epochs": 3}`: what was given, and no more; null may be given too."""
        fields = type(self).model_fields
        return {
            str(field.alias): getattr(self, name) for name, field in fields.items() if name in self.model_fields_set
        }


def _optional(field: FieldInfo, *, name: str) -> Any:
    """Type and field of one parameter; with a factory, for a plain default would fill in the form."""
    description = (field.description or "").replace("<", "&lt;")  # the page takes it for HTML
    annotation: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    return annotation, Field(default_factory=lambda: None, alias=name, title=name, description=description)


def _recipes() -> list[str]:
    return sorted(path.stem for path in (PROJECT / RECIPES_FOLDER).glob("*.yaml"))


if TYPE_CHECKING:
    Recipe = str
    Overrides = _Overrides
else:
    Recipe = Literal[tuple(_recipes())] if _recipes() else str
    Overrides = create_model(
        "Overrides",
        __base__=_Overrides,
        __doc__=_Overrides.__doc__,
        **{
            f"{section}_{name}": _optional(field, name=f"{section}.{name}")
            for section, model in SECTIONS.items()
            for name, field in model.model_fields.items()
        },
    )
