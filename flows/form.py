"""The types of the flow's parameters: Prefect builds its form from them, and refuses values that they refuse.

`overrides` is flat, {"train.epochs": 3}: the form then has the same names as `--set`, `prefect deployment run
-p overrides=…`, the error messages and MLflow. Prefect's server validates against the form: it accepts only this.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model, model_serializer
from pydantic.fields import FieldInfo

from flows import PROJECT
from pipeline.params import RECIPES_FOLDER, STEPS

NumSeeds = Annotated[int, Field(ge=1)]
_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def _adapt(schema: Any) -> None:
    """Change a JSON schema in place: rename bounds to JSON Schema's names, and make booleans a choice of two values.

    Pydantic leaves its own names of bounds where a validator precedes them. A form would send false for a boolean that
    the user did not touch, and so override a recipe's true; a choice can stay empty.
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
    """Values that replace those of the recipe; a parameter that is left out keeps the recipe's value."""

    model_config = ConfigDict(frozen=True, extra="forbid", json_schema_extra=_adapt)

    @model_serializer
    def flat(self) -> dict[str, Any]:
        """Return the values that were set, null included, as `{"train.epochs": 3}`."""
        fields = type(self).model_fields
        return {
            str(field.alias): getattr(self, name) for name, field in fields.items() if name in self.model_fields_set
        }


def _optional(field: FieldInfo, *, name: str) -> Any:
    """Return type and field of one parameter; its default is a factory, since the form would show a plain default."""
    description = (field.description or "").replace("<", "&lt;")  # Prefect's page renders it as HTML
    annotation: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    return annotation, Field(default_factory=lambda: None, alias=name, title=name, description=description)


def _recipes() -> list[str]:
    """Return the names of the recipes in alphabetical order."""
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
            for section, model in STEPS.items()
            for name, field in model.model_fields.items()
        },
    )
