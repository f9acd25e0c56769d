"""Read and write YAML files."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedSeq
from ruamel.yaml.scalarint import ScalarInt

from pipeline.core.errors import UserError


def read_yaml(path: Path) -> Any:
    """A YAML mapping with its comments; raises UserError where the file is missing or is not one."""
    try:
        values = YAML().load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run this in the project's folder") from None
    except OSError:
        raise
    # beside YAMLError, ruamel's constructors raise nearly anything on odd values: ValueError, KeyError, IndexError, …
    except Exception as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, Mapping):
        raise UserError(f"{path}: found no mapping; allowed: `name: value` lines")
    return values


def dump_yaml(values: Mapping[str, Any]) -> str:
    """The text of a params file, comments included, as DVC writes it: `dvc exp run -S` then changes no other line."""
    yaml, stream = YAML(), io.StringIO()
    yaml.default_flow_style = False
    for fields in values.values():
        for field, value in fields.items():
            fields[field] = _plain(value)
    yaml.dump(values, stream)
    return stream.getvalue()


def _plain(value: Any) -> Any:
    """The value without the way in which it was written: 1e-4 as 0.0001, a list with one item a line."""
    if isinstance(value, CommentedSeq):
        value.fa.set_block_style()
    return float(value) if isinstance(value, float) else int(value) if isinstance(value, ScalarInt) else value
