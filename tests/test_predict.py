import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import predict as module
from pipeline.artifacts import replace_folder
from pipeline.core.errors import EXIT_PARTIAL, EXIT_PIPE
from pipeline.core.yaml import dump_yaml
from pipeline.models.build import build
from pipeline.models.cpu_kernels import PORTABLE
from pipeline.models.files import save_config, save_weights
from pipeline.predict import BATCH_SIZE, main, predict
from pipeline.tracking import served_model
from tests.conftest import DEFAULTS, PROJECT, colored_images, write_normalized
from tests.raw_folders import encoded, noise
from tests.test_model import config


@pytest.fixture
def model(workspace: Path) -> Path:
    """Write a LeNet that always predicts "b", and a photo.png; return the folder of the model."""
    chosen = config(classes=3, class_names=("a", "b", "c"), cpu_kernels="portable")
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


def test_probabilities_are_sorted_and_sum_to_one(model: Path) -> None:
    (result,) = predict([Path("photo.png")], folder=model)
    assert list(result.probabilities) == ["b", "c", "a"]
    assert sum(result.probabilities.values()) == pytest.approx(1)


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


def test_json_has_all_classes(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "photo.png", "--json")
    assert set(json.loads(capsys.readouterr().out)["probabilities"]) == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["photo.png", "--model", "elsewhere"], "error: elsewhere/model.json: no such file"),
        (["photo.png", "--top", "0"], "error: --top is 0; allowed: 1 or more"),
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
        "folder": "a folder; name image files, as in folder/*.jpg",
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
    assert last.startswith(f"error: {len(bad_files)} of {len(mixed)} files cannot be read")
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
def test_a_file_without_read_permission_is_reported(model: Path) -> None:
    shutil.copy("photo.png", "secret.png")
    Path("secret.png").chmod(0)
    secret, photo = predict([Path("secret.png"), Path("photo.png")], folder=model)
    assert (secret.unreadable_reason, photo.unreadable_reason) == ("Permission denied", "")


def test_predictions_are_made_batch_by_batch_and_belong_to_their_files(model: Path) -> None:
    read = []

    def paths() -> Iterator[Path]:
        for number in range(2 * BATCH_SIZE + 1):
            read.append(number)
            Image.fromarray(np.full((32, 32, 3), 3 * number, np.uint8)).save(f"{number}.png")
            yield Path(f"{number}.png")

    answers = predict(paths(), folder=model)
    first = next(answers)
    assert len(read) == BATCH_SIZE
    together = {answer.path: answer.probabilities for answer in [first, *answers]}
    assert list(together) == [Path(f"{number}.png") for number in range(2 * BATCH_SIZE + 1)]
    for number in (0, BATCH_SIZE - 1, BATCH_SIZE, 2 * BATCH_SIZE):
        (alone,) = predict([Path(f"{number}.png")], folder=model)
        assert together[alone.path] == pytest.approx(alone.probabilities, abs=1e-5)


def test_predictions_are_printed_before_the_next_batch_is_read(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    printed: list[int] = []
    original = module._batches

    def record_printed(paths: list[Path]) -> Iterator[list[Path]]:
        for batch in original(paths):
            printed.append(len(capsys.readouterr().out.splitlines()))
            yield batch

    monkeypatch.setattr(module, "_batches", record_printed)
    run(monkeypatch, *["photo.png"] * (BATCH_SIZE + 1))
    assert printed == [0, BATCH_SIZE]


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


def test_a_closed_pipe_ends_the_command_without_an_error_message(model: Path) -> None:
    command = [sys.executable, "-m", "pipeline.predict", *["photo.png"] * (BATCH_SIZE + 1)]
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
