import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.artifacts import replace_folder, write_checksums
from pipeline.core.errors import EXIT_PARTIAL, EXIT_PIPE
from pipeline.core.yaml import dump_yaml
from pipeline.models.build import build
from pipeline.models.cpu_kernels import PORTABLE
from pipeline.models.files import save_config, save_weights
from pipeline.predict import main
from pipeline.prediction import command, decoding
from pipeline.prediction.image_files import ReadImage
from pipeline.tracking import served_model
from tests.conftest import DEFAULTS, PROJECT, colored_images, write_normalized
from tests.raw_folders import encoded, noise
from tests.test_model import config

CONFIG: dict[str, Any] = {"classes": 3, "class_names": ("a", "b", "c"), "cpu_kernels": "portable"}


@pytest.fixture
def model(workspace: Path) -> Path:
    """Write a LeNet that always predicts "b", and a photo.png; return the folder of the model."""
    chosen = config(**CONFIG)
    classifier = build(chosen)
    with torch.no_grad():
        classifier.network[11].bias.copy_(torch.tensor([0.0, 5.0, 1.0]))  # type: ignore[index]
    with replace_folder(workspace / "artifacts" / "train") as folder:
        save_weights(classifier, folder / "best.safetensors")
        save_config(chosen, folder)
    Image.fromarray(colored_images(1, size=50)[0][0]).save(workspace / "photo.png")
    return workspace / "artifacts" / "train"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["predict", *arguments])
    main()


def answers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[Any]:
    """Return what `--json` prints for these arguments."""
    run(monkeypatch, *arguments, "--json")
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_probabilities_are_sorted_and_sum_to_one(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [answer] = answers(monkeypatch, capsys, "photo.png")
    assert list(answer["probabilities"]) == ["b", "c", "a"]
    assert sum(answer["probabilities"].values()) == pytest.approx(1)


def test_one_line_is_printed_for_each_image(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "photo.png", "photo.png", "--top", "2")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("photo.png: b 9")
    assert ", c " in lines[0]
    assert " a " not in lines[0]


def test_a_checkout_without_a_model_names_the_ways_to_one(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, "photo.png")
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: artifacts/train: no such folder")
    assert all(remedy in line for remedy in ("`dvc exp apply NAME`", "`dvc checkout`", "--model runs:/RUN_ID/model"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["photo.png", "--model", "elsewhere"], "error: --model elsewhere: no folder, file, MLflow run or DVC"),
        *(
            (
                ["photo.png", "--model", address],
                f"error: --model {address}: no address of a model in MLflow; allowed: a",
            )
            for address in ("s3://x", "gs://b/x", "http://h/x", "dbfs:/x", "mlflow-artifacts:/x", "models:/", "runs:/")
        ),
        (["photo.png", "--model", "models:/no/1"], "error: --model models:/no/1: MLflow cannot provide it ("),
        (["photo.png", "--model", "else/where"], "error: else/where/best.safetensors: no such file"),
        (["photo.png", "a/**/b/**"], "error: a/**/b/**: a pattern with ** twice; allowed: once"),
        (["photo.png", "--top", "0"], "error: --top is 0; allowed: 1 or more; choose such a number"),
        (["photo.png", "--coverage", "0.9"], "error: --coverage is 0.9, but the model has no thresholds"),
        (["photo.png", "--device", "tpu"], "error: --device is tpu, but PyTorch finds no such device"),
        (["photo.png", "--null"], "error: found --null without a list on standard input"),
        (["photo.png", "--overwrite"], "error: found --overwrite without --output"),
        (["photo.png", "--json", "--output", "x.csv"], "error: --json prints answers, but --output writes them"),
        (["photo.png", "--output", "x.xlsx"], "error: --output x.xlsx: found the suffix '.xlsx'; allowed: .csv, .j"),
        (["photo.png", "--output", "x"], "error: --output x: found the suffix ''; allowed: .csv, .jsonl"),
    ],
)
def test_a_bad_option_is_reported_in_one_line(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *arguments)
    stderr = capsys.readouterr().err
    assert stderr.startswith(message)
    assert len(stderr.splitlines()) == 1


# ---- many files, some of them bad


