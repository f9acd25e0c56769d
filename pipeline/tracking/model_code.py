"""Copy this package, for a recorded model, under a name that no application uses.

A program that loads the model gets this code first on its import path. Under the name `pipeline` it would hide a module
of that program, or be hidden by it. The name holds a hash of the code, so that one process can load models of different
versions.
"""

import hashlib
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
ENTRY_SOURCE = """from {name}.tracking.served_model import ServedModel
from mlflow.models import set_model

set_model(ServedModel())
"""


@dataclass(frozen=True)
class ModelCode:
    """The code of a recorded model: the script that MLflow runs, the package that it imports, the package's name."""

    entry: Path
    package: Path
    name: str


@contextmanager
def renamed_package() -> Iterator[ModelCode]:
    """Copy the package `pipeline` under a new name into a temporary folder; the block can import the copy.

    The name contains a hash of the code. At the end, the folder is deleted, and the modules of the copy are removed
    from `sys.modules`.
    """
    sources = {file.relative_to(PACKAGE): file.read_text(encoding="utf-8") for file in sorted(PACKAGE.rglob("*.py"))}
    name = f"classifier_pipeline_{hashlib.md5(repr(sources).encode(), usedforsecurity=False).hexdigest()[:12]}"
    sources[Path("__init__.py")] = ""  # its code tunes the start of our own processes only
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / name
        for path, source in sources.items():
            (package / path).parent.mkdir(parents=True, exist_ok=True)
            (package / path).write_text(_renamed(source, name), encoding="utf-8")
        entry = Path(folder) / "model.py"
        entry.write_text(ENTRY_SOURCE.format(name=name), encoding="utf-8")
        sys.path.insert(0, folder)
        try:
            yield ModelCode(entry, package, name)
        finally:
            sys.path.remove(folder)
            for loaded in [module for module in sys.modules if module.partition(".")[0] == name]:
                del sys.modules[loaded]


def _renamed(source: str, name: str) -> str:
    """Return the source with its imports from `pipeline` changed to imports from the package `name`."""
    return re.sub(r"^(\s*from )pipeline(?=[. ])", rf"\g<1>{name}", source, flags=re.MULTILINE)
