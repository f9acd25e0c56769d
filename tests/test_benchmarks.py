"""The benchmarks start without the tools that they do not measure, and find what they import from the pipeline."""

import ast
import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from benchmarks import predict, table
from benchmarks.paired import p_value, t_distribution_tails
from pipeline.core.errors import UserError
from tests.conftest import PROJECT
from tests.test_architecture import imports

FILES = sorted(PROJECT.glob("benchmarks/**/[!_]*.py"))
# Benchmarks that import MLflow because they measure it or need its model registry; `repro` and `overhead` measure it in
# subprocesses.
MEASURE_MLFLOW = {"epochs", "serving", "served_project"}
IMPORT = re.compile(r"from (pipeline[\w.]*) import ([\w, ]+)")


def module_file(name: str) -> Path | None:
    """Return the file of a module of this project; None for other modules."""
    file = PROJECT / Path(*name.split(".")).with_suffix(".py")
    return file if file.is_file() else None


def loaded_files(path: Path) -> set[Path]:
    """Return the files of this project that are loaded with a file, itself included."""
    found, pending = set[Path](), [path]
    while pending:
        file = pending.pop()
        if file not in found:
            found.add(file)
            pending += [other for other in map(module_file, imports(file)) if other]
    return found


def top_level_names(path: Path) -> set[str]:
    nodes = ast.parse(path.read_text()).body
    return {name.id for node in nodes for name in ast.walk(node) if isinstance(name, ast.Name)} | {
        node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.stem not in MEASURE_MLFLOW], ids=lambda path: path.stem
)
def test_a_benchmark_starts_without_the_tools_that_it_does_not_measure(path: Path) -> None:
    imported = set[str]().union(*(imports(file) for file in loaded_files(path)))
    assert not {"mlflow", "prefect", "dvc"} & {name.partition(".")[0] for name in imported}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_names_that_a_benchmark_imports_exist_also_in_code_that_it_runs_as_text(path: Path) -> None:
    for module, names in IMPORT.findall(path.read_text()):
        file = module_file(module)
        for imported in names.split(", "):
            name = imported.split(" ")[0]  # before "as"
            assert (file and name in top_level_names(file)) or module_file(f"{module}.{name}")


def test_the_header_reports_missing_packages_and_a_missing_git(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> str:
        raise PackageNotFoundError

    def no_git(*_: object) -> str:
        raise UserError("git: not found; install it")

    monkeypatch.setattr(table, "version", missing)
    monkeypatch.setattr(table, "git", no_git)
    text = table.header(seeds="0")
    assert "commit unknown with changes unknown" in text
    assert "mlflow not installed, prefect not installed" in text


@pytest.mark.parametrize(("t", "freedom"), [(12.7062, 1), (2.77645, 4), (2.26216, 9)])
def test_5_percent_of_the_t_distribution_are_beyond_the_tabulated_values(t: float, freedom: int) -> None:
    for sign in (-1, 1):
        assert t_distribution_tails(sign * t, freedom=freedom) == pytest.approx(0.05, abs=1e-5)


def test_the_p_value_is_that_of_the_paired_t_test() -> None:
    # mean 2, standard deviation sqrt(2.5), so t = 2.8284
    assert p_value([0, 1, 2, 3, 4]) == pytest.approx(0.04742, abs=1e-5)
    assert (p_value([0, 0]), p_value([1, 1])) == (1, 0)


@pytest.mark.parametrize(("ends", "files"), [((), "one file"), ((2,), "2 files"), ((1, 3), "3 files")])
def test_a_command_is_killed_as_often_as_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: tuple[int, ...], files: str
) -> None:
    tried = 0

    def run(output: Path, folder: Path, *, kill_at: tuple[float, float] | None = None) -> predict.Run:
        nonlocal tried
        tried += kill_at is not None
        was_killed = kill_at is not None and tried - 1 not in ends
        if not was_killed:
            output.touch()
        return predict.Run(5, 1.0, was_killed)

    monkeypatch.setattr(predict, "run", run)
    monkeypatch.setattr(predict, "_check_rows", lambda *_, **__: None)
    assert predict.check_kills(tmp_path, files=9, kills=4).startswith(f"4 kills, {files} of 9 rows: ")
    assert tried == 4 + len(ends)


def test_runs_that_end_before_they_are_killed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(output: Path, folder: Path, **_: object) -> predict.Run:
        output.touch()
        return predict.Run(1, 1.0, was_killed=False)

    monkeypatch.setattr(predict, "run", run)
    monkeypatch.setattr(predict, "_check_rows", lambda *_, **__: None)
    with pytest.raises(UserError, match="--files 9: each run ended before it was killed"):
        predict.check_kills(tmp_path, files=9, kills=2)