@pytest.fixture
def bad_files(model: Path) -> dict[str, str]:
    """Write files that cannot be read, and return the reason for each."""
    Path("cut.png").write_bytes(Path("photo.png").read_bytes()[:200])
    Path("text.jpg").write_text("not an image")
    Path("empty.png").touch()
    Path("raw.CR2").write_bytes(encoded(noise(0), "TIFF"))
    Path("folder").mkdir()
    Path("loop.png").symlink_to("loop.png")
    return {
        "cut.png": "not readable as an image (",
        "text.jpg": "not readable as an image (not an image, or its header is damaged)",
        "empty.png": "not readable as an image (empty file)",
        "raw.CR2": "not readable as an image (.cr2 files cannot be decoded here; export it as JPEG, PNG or TIFF)",
        "folder": "a folder without images",
        "gone.png": "no such file",
        "loop.png": "Too many levels of symbolic links",
        "/dev/zero": "not readable as an image (a device, not a file)",
        "x" * 300: "File name too long",
    }


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_bad_files_are_reported_and_the_others_classified(
    bad_files: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
) -> None:
    mixed = [name for bad in bad_files for name in (bad, "photo.png")]
    with pytest.raises(SystemExit) as exit_info:
        run(monkeypatch, *options, *mixed)
    captured = capsys.readouterr()
    assert exit_info.value.code == EXIT_PARTIAL == 3
    answers = captured.out.splitlines()
    assert len(answers) == len(bad_files)
    assert all("photo.png" in line for line in answers)
    *errors, last = captured.err.splitlines()
    assert [
        line for line, (name, reason) in zip(errors, bad_files.items(), strict=True)
        if not line.startswith(f"error: {name}: {reason}")
    ] == []  # fmt: skip
    assert last.startswith(f"error: {len(bad_files)} of {len(mixed)} inputs cannot be read")
    assert "all others were classified" in last


