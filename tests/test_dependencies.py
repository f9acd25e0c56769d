"""pyproject.toml declares every imported package, and the project imports no package that is for development only."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.conftest import PROJECT

DECLARED = tomllib.loads((PROJECT / "pyproject.toml").read_text())
OURS = {"pipeline", "flows", "tests", "benchmarks"}
CODE = [*PROJECT.glob("pipeline/**/*.py"), *PROJECT.glob("flows/**/*.py")]
DEVELOPMENT = [*PROJECT.glob("tests/**/*.py"), *PROJECT.glob("benchmarks/**/*.py")]


def normalized(requirement: str) -> str:
    """Return the name of a requirement as PEP 503 normalizes it: `psycopg` for `psycopg[binary]>=3`."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", requirement)[0]).lower()


RUNTIME = {normalized(each) for each in DECLARED["project"]["dependencies"]}
DEV = {normalized(each) for each in DECLARED["dependency-groups"]["dev"]}
DISTRIBUTIONS = packages_distributions()


def imported(path: Path) -> set[str]:
    """Return the top-level modules that a file imports, without those of Python itself and of this project."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - OURS


def undeclared(path: Path, declared: set[str]) -> set[str]:
    """Return the imported modules that belong to no declared distribution."""
    return {
        name for name in imported(path) if not {normalized(each) for each in DISTRIBUTIONS.get(name, [])} & declared
    }


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.stem)
def test_packages_that_the_project_imports_are_declared(path: Path) -> None:
    assert not undeclared(path, RUNTIME)


@pytest.mark.parametrize("path", DEVELOPMENT, ids=lambda path: path.stem)
def test_packages_that_tests_and_benchmarks_import_are_declared(path: Path) -> None:
    assert not undeclared(path, RUNTIME | DEV)


def test_every_extra_has_a_lock_file_and_is_in_the_makefile() -> None:
    makefile = (PROJECT / "Makefile").read_text()
    extras = re.search(r"^ALL_EXTRAS := (.*)$", makefile, re.MULTILINE)
    assert extras
    assert extras[1].split() == list(DECLARED["project"]["optional-dependencies"])
    locks = {path.stem for path in (PROJECT / "requirements").glob("*.lock")}
    assert locks == {"base", "dev", "uv", "audit", *extras[1].split()}


@pytest.mark.parametrize(("lock", "declared"), [("base", RUNTIME), ("dev", DEV)])
def test_a_lock_file_contains_the_declared_packages(lock: str, declared: set[str]) -> None:
    pinned = {
        line.partition("==")[0]
        for name in {"base", lock}
        for line in (PROJECT / "requirements" / f"{name}.lock").read_text().splitlines()
        if re.match(r"[a-z0-9.-]+==", line)
    }
    assert declared <= pinned


def test_development_packages_are_not_in_the_base_lock() -> None:
    base = (PROJECT / "requirements" / "base.lock").read_text()
    indirect = {"alembic", "anyio", "websockets"}  # MLflow and Prefect depend on them
    assert not [name for name in DEV - indirect if re.search(rf"^{re.escape(name)}==", base, re.MULTILINE)]
