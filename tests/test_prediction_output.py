"""`python -m pipeline.predict --output FILE` writes one row for each input, also after it was killed."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.artifacts import file_md5, write_checksums
from pipeline.core.errors import EXIT_INTERRUPTED, EXIT_PARTIAL, EXIT_TERMINATED, EXIT_USER
from pipeline.core.processes import num_cores
from pipeline.core.yaml import dump_yaml
from pipeline.evaluation.predictions import read_predictions
from pipeline.images.blocks import hash_content
from pipeline.models.files import save_config
from pipeline.prediction import image_files, output, output_folder
from pipeline.prediction.output_folder import Request, open_folder
from pipeline.recipes import compose
from tests import prediction_kills
from tests.conftest import PROJECT, run_step
from tests.raw_folders import encoded, noise
from tests.test_model import config
from tests.test_predict import CONFIG, model, run, write_shades  # noqa: F401  # a fixture that each test uses

READERS: dict[str, Callable[[str], pd.DataFrame]] = {
    "csv": lambda path: pd.read_csv(path, dtype={"content_hash": str}),
    "jsonl": lambda path: pd.read_json(path, lines=True, dtype=False, precise_float=True),
    "parquet": pd.read_parquet,
}
FORMATS = pytest.mark.parametrize("suffix", READERS)
ODD_NAMES = ['a, "b".png', "two\nlines.png", "carriage\rreturn.png", "=1+1.png", "é 日本.png", "tab\t;.png", " .png"]


class Command:
    """Runs the command in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """Return exit status, stdout and stderr."""
        status = 0
        try:
            run(self._monkeypatch, *arguments)
        except SystemExit as error:
            status = int(error.code or 0)
        return status, *self._capsys.readouterr()

    def succeed(self, *arguments: str) -> str:
        status, stdout, stderr = self(*arguments)
        assert status == 0, stderr
        return stdout