def test_all_files_are_reported_if_all_are_bad(
    bad_files: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run(monkeypatch, *bad_files)
    captured = capsys.readouterr()
    assert (exit_info.value.code, captured.out) == (EXIT_PARTIAL, "")
    *errors, last = captured.err.splitlines()
    assert len(errors) == len(bad_files)
    assert "none was classified" in last
    assert "the others" not in last


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_read_permission_is_reported(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy("photo.png", "secret.png")
    Path("secret.png").chmod(0)
    with pytest.raises(SystemExit, match="3"):
        run(monkeypatch, "secret.png", "photo.png")
    assert capsys.readouterr().err.startswith("error: secret.png: Permission denied\n")


def write_shades(count: int) -> list[str]:
    """Write images that differ, and return their names."""
    for number in range(count):
        Image.fromarray(np.full((32, 32, 3), 3 * number, np.uint8)).save(f"{number}.png")
    return [f"{number}.png" for number in range(count)]


def test_the_answer_for_an_image_depends_on_no_other_image(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = write_shades(20)
    together = answers(monkeypatch, capsys, *names)
    assert [answer["image"] for answer in together] == names
    assert answers(monkeypatch, capsys, *reversed(names)) == together[::-1]
    assert answers(monkeypatch, capsys, names[7]) == [together[7]]


def test_answers_are_printed_before_the_next_block_is_read(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed: list[int] = []

    def record_printed(*arguments: Any, **options: Any) -> Iterator[list[ReadImage]]:
        for block in decoding.read_images(*arguments, **options):
            printed.append(len(capsys.readouterr().out.splitlines()))
            yield block

    monkeypatch.setattr(command, "read_images", record_printed)
    monkeypatch.setattr(decoding, "BLOCK_IMAGES", 16)
    run(monkeypatch, *["photo.png"] * 17)
    assert printed == [0, 16]


def test_a_list_on_standard_input_is_answered_in_its_order(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = write_shades(3)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO("\0".join(names[::-1]).encode())))
    found = answers(monkeypatch, capsys, "photo.png", "-", "--null")
    assert [answer["image"] for answer in found] == ["photo.png", *names[::-1]]


def test_a_coverage_answers_unknown_below_the_threshold(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [answer] = answers(monkeypatch, capsys, "photo.png")
    for name, threshold in (("unknown", answer["probabilities"]["b"] + 1e-9), ("b", answer["probabilities"]["b"])):
        save_config(config(**CONFIG, thresholds={0.9: threshold}), model)
        write_checksums(model)
        [found] = answers(monkeypatch, capsys, "photo.png", "--coverage", "0.9")
        assert found == answer | {"class": name, "is_unknown": name == "unknown"}
        run(monkeypatch, "photo.png", "--coverage", "0.9")
        assert capsys.readouterr().out.startswith("photo.png: unknown: b 9" if name == "unknown" else "photo.png: b 9")


def test_thresholds_that_were_fitted_to_other_probabilities_are_used_with_a_warning(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_config(config(**CONFIG, thresholds={0.9: 0.5}), model)
    shutil.copy(model / "best.safetensors", model / "last.safetensors")
    write_checksums(model)
    last = f"{model}/last.safetensors"
    for options, named in (
        (["--views", "mirror"], "used with --views mirror:"),
        (["--model", last], "used with last.safetensors:"),
        (["--views", "mirror", "--model", last], "used with --views mirror and last.safetensors:"),
    ):
        run(monkeypatch, "photo.png", *options, "--coverage", "0.9")
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("warning: --coverage: the thresholds were fitted with best.safetensors and --views none")
        assert named in line
        run(monkeypatch, "photo.png", *options)
        assert capsys.readouterr().err == ""
    run(monkeypatch, "photo.png", "--coverage", "0.9")
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(sys.platform == "darwin", reason="the file system admits UTF-8 names only")
def test_a_name_that_is_not_utf8_is_printed_escaped(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = os.fsdecode(b"\xff \xc3\xa9.png")
    shutil.copy("photo.png", name)
    run(monkeypatch, "--json", name)
    assert json.loads(capsys.readouterr().out)["image"] == name
    run(monkeypatch, name)
    assert capsys.readouterr().out.startswith("\\udcff é.png: b ")


@pytest.mark.parametrize("options", [[], ["--json"], ["--output", "é.csv"]])
def test_a_name_that_the_encoding_of_standard_output_lacks_is_printed_escaped(
    model: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    shutil.copy("photo.png", "é.png")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stdout)
    run(monkeypatch, "é.png", *options)
    assert re.match(r'(\{"image": ")?\\(xe9|u00e9)\.', stdout.buffer.getvalue().decode())


def test_a_closed_pipe_ends_the_command_without_an_error_message(model: Path) -> None:
    command = [sys.executable, "-m", "pipeline.predict", *["photo.png"] * 33]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == EXIT_PIPE


ENTRY_POINTS = {
    # evaluate refuses the classes of the model, but only after it has chosen the kernels
    "evaluate": "import contextlib, pipeline.evaluate as e\nwith contextlib.suppress(SystemExit): e.main()\n",
    "predict": "import sys; from pipeline.predict import main; sys.argv[1:] = ['photo.png']; main()",
    "served": "from types import SimpleNamespace as S; from pipeline.tracking.served_model import ServedModel; "
    "ServedModel().load_context(S(artifacts={'weights': 'artifacts/train/best.safetensors'}))",
}


@pytest.mark.slow
@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
@pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="this CPU has no AVX2")
def test_the_kernels_of_the_model_or_the_parameters_are_used(model: Path, entry_point: str) -> None:
    write_normalized(model.parents[1])
    (model.parents[1] / "params.yaml").write_text(dump_yaml(DEFAULTS))
    environment = {name: value for name, value in os.environ.items() if name not in PORTABLE}
    code = f"{ENTRY_POINTS[entry_point]}\nimport os; print(*sorted(set({set(PORTABLE)}) & os.environ.keys()))"
    environment["PYTHONPATH"] = str(PROJECT)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == [" ".join(sorted(PORTABLE))], done.stderr


def test_an_application_with_other_kernels_gets_a_warning(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    served_model.ServedModel().load_context(SimpleNamespace(artifacts={"weights": str(model / "best.safetensors")}))
    assert "model.json: cpu_kernels is portable, but PyTorch already computes with AVX512" in caplog.text
