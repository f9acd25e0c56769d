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
    """Return the YAML mapping in a file, with its comments; raises UserError where the file is missing or has none."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run this in the project's folder") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid YAML: {error}; correct that line") from None
    return parse_yaml(text, origin=str(path))


def parse_yaml(text: str, *, origin: str) -> Any:
    """Return the YAML mapping in a text, with its comments; raises UserError, naming `origin`, where it has none."""
    try:
        values = YAML().load(text)
    # besides YAMLError, ruamel's constructors raise nearly anything on odd values: ValueError, KeyError, IndexError, …
    except Exception as error:
        raise UserError(f"{origin}: not valid YAML: {' '.join(str(error).split())}; correct that line") from None
    if not isinstance(values, Mapping):
        raise UserError(f"{origin}: found no YAML mapping; allowed: `name: value` lines; `git diff` shows what changed")
    return values


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Return the text of a params file, comments included, in the style of DVC.

    `dvc exp run -S`, which writes the file anew, then changes no line but that of its value.
    """
    yaml, stream = YAML(), io.StringIO()
    yaml.default_flow_style = False
    for fields in values.values():
        for field, value in fields.items():
            fields[field] = _plain(value)
    yaml.dump(values, stream)
    return stream.getvalue()


def _plain(value: Any) -> Any:
    """Return the value in plain notation: 1e-4 as 0.0001, and a list with one item on each line."""
    if isinstance(value, CommentedSeq):
        value.fa.set_block_style()
    return float(value) if isinstance(value, float) else int(value) if isinstance(value, ScalarInt) else value