@pytest.fixture
def command(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:  # noqa: F811
    """Return the command, with parts of 4 rows, in a folder with a model."""
    monkeypatch.setattr(output, "PART_ROWS", 4)
    return Command(monkeypatch, capsys)


# ---- what is written


@FORMATS
def test_each_format_has_the_rows_in_the_order_of_the_inputs(command: Command, suffix: str) -> None:
    names = write_shades(6)[::-1]
    assert command.succeed(*names, "--output", f"out.{suffix}", "--top", "2") == f"out.{suffix}: 6 rows\n"
    printed = [json.loads(line) for line in command.succeed(*names, "--json").splitlines()]
    rows = READERS[suffix](f"out.{suffix}")
    assert rows["path"].tolist() == names
    assert rows["class"].tolist() == ["b"] * 6
    assert rows["probability"].tolist() == [answer["probabilities"]["b"] for answer in printed]
    assert rows["content_hash"].tolist() == [f"{hash_content(Path(name).read_bytes()):016x}" for name in names]
    assert set(rows["model_md5"]) == {file_md5(Path("artifacts/train/best.safetensors"))}
    assert rows["error"].isna().all()
    assert "is_unknown" not in rows
    top = [list(answer["probabilities"].items())[:2] for answer in printed]
    if suffix == "csv":
        found = rows[["class_1", "probability_1", "class_2", "probability_2"]].to_numpy().tolist()
        assert found == [[value for pair in row for value in pair] for row in top]
        assert "class_3" not in rows
    else:
        assert [[(one["class"], one["probability"]) for one in row] for row in rows["top"]] == top


@FORMATS
def test_odd_names_are_read_by_pandas(command: Command, suffix: str) -> None:
    not_utf8 = [] if sys.platform == "darwin" else [os.fsdecode(b"\xff \xc3\xa9.png")]
    for name in (names := [*ODD_NAMES, *not_utf8]):
        shutil.copy("photo.png", name)
    command.succeed(*names, "--output", f"out.{suffix}")
    found = READERS[suffix](f"out.{suffix}")["path"].tolist()
    assert found == ODD_NAMES + ["\\udcff é.png"] * len(not_utf8)


@FORMATS
def test_an_unreadable_file_has_a_row_with_the_reason(command: Command, suffix: str) -> None:
    Path("bad.png").write_text("no image")
    status, _, stderr = command("photo.png", "bad.png", "gone.png", "--output", f"out.{suffix}")
    assert status == EXIT_PARTIAL
    bad, gone, last = stderr.splitlines()
    assert bad.startswith("error: bad.png: not readable as an image (")
    assert gone == "error: gone.png: no such file"
    assert last.startswith("error: 2 of 3 inputs cannot be read (reasons above); all others were classified")
    rows = READERS[suffix](f"out.{suffix}")
    assert rows["error"].tolist()[1:] == [line.partition("png: ")[2] for line in (bad, gone)]
    assert rows["class"].notna().tolist() == rows["probability"].notna().tolist() == [True, False, False]
    assert rows["content_hash"].notna().tolist() == [True, True, False]


@FORMATS
def test_a_coverage_adds_a_column_that_states_what_is_unknown(command: Command, suffix: str) -> None:
    Path("bad.png").write_text("no image")
    save_config(config(**CONFIG, thresholds={0.5: 1.0, 0.9: 0.0}), Path("artifacts/train"))
    write_checksums(Path("artifacts/train"))
    for coverage, name in (("0.5", "unknown"), ("0.9", "b")):
        command("photo.png", "bad.png", "--coverage", coverage, "--output", f"{coverage}.{suffix}")
        rows = READERS[suffix](f"{coverage}.{suffix}")
        assert rows["class"].tolist()[0] == name
        assert rows["is_unknown"].tolist()[0] == (name == "unknown")
        assert rows["is_unknown"].isna().tolist() == [False, True]


def test_an_empty_list_is_refused(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "list").touch()
    with (tmp_path / "list").open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        status, stdout, stderr = command("-", "--output", "out.csv")
    assert (status, stdout) == (2, "")
    assert stderr.startswith("error: standard input: no paths; allowed: one or more; ")
    assert not Path("out.csv").exists()


def test_more_classes_than_the_model_has_are_all_of_them(command: Command) -> None:
    command.succeed("photo.png", "--top", "9", "--output", "new/folder/out.csv")
    header = Path("new/folder/out.csv").read_text().splitlines()[0]
    assert header == (
        "path,class,probability,class_1,probability_1,class_2,probability_2,class_3,probability_3,content_hash,"
        "model_md5,error"
    )


@pytest.mark.parametrize(("name", "expected"), [("~/out.csv", "home/out.csv"), ("./~/out.csv", "~/out.csv")])
def test_a_tilde_stands_for_the_home_folder_where_it_is_the_first_character(
    command: Command, monkeypatch: pytest.MonkeyPatch, workspace: Path, name: str, expected: str
) -> None:
    monkeypatch.setenv("HOME", str(workspace / "home"))
    command.succeed("photo.png", f"--output={name}")
    assert READERS["csv"](str(workspace / expected))["path"].tolist() == ["photo.png"]


# ---- what is refused


def test_an_existing_file_is_replaced_only_on_request(command: Command) -> None:
    Path("out.csv").write_text("mine")
    status, _, stderr = command("photo.png", "--output", "out.csv")
    assert (status, Path("out.csv").read_text()) == (EXIT_USER, "mine")
    assert stderr.startswith("error: --output out.csv: the file exists; allowed: ")
    assert "add --overwrite" in stderr
    command.succeed("photo.png", "--output", "out.csv", "--overwrite")
    assert READERS["csv"]("out.csv")["path"].tolist() == ["photo.png"]


def test_a_file_that_appears_meanwhile_is_not_replaced(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(output, "write_result", lambda path, *_, **__: path.write_text("mine"))
        status, _, stderr = command("photo.png", "--output", "out.csv")
    assert (status, Path("out.csv").read_text()) == (EXIT_USER, "mine")
    assert stderr.startswith("error: --output out.csv: the file exists; allowed: ")
    command.succeed("photo.png", "--output", "out.csv", "--overwrite")
    assert READERS["csv"]("out.csv")["path"].tolist() == ["photo.png"]


def test_what_another_program_made_at_the_path_of_the_folder_is_kept(command: Command) -> None:
    Path("out.csv.partial").mkdir()
    Path("out.csv.partial/mine").touch()
    Path("x.csv.partial").touch()
    Path("folder.csv").mkdir()
    for name, problem in (("out", "out.csv.partial"), ("x", "x.csv.partial"), ("folder", "--output folder.csv")):
        status, _, stderr = command("photo.png", "--output", f"{name}.csv")
        assert (status, len(stderr.splitlines())) == (EXIT_USER, 1)
        assert stderr.startswith(f"error: {problem}: found")
    assert [path.name for path in Path("out.csv.partial").iterdir()] == ["mine"]


def test_a_second_process_on_the_same_file_is_refused(command: Command) -> None:
    request: Any = {"weights_md5": "", "config_md5": "", "top": 1, "coverage": None, "views": "none", "device": "cpu"}
    with open_folder(Path("out.csv"), Request(**request)):
        status, _, stderr = command("photo.png", "--output", "out.csv")
    assert (status, len(stderr.splitlines())) == (EXIT_USER, 1)
    assert stderr.startswith("error: --output out.csv: another process is writing it; allowed: one at a time")
    command.succeed("photo.png", "--output", "out.csv")


def test_neither_the_file_nor_its_folder_is_an_input(command: Command) -> None:
    Path("photos").mkdir()
    shutil.copy("photo.png", "photos")
    Path("photos/out.csv").touch()
    paths = ["photos/photo.png", "photos/out.csv", "photos/out.csv.partial", "photos/out.csv.partial/request.json"]
    assert command.succeed(*paths, "--output", "photos/out.csv", "--overwrite") == "photos/out.csv: 1 row\n"


# ---- interrupted and resumed


def interrupt(command: Command, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """Run the command, interrupt it before the file gets its name, and return what it prints on stderr."""

    def raise_interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(output, "publish", raise_interrupt)
        status, _, stderr = command(*arguments)
    assert status == EXIT_INTERRUPTED
    return stderr


def test_an_interruption_ends_with_one_line_that_says_how_to_resume(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = interrupt(command, monkeypatch, *write_shades(6), "--output", "out.csv")
    assert stderr == "error: interrupted; out.csv.partial has the rows of 6 inputs; the same command resumes\n"
    assert not Path("out.csv").exists()


def test_a_resumed_command_keeps_the_parts_whose_files_are_the_same(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = write_shades(14)
    Path(names[1]).write_text("no image")
    interrupt(command, monkeypatch, *names, "--output", "out.csv")
    shutil.copy("photo.png", names[5])  # in the second part of four
    Path(names[8]).unlink()
    del names[9]  # in the third, so that its inputs and those of the last part move
    status, stdout, stderr = command(*names, "--output", "out.csv")
    assert (status, stdout) == (EXIT_PARTIAL, "out.csv: 13 rows, 4 of them by an earlier start\n")
    assert [line.partition(":")[2].split(":")[0].strip() for line in stderr.splitlines()[:-1]] == [names[1], names[8]]
    command(*names, "--output", "whole.csv")
    assert Path("out.csv").read_bytes() == Path("whole.csv").read_bytes()
    assert not list(Path().glob("*.partial"))


def test_a_file_that_was_replaced_by_one_of_the_same_size_and_time_is_read_again(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, status = Path("photo.png").read_bytes(), Path("photo.png").stat()
    Path("photo.png").write_bytes(bytes(len(good)))
    os.utime("photo.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    interrupt(command, monkeypatch, "photo.png", "--output", "out.csv")
    Path("new.png").write_bytes(good)
    os.utime("new.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    Path("new.png").replace("photo.png")
    assert command.succeed("photo.png", "--output", "out.csv") == "out.csv: 1 row\n"
    assert READERS["csv"]("out.csv")["content_hash"].tolist() == [f"{hash_content(good):016x}"]


@pytest.mark.parametrize(("is_over", "kept"), [(True, 4), (False, 6)])
def test_a_file_that_could_not_be_read_is_read_again_where_that_is_possible(
    command: Command, monkeypatch: pytest.MonkeyPatch, is_over: bool, kept: int
) -> None:
    names = write_shades(6)
    Path(names[1]).unlink()  # a part with a file that is still missing is kept
    read = image_files._read_bytes

    def fail(path: str) -> bytes:
        if path == names[5]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(image_files, "_read_bytes", fail)
        interrupt(command, monkeypatch, *names, "--output", "out.csv")
        if is_over:
            patch.undo()
        status, stdout, stderr = command(*names, "--output", "out.csv")
    assert (status, stdout) == (EXIT_PARTIAL, f"out.csv: 6 rows, {kept} of them by an earlier start\n")
    assert ("5.png: Input/output error" in stderr) != is_over


@pytest.mark.parametrize("content", [b"", b"PAR1 damaged PAR1"])
def test_a_damaged_part_is_made_again(command: Command, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    names = write_shades(6)
    interrupt(command, monkeypatch, *names, "--output", "out.csv")
    Path("out.csv.partial/000000.parquet").write_bytes(content)
    assert command.succeed(*names, "--output", "out.csv") == "out.csv: 6 rows, 2 of them by an earlier start\n"
    assert READERS["csv"]("out.csv")["path"].tolist() == names


def test_fewer_inputs_leave_no_row_of_an_earlier_start(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    names = write_shades(9)
    interrupt(command, monkeypatch, *names, "--output", "out.parquet")
    assert command.succeed(*names[:4], "--output", "out.parquet").endswith("4 rows, 4 of them by an earlier start\n")
    assert READERS["parquet"]("out.parquet")["path"].tolist() == names[:4]


def test_another_request_does_not_resume(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(command, monkeypatch, "photo.png", "--output", "out.csv")
    status, _, stderr = command("photo.png", "--output", "out.csv", "--top", "1", "--views", "mirror")
    assert (status, len(stderr.splitlines())) == (EXIT_USER, 1)
    assert stderr.startswith(
        "error: out.csv.partial: an earlier start made its rows in another way (top was 3 and is 1, views was none and "
        "is mirror); allowed: the same way; repeat the command of that start to resume it, or remove the folder"
    )
    shutil.rmtree("out.csv.partial")
    command.succeed("photo.png", "--output", "out.csv", "--top", "1", "--views", "mirror")


def test_the_same_command_recognizes_its_complete_file(command: Command) -> None:
    write_shades(5)
    Path("0.png").write_text("no image")
    arguments = ["[0-9].png", "--output", "out.csv"]
    assert command(*arguments)[0] == EXIT_PARTIAL
    state = Path("out.csv").stat()
    status, stdout, stderr = command(*arguments)
    assert (status, stdout) == (EXIT_PARTIAL, "out.csv: complete, 5 rows; an earlier start has written it\n")
    assert stderr.startswith("error: 1 of 5 inputs cannot be read (reasons in its column `error`); all others were")
    assert Path("out.csv").stat() == state
    command(*arguments, "--overwrite")
    assert Path("out.csv").stat().st_mtime_ns > state.st_mtime_ns


def leave_folder(*_: Any) -> None:
    """End a start before it removes the folder."""
    raise KeyboardInterrupt


def test_a_complete_file_is_no_answer_to_other_inputs(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    names = write_shades(6)
    with monkeypatch.context() as patch:
        patch.setattr(output_folder, "_remove", leave_folder)
        assert command(*names[:3], "--output", "out.csv")[0] == EXIT_INTERRUPTED
    for others in (names[3:], names[:2], [*names[:3], "--top", "1"]):
        status, _, stderr = command(*others, "--output", "out.csv")
        assert status == EXIT_USER
        assert stderr.startswith("error: --output out.csv: the file exists; allowed: ")
    assert command.succeed(*names[3:], "--output", "out.csv", "--overwrite") == "out.csv: 3 rows\n"
    assert READERS["csv"]("out.csv")["path"].tolist() == names[3:]


def test_a_start_that_was_killed_while_it_removed_the_folder_is_finished(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(output_folder, "_remove", leave_folder)
        assert command("photo.png", "--output", "out.csv")[0] == EXIT_INTERRUPTED
    Path(".out.csv.gone").mkdir()
    assert command.succeed("photo.png", "--output", "out.csv").startswith("out.csv: complete, 1 row")
    assert sorted(path.name for path in Path().glob("*out.csv*")) == [".out.csv.complete.json", "out.csv"]


def test_a_folder_that_another_start_has_just_removed_is_not_left(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    command.succeed("photo.png", "--output", "out.csv")
    locked = output_folder._locked

    def remove_before(folder: Path, path: Path) -> AbstractContextManager[None]:
        folder.rmdir()
        return locked(folder, path)

    Path("out.csv.partial").mkdir()
    monkeypatch.setattr(output_folder, "_locked", remove_before)
    assert command.succeed("photo.png", "--output", "out.csv").startswith("out.csv: complete, 1 row")
    assert not Path("out.csv.partial").exists()


def test_a_file_that_was_changed_after_it_was_complete_is_not_replaced(command: Command) -> None:
    command.succeed("photo.png", "--output", "out.csv")
    Path("out.csv").write_text("mine")
    assert command("photo.png", "--output", "out.csv")[0] == EXIT_USER
    assert Path("out.csv").read_text() == "mine"


def test_a_full_disk_ends_with_one_line_and_the_same_command_resumes(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = write_shades(9)
    sync, rest = os.fsync, iter([True] * 4)  # two for each file: request.json and one part

    def fill_disk(descriptor: int) -> None:
        if next(rest, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fill_disk)
        status, _, stderr = command(*names, "--output", "out.csv")
    assert (status, len(stderr.splitlines())) == (EXIT_USER, 1)
    assert stderr.startswith("error: out.csv.partial/000001.parquet: No space left on device; check that the disk has")
    assert command.succeed(*names, "--output", "out.csv") == "out.csv: 9 rows, 4 of them by an earlier start\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_reported_in_one_line(command: Command) -> None:
    Path("locked").mkdir(mode=0o500)
    status, _, stderr = command("photo.png", "--output", "locked/out.csv")
    assert status == EXIT_USER
    assert stderr.startswith("error: locked/out.csv.partial: Permission denied; check who may read and write it")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "points", "changed"), [("csv", 6, False), ("csv", 4, True), ("jsonl", 2, False), ("parquet", 2, True)]
)
def test_a_killed_command_is_resumed_to_the_file_of_an_uninterrupted_one(
    tmp_path: Path, suffix: str, points: int, changed: bool
) -> None:
    """`python -m tests.prediction_kills` kills at all points."""
    prediction_kills.start_fork_server()
    (prepared := tmp_path / "prepared").mkdir()
    prediction_kills.prepare(prepared)
    content, reached = prediction_kills.expected(prepared, tmp_path, suffix, changed=changed)
    for last in prediction_kills.spread(len(reached), points):
        prediction_kills.kill_at(prepared, tmp_path, suffix, last=last, content=content, changed=changed)


@pytest.mark.slow
def test_signals_end_the_command_with_its_decoding_processes_and_it_resumes(model: Path) -> None:  # noqa: F811
    parts = 4 + num_cores()  # enough for the blocks that are read ahead
    names = [f"{number}.png" for number in range(parts * output.PART_ROWS)]
    for name in names:
        Path(name).symlink_to("photo.png")
    command = [sys.executable, "-m", "pipeline.predict", "--device", "cpu", "--output", "out.csv", "-"]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}

    def start() -> "subprocess.Popen[str]":
        return subprocess.Popen(
            command, env=environment, text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def end(number: int, *, after: str, send: Callable[[int, int], None]) -> tuple[int, str]:
        """Give the process all paths but the last, for which it waits; send a signal after a part is there."""
        process = start()
        assert process.stdin
        process.stdin.write("\n".join(names[:-1]))
        process.stdin.flush()
        while not Path("out.csv.partial", after).exists():
            assert process.poll() is None
        send(process.pid, number)
        stderr = process.stderr.read() if process.stderr else ""  # ends with the last process that has it open
        return process.wait(), stderr

    assert end(signal.SIGKILL, after="000000.parquet", send=os.killpg) == (-signal.SIGKILL, "")
    status, stderr = end(signal.SIGTERM, after="000001.parquet", send=os.kill)
    assert status == EXIT_TERMINATED
    message = "error: terminated by SIGTERM; out.csv.partial has the rows of ([0-9,]+) inputs; the same command resumes"
    assert re.fullmatch(f"{message}\n", stderr)
    stdout, stderr = start().communicate("\n".join(names))
    assert stderr == ""
    assert (kept := re.fullmatch(f"out.csv: {len(names):,} rows, ([0-9,]+) of them by an earlier start\n", stdout))
    assert 2 * output.PART_ROWS <= int(kept[1].replace(",", "")) < len(names)
    assert READERS["csv"]("out.csv")["path"].tolist() == names


# ---- the same probabilities as evaluate


@pytest.mark.slow
def test_the_probabilities_are_those_of_evaluate_to_the_bit(workspace: Path, command: Command) -> None:
    shutil.rmtree("artifacts")
    for split, count in (("train", 20), ("validation", 9), ("test", 19)):
        for position, label in enumerate(("cat", "dog")):
            folder = Path("images", split, label)
            folder.mkdir(parents=True)
            for number in range(count):
                content = encoded(noise(1000 * position + number, size=40), "PNG" if number % 2 else "JPEG")
                (folder / f"{number}.{'png' if number % 2 else 'jpg'}").write_bytes(content)
    changes = {"download.dataset": "imagefolder", "download.folder": "images", "train.epochs": 1}
    values = compose("digits", changes | {"train.device": "cpu", "evaluate.device": "cpu"})
    Path("params.yaml").write_text(dump_yaml(values), encoding="utf-8")
    for step in ("download", "normalize", "train", "evaluate"):
        done = run_step(step)
        assert done.returncode == 0, done.stderr
    expected = read_predictions(Path("artifacts/evaluate/predictions.parquet"))
    assert expected.calibrated_probabilities is not None
    by_hash = dict(zip(expected.content_hashes, expected.calibrated_probabilities, strict=True))
    names = sorted(map(str, Path("images/test").glob("*/*")), key=lambda name: name[::-1])
    for number, inputs in enumerate([["images/test"], names, names[:1], names[5:22]]):
        command.succeed(*inputs, "--device", "cpu", "--top", "2", "--output", f"{number}.parquet")
        for _, row in READERS["parquet"](f"{number}.parquet").iterrows():
            found = {one["class"]: np.float32(one["probability"]) for one in row["top"]}
            assert [found[name] for name in expected.class_names] == by_hash[row["content_hash"]].tolist()
