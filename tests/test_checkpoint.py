"""A checkpoint file is complete or absent, belongs to one training, and is used by one process at a time."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.core.errors import TemporaryError
from pipeline.training.checkpoints import (
    MAX_CHECKPOINTS,
    Checkpoint,
    Checkpoints,
    checkpoint_folder,
    checkpoints_of,
    fingerprint,
)
from tests.conftest import PROJECT

STATE = {"history": [0.1, 1 / 3], "position": None}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIPELINE_CACHE_DIR", str(tmp_path))
    return tmp_path


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, {"weight": torch.full((3,), float(step)), "count": torch.tensor(step)}, STATE)


def write_checkpoints(folder: Path, *steps: int) -> list[Path]:
    """Write checkpoints of these steps, and return all files, newest first."""
    for step in steps:
        Checkpoints(folder).write(checkpoint(step))
    return sorted(folder.iterdir(), reverse=True)


def newest_step(folder: Path) -> int | None:
    found = Checkpoints(folder).newest()
    return found.step if found else None


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_checkpoints(tmp_path / "one", 7)
    found = Checkpoints(tmp_path / "one").newest()
    assert found
    assert (found.step, found.state) == (7, STATE)
    assert torch.equal(found.tensors["weight"], torch.full((3,), 7.0))
    assert found.to_bytes() == checkpoint(7).to_bytes()


def test_the_newest_checkpoint_is_used_and_old_ones_are_removed(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / ".step-0000000003-x.safetensors.99.tmp").write_text("what a killed process was writing")
    assert len(write_checkpoints(tmp_path / "one", 9, 10, 11, 12)) == MAX_CHECKPOINTS
    assert newest_step(tmp_path / "one") == 12


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_the_later_of_two_checkpoints_of_the_same_step_is_used(tmp_path: Path, order: tuple[int, ...]) -> None:
    for position in order:  # the order of the MD5s in the names of the files must not matter
        Checkpoints(tmp_path).write(replace(checkpoint(7), state={"position": position}))
    found = Checkpoints(tmp_path).newest()
    assert found
    assert found.state == {"position": order[-1]}


@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied"])
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    newest, _ = write_checkpoints(tmp_path / "one", 1, 2)
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes({"flipped": bytes(content), "truncated": newest.read_bytes()[:-1], "emptied": b""}[damage])
    assert newest_step(tmp_path / "one") == 1
    assert "damaged" in capsys.readouterr().out


def test_a_new_checkpoint_is_kept_although_damaged_ones_have_later_steps(tmp_path: Path) -> None:
    for path in write_checkpoints(tmp_path / "one", 90, 100):
        path.write_bytes(b"nothing")
    assert write_checkpoints(tmp_path / "one", 5)[-1].name.startswith("step-0000000005")
    assert newest_step(tmp_path / "one") == 5


def test_no_checkpoint_is_found_where_all_are_damaged_or_missing(tmp_path: Path) -> None:
    for path in write_checkpoints(tmp_path / "one", 1, 2):
        path.write_bytes(b"nothing")
    assert newest_step(tmp_path / "one") is None
    assert newest_step(tmp_path / "none") is None


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(st.data())
def test_damaged_content_raises_only_value_error(data: st.DataObject) -> None:
    content = bytearray(checkpoint(3).to_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "header"]))
    position = data.draw(st.integers(0, len(content) - 1 if kind != "header" else 120))
    if kind == "cut":
        del content[position : position + data.draw(st.integers(1, 40))]
    elif kind == "insert":
        content[position:position] = data.draw(st.binary(min_size=1, max_size=40))
    else:
        content[position] ^= data.draw(st.integers(1, 255))
    with suppress(ValueError):  # the MD5 in the name of a file is checked before its content is parsed
        Checkpoint.from_bytes(bytes(content))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=300))
@example((2**63).to_bytes(8, "little"))
@example((2).to_bytes(8, "little") + b"[]")
def test_arbitrary_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="not a checkpoint"):
        Checkpoint.from_bytes(content)


def test_the_fingerprint_depends_on_the_values_and_not_on_their_order() -> None:
    assert fingerprint(params={"epochs": 1}, code="a") == fingerprint(code="a", params={"epochs": 1})
    assert fingerprint(params={"epochs": 1}, code="a") != fingerprint(params={"epochs": 2}, code="a")


def test_checkpoints_are_kept_when_the_training_fails_and_removed_when_it_finishes() -> None:
    with pytest.raises(RuntimeError), checkpoints_of("one") as found:
        found.write(checkpoint(1))
        raise RuntimeError
    assert newest_step(checkpoint_folder() / "one") == 1
    with checkpoints_of("one") as found:
        assert found.newest()
    assert list(checkpoint_folder().iterdir()) == []


def test_a_training_does_not_see_the_checkpoints_of_another() -> None:
    with checkpoints_of("one") as found:
        found.write(checkpoint(1))
        with checkpoints_of("two") as others:
            assert others.newest() is None


OTHER_PROCESS = """
import sys
from pipeline.training.checkpoints import checkpoints_of
with checkpoints_of("one"):
    print("held", flush=True)
    sys.stdin.read()
    if sys.argv[1] == "fail":
        raise SystemExit(1)
"""


@pytest.fixture
def other_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[str]]:
    """Yield a process that runs the same training, and fails or finishes when this process prints that it waits."""
    command = [sys.executable, "-c", OTHER_PROCESS, request.param]
    with subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        end = process.stdin.close

        def print_and_end(*values: object, **options: Any) -> None:
            print(*values, **options)
            end()

        monkeypatch.setattr("pipeline.training.checkpoints.print", print_and_end, raising=False)
        yield process


@pytest.mark.parametrize("other_process", ["fail"], indirect=True)
def test_a_second_process_waits_and_continues_when_the_first_fails(
    other_process: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with checkpoints_of("one"):
        assert other_process.wait() == 1
    assert "another process runs this training: waiting" in capsys.readouterr().out


@pytest.mark.parametrize("other_process", ["finish"], indirect=True)
def test_a_second_process_reports_that_the_first_has_finished(other_process: subprocess.Popen[str]) -> None:
    finished = "another process has just finished this training"
    with pytest.raises(TemporaryError, match=finished), checkpoints_of("one"):
        pass
    assert other_process.wait() == 0
