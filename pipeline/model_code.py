"""The code that a recorded model brings along, as a package whose name no application has.

MLflow puts that code first on the path of whatever loads the model. Under the name `pipeline` it would hide an
application's own module, or be hidden by it. The name holds a hash of the code, so that models of different versions
can be loaded in one process.
"""

import ast
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifacts import bytes_md5

PACKAGE = "pipeline"
NAME = "classifier_pipeline"
ENTRY = "from {name}.{module} import {attribute}\n\nfrom mlflow.models import set_model\n\nset_model({attribute}())\n"


@dataclass(frozen=True)
class ModelCode:
    """Two paths for MLflow, and the name of the package: what it runs (model from code), and what that imports."""

    entry: Path
    package: Path
    name: str


@contextmanager
def packaged(module: str, attribute: str) -> Iterator[ModelCode]:
    """Write a module of this package, and those it imports, into a temporary package that can be imported meanwhile.

    The entry makes an instance of the class `attribute` in `module` the model.
    """
    sources = {name: _read(name) for name in sorted(imported_modules(module))}
    name = f"{NAME}_{bytes_md5(repr(sources).encode())[:12]}"
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / name
        package.mkdir()
        (package / "__init__.py").touch()
        for each, source in sources.items():
            (package / f"{each}.py").write_text(_renamed(source, name), encoding="utf-8")
        entry = Path(folder) / f"{module}.py"
        entry.write_text(ENTRY.format(name=name, module=module, attribute=attribute), encoding="utf-8")
        sys.path.insert(0, folder)
        try:
            yield ModelCode(entry, package, name)
        finally:
            sys.path.remove(folder)
            for loaded in [each for each in sys.modules if each.partition(".")[0] == name]:
                del sys.modules[loaded]


def imported_modules(module: str) -> set[str]:
    """Return the modules of this package that one of them loads, itself included."""
    found, waiting = set[str](), {module}
    while waiting:
        each = waiting.pop()
        found.add(each)
        waiting |= _imports(_read(each)) - found
    return found


def _imports(source: str) -> set[str]:
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    of_package = {alias.name for node in nodes if node.module == PACKAGE for alias in node.names}
    prefix = f"{PACKAGE}."
    return of_package | {node.module.removeprefix(prefix) for node in nodes if (node.module or "").startswith(prefix)}  # type: ignore[union-attr]


def _renamed(source: str, name: str) -> str:
    """Return the source with its imports from this package taken from the package `name`."""
    return re.sub(rf"^(\s*from ){PACKAGE}(?=[. ])", rf"\g<1>{name}", source, flags=re.MULTILINE)


def _read(module: str) -> str:
    return (Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8")
