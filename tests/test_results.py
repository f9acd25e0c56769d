"""A step passes its result to the program that started it, in a file."""

from pathlib import Path

import pytest

from pipeline.core.results import RESULT_FILE, StepResult, read_result, write_result


def test_a_result_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RESULT_FILE, str(tmp_path / "result.json"))
    write_result(StepResult("5f3a"))
    assert read_result(tmp_path / "result.json") == StepResult("5f3a")
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_no_result_is_written_without_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RESULT_FILE, raising=False)
    monkeypatch.chdir(tmp_path)
    write_result(StepResult("5f3a"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", [None, "", '{"mlflow_run_id": "5f', "[]", "{}", '{"mlflow_run_id": 7}'])
def test_a_missing_or_damaged_file_is_an_unknown_result(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "result.json").write_text(text)
    assert read_result(tmp_path / "result.json") == StepResult()
