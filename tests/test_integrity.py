"""A step reports each damaged file, whatever the damage, before it uses the file."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipeline import evaluate, normalize, predict, train
from pipeline.artifacts import CHECKSUMS, DOWNLOAD, NORMALIZE, TRAIN, replace_folder, verify, verify_splits
from pipeline.core.errors import UserError
from pipeline.models.build import build
from pipeline.models.files import save_config, save_weights
from tests.conftest import PROJECT, colored_images, write_normalized
from tests.raw_folders import image_folder, plain_files
from tests.test_model import config

STEPS = {"normalize": normalize.main, "train": train.main, "evaluate": evaluate.main, "predict": predict.main}
INPUTS = {
    "normalize": {DOWNLOAD: ["images.tar", "source.json"]},
    "train": {
        NORMALIZE: ["dataset.json", *(f"{s}_{k}.npy" for s in ("train", "validation") for k in ("images", "labels"))]
    },
    "evaluate": {
        NORMALIZE: [
            "dataset.json",
            *(f"{s}_{k}" for s in ("test", "validation") for k in ("files.parquet", "images.npy", "labels.npy")),
        ],
        TRAIN: ["best.safetensors", "model.json"],
    },
    "predict": {TRAIN: ["best.safetensors", "model.json"]},
}


def flip(path: Path, *, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "emptied": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one bit flipped": lambda path: flip(path, at=path.stat().st_size // 2),
    "one byte appended": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "removed": lambda path: path.unlink(),
    "replaced": lambda path: shutil.copy(next(p for p in sorted(path.parent.iterdir()) if p != path), path),
}
READ = [(step, folder / name) for step, read in INPUTS.items() for folder, names in read.items() for name in names]
LISTS = [(step, folder / CHECKSUMS) for step, read in INPUTS.items() for folder in read]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make small folders of all steps and an image to classify, and return the project folder."""
    folder = tmp_path_factory.mktemp("prepared")
    shutil.copy(PROJECT / "params.yaml", folder)
    with replace_folder(folder / DOWNLOAD) as raw:
        image_folder(raw, plain_files(per_class=3))
    write_normalized(folder)
    chosen = config(classes=3, class_names=tuple(f"class {index}" for index in range(3)))
    with replace_folder(folder / TRAIN) as model:
        for seed, name in enumerate(("best", "last")):
            torch.manual_seed(seed)
            save_weights(build(chosen), model / f"{name}.safetensors")
        save_config(chosen, model)
    Image.fromarray(colored_images(1)[0][0]).save(folder / "photo.png")
    return folder


@pytest.fixture(autouse=True)
def project(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to a new copy of the prepared project."""
    monkeypatch.chdir(shutil.copytree(prepared, tmp_path / "project"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr("sys.argv", ["predict", "photo.png"])


def refusal_of(step: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a step that refuses its input, and return the one line on its stderr."""
    with pytest.raises(SystemExit, match="2"):
        STEPS[step]()
    stdout, stderr = capsys.readouterr()
    assert (stdout, stderr.count("\n")) == ("", 1)
    return stderr


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("step", "path"), READ, ids=str)
def test_a_damaged_file_is_reported_before_it_is_used(
    step: str, path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGES[damage](path)
    assert refusal_of(step, capsys).startswith(f"error: {path}: ")


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "one bit flipped"])
@pytest.mark.parametrize(("step", "path"), LISTS, ids=str)
def test_a_damaged_list_of_checksums_is_reported(
    step: str, path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGES[damage](path)
    assert str(path) in refusal_of(step, capsys)  # a list truncated between two lines lists fewer files than there are


@pytest.mark.parametrize(("step", "path"), LISTS, ids=str)
def test_a_file_without_a_checksum_is_reported(step: str, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unlisted = path.with_name("train_images (copy).npy")
    unlisted.touch()
    assert refusal_of(step, capsys).startswith(f"error: {unlisted}: not listed in {path}; remove it if ")


def test_a_flipped_bit_anywhere_in_the_list_is_detected() -> None:
    whole = (TRAIN / CHECKSUMS).read_bytes()
    for position in range(len(whole)):
        flip(TRAIN / CHECKSUMS, at=position)
        with pytest.raises(UserError, match=f"{TRAIN / CHECKSUMS}"):
            verify(TRAIN)
        (TRAIN / CHECKSUMS).write_bytes(whole)


def test_the_error_states_what_was_found_and_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    (NORMALIZE / "train_labels.npy").write_bytes(b"half")
    error = refusal_of("train", capsys)
    assert ": 4 bytes with MD5 7afe399f1415b137d0962f82662fa9d4, but artifacts/normalize/checksums.md5 lists " in error
    assert "; `rm -rf artifacts/normalize && dvc repro normalize` restores it; " in error


def test_the_error_about_a_missing_list_names_the_commands_that_make_it(capsys: pytest.CaptureFixture[str]) -> None:
    (NORMALIZE / CHECKSUMS).unlink()
    assert "checksums.md5: no such file; `dvc repro normalize` makes it, `dvc pull` fetches it" in refusal_of(
        "train", capsys
    )


def test_files_that_a_step_does_not_read_may_be_missing() -> None:
    for path in NORMALIZE.glob("test_*"):
        path.unlink()
    (NORMALIZE / ".DS_Store").touch()
    verify_splits("train", "validation")
    with pytest.raises(UserError, match=r"test_files\.parquet: no such file, but .*checksums\.md5 lists it"):
        verify(NORMALIZE)


def test_md5sum_accepts_the_list() -> None:
    if shutil.which("md5sum") is None:
        pytest.skip("no md5sum here")
    done = subprocess.run(["md5sum", "--check", "--strict", CHECKSUMS], cwd=NORMALIZE, capture_output=True, check=False)
    assert (done.returncode, done.stdout.count(b": OK\n")) == (0, 10)


def test_files_of_subfolders_are_listed_too(tmp_path: Path) -> None:
    with replace_folder(tmp_path / "out") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("whole")
    assert list(verify(tmp_path / "out")) == ["sub/file"]
    (tmp_path / "out" / "sub" / "file").write_text("other")
    with pytest.raises(UserError, match=r"out/sub/file: 5 bytes .*; copy the folder again"):
        verify(tmp_path / "out")


def test_a_copied_model_is_verified_if_it_has_a_list(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["predict", "photo.png", "--model", "copied"])
    shutil.copytree(TRAIN, "copied")
    Path("copied/last.safetensors").unlink()
    Path("copied/notes.txt").touch()
    predict.main()
    (Path("copied") / CHECKSUMS).unlink()
    predict.main()
    assert capsys.readouterr().out.count("photo.png: class ") == 2
    shutil.copy(TRAIN / CHECKSUMS, "copied")
    flip(Path("copied/best.safetensors"), at=-1)
    assert refusal_of("predict", capsys).startswith("error: copied/best.safetensors: ")
