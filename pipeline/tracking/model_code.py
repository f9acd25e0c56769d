"""The code that a recorded model brings along: this package under a name that no application has.

MLflow puts that code first on the path of whatever loads the model. Under the name `pipeline` it would hide an
application's own module, or be hidden by it. The name holds a hash of the code, so that models of different versions
can be loaded in one process.
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
ENTRY = """from {name}.tracking.served_model import ServedModel
from mlflow.models import set_model

set_model(ServedModel())
"""


@dataclass(frozen=True)
class ModelCode:
    """Two paths for MLflow, what it runs (model from code) and what that imports, and the name of the package."""

    entry: Path
    package: Path
    name: str


@contextmanager
def packaged() -> Iterator[ModelCode]:
    """Write this package under its other name to a temporary folder, and make it importable within the block."""
    sources = {file.relative_to(PACKAGE): file.read_text(encoding="utf-8") for file in sorted(PACKAGE.rglob("*.py"))}
    name = f"classifier_pipeline_{hashlib.md5(repr(sources).encode(), usedforsecurity=False).hexdigest()[:12]}"
    sources[Path("__init__.py")] = ""  # the startup of our own processes is no business of a server's
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / name
        for path, source in sources.items():
            (package / path).parent.mkdir(parents=True, exist_ok=True)
            (package / path).write_text(_renamed(source, name), encoding="utf-8")
        entry = Path(folder) / "model.py"
        entry.write_text(ENTRY.format(name=name), encoding="utf-8")
        sys.path.insert(0, folder)
        try:
            yield ModelCode(entry, package, name)
        finally:
            sys.path.remove(folder)
            for loaded in [module for module in sys.modules if module.partition(".")[0] == name]:
                del sys.modules[loaded]


def _renamed(source: str, name: str) -> str:
    """Return the source with its imports from `pipeline` taken from the package `name`."""
    return re.sub(r"^(\s*from )pipeline(?=[. ])", rf"\g<1>{name}", source, flags=re.MULTILINE)
