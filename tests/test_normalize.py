"""The step normalize turns raw images into arrays, splits and a report on the data."""

import io
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import normalize as step
from pipeline.artifacts import file_md5, read_split
from pipeline.core.errors import UserError
from pipeline.datasets import decoding_pool, imagefolder
from pipeline.images import blocks as blocks_module
from pipeline.images import duplicate_search
from pipeline.images.blocks import hash_content
from pipeline.images.data_report import report
from pipeline.images.statistics import mean_and_deviation
from pipeline.normalize import normalize
from pipeline.parquet import files_path, read_files, write_files
from tests.raw_folders import (
    NAMES,
    cifar_folder,
    digits_folder,
    encoded,
    image_folder,
    noise,
    params,
    plain_files,
)

SPLITS = ("train", "validation", "test")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "artifacts" / "normalize"


def arrays(folder: Path) -> dict[str, Any]:
    return {split: np.asarray(read_split(split, folder=folder)[0]) for split in SPLITS}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def normalize_files(tmp_path: Path, out: Path, files: Mapping[str, bytes], **changes: Any) -> dict[str, Any]:
    return normalize(image_folder(tmp_path / "raw", files), out, params=params(**changes))


def test_digits_become_splits_of_all_images(tmp_path: Path, out: Path) -> None:
    description = normalize(digits_folder(tmp_path / "raw"), out, params=params())
    counts = description["counts"]
    assert {split: sum(counts[split].values()) for split in SPLITS} == {"train": 1285, "validation": 138, "test": 374}
    for name in description["class_names"]:
        assert 25 <= counts["test"][name] <= 50  # 36 are expected
    everything = np.concatenate(list(arrays(out).values()))
    assert len(np.unique(everything, axis=0)) == 1797
    assert description == json.loads((out / "dataset.json").read_text(encoding="utf-8"))


def test_every_image_keeps_its_label(tmp_path: Path, out: Path) -> None:
    normalize_files(tmp_path, out, plain_files(per_class=20))
    label_of = {noise(1000 * label + number).tobytes(): label for label in (0, 1) for number in range(20)}
    for split in SPLITS:
        images, labels = read_split(split, folder=out)
        assert [label_of.pop(image.tobytes()) for image in images] == labels.tolist()
    assert not label_of


def test_another_seed_gives_other_splits(tmp_path: Path, out: Path) -> None:
    normalize_files(tmp_path, out, plain_files(per_class=20), seed=0)
    first = arrays(out)["test"]
    normalize_files(tmp_path, out, plain_files(per_class=20), seed=1)
    assert first.tobytes() != arrays(out)["test"].tobytes()


def test_splits_depend_on_neither_names_nor_order_of_files(tmp_path: Path, out: Path) -> None:
    files = plain_files(per_class=20)
    normalize_files(tmp_path, out, files)
    first = arrays(out)["test"]
    renamed = {f"{name[:10]}{99 - number}.png": files[name] for number, name in enumerate(reversed(files))}
    normalize_files(tmp_path, out, dict(sorted(renamed.items())))
    assert {image.tobytes() for image in first} == {image.tobytes() for image in arrays(out)["test"]}


def test_splits_of_the_source_are_kept(tmp_path: Path, out: Path) -> None:
    files = {
        **plain_files(per_class=6),
        **plain_files(per_class=3, split="validation", seed=100),
        **plain_files(per_class=4, split="test", seed=200),
    }
    description = normalize_files(tmp_path, out, files)
    assert description["counts"] == {
        split: dict.fromkeys(NAMES, n) for split, n in (("train", 6), ("validation", 3), ("test", 4))
    }
    assert (arrays(out)["test"][0] == noise(200)).all()


def test_cifar_keeps_its_test_split(tmp_path: Path, out: Path) -> None:
    description = normalize(cifar_folder(tmp_path / "raw"), out, params=params(validation_fraction=0.2))
    train, validation, test = (sum(description["counts"][split].values()) for split in SPLITS)
    assert (train + validation, test) == (100, 20)
    assert 10 <= validation <= 30


def test_every_class_keeps_one_image_in_every_split(tmp_path: Path, out: Path) -> None:
    changes = {"validation_fraction": 0.001, "test_fraction": 0.999}
    description = normalize_files(tmp_path, out, plain_files(per_class=3), **changes)
    assert description["counts"] == dict.fromkeys(SPLITS, dict.fromkeys(NAMES, 1))


def test_a_class_with_too_few_images_is_reported(tmp_path: Path, out: Path) -> None:
    files = {**plain_files(per_class=5), "train/eel/1.png": encoded(noise(1)), "train/eel/2.png": encoded(noise(2))}
    with pytest.raises(UserError, match=r"class 'eel': 2 readable images in train; needed: 3 .*add images or remove"):
        normalize_files(tmp_path, out, files)


def test_a_class_missing_from_a_split_of_the_source_is_reported(tmp_path: Path, out: Path) -> None:
    files = {**plain_files(per_class=5), "test/cat/1.png": encoded(noise(500))}
    with pytest.raises(UserError, match="class 'dog': 0 readable images in test"):
        normalize_files(tmp_path, out, files)


def test_a_single_class_is_refused(tmp_path: Path, out: Path) -> None:
    with pytest.raises(UserError, match="found only cat; needed: at least 2"):
        normalize_files(tmp_path, out, {f"train/cat/{number}.png": encoded(noise(number)) for number in range(5)})


def test_unreadable_files_above_the_limit_stop_the_step(tmp_path: Path, out: Path) -> None:
    files = plain_files(per_class=10) | {"train/cat/x.png": b"", "train/dog/y.jpg": b"no"}
    with pytest.raises(UserError) as caught:
        normalize_files(tmp_path, out, files, max_unreadable_fraction=0.05)
    message = str(caught.value)
    assert message.startswith(
        "normalize.max_unreadable_fraction: 2 of 22 files (9.09%) cannot be read: train/cat/x.png (empty file)"
    )
    assert "train/dog/y.jpg" in message
    assert "allowed: 5.00%" in message


def test_unreadable_files_within_the_limit_are_listed(tmp_path: Path, out: Path) -> None:
    files = plain_files(per_class=10) | {"train/cat/x.png": b""}
    description = normalize_files(tmp_path, out, files, max_unreadable_fraction=0.05)
    assert description["unreadable_files"] == [{"file": "train/cat/x.png", "reason": "empty file"}]
    assert sum(sum(counts.values()) for counts in description["counts"].values()) == 20
    assert "unreadable files: 1 (first: train/cat/x.png: empty file)" in report(description)


def test_planted_duplicates_are_found(tmp_path: Path, out: Path) -> None:
    files = plain_files(per_class=20) | plain_files(per_class=4, split="validation", seed=100)
    files |= plain_files(per_class=4, split="test", seed=200)
    files["train/cat/1.png"] = files["train/cat/0.png"]
    files["test/cat/0.png"] = files["train/cat/5.png"]
    files["test/cat/1.png"] = encoded(noise(6), "JPEG", quality=75)
    files["test/dog/2.png"] = encoded(Image.fromarray(noise(1007)[:, ::-1]))
    files["test/dog/3.png"] = files["validation/dog/1.png"]
    description = normalize_files(tmp_path, out, files, near_duplicate_correlation=0.95)
    exact, near = description["exact_duplicates"], description["near_duplicates"]
    assert exact["within"] == {"train": 1, "validation": 0, "test": 0}
    assert exact["across"] == {"train-validation": 0, "train-test": 1, "validation-test": 1}
    assert ["train/cat/5.png", "test/cat/0.png"] in exact["examples"]
    assert near["test_images_with_one_in_train"] == 4
    assert ["test/dog/2.png", "train/dog/7.png"] in [example[:2] for example in near["examples"]]
    assert description["test_duplicates"] == [0, 1, 6, 7]
    assert "4 of 8 (50.00%) at correlation 0.95" in report(description)


def test_drawn_splits_keep_identical_images_together(tmp_path: Path, out: Path) -> None:
    files = {f"train/{label}/{number}{copy}.png": encoded(noise(1000 * position + number))
             for position, label in enumerate(NAMES) for number in range(30) for copy in "ab"}  # fmt: skip
    across = normalize_files(tmp_path, out, files)["exact_duplicates"]["across"]
    assert sum(across.values()) == 0


def test_mean_and_deviation_are_those_of_train(tmp_path: Path, out: Path) -> None:
    description = normalize_files(tmp_path, out, plain_files(per_class=30))
    train = arrays(out)["train"].astype(np.float64) / 255
    assert np.allclose(description["mean"], train.mean(axis=(0, 1, 2)), rtol=1e-12)
    assert np.allclose(description["std"], train.std(axis=(0, 1, 2)), rtol=1e-12)


def test_the_deviation_of_a_constant_channel_is_not_zero() -> None:
    assert mean_and_deviation([np.full((2, 8, 8, 1), 51, np.uint8)]) == ([0.2], [1 / 255])


@pytest.mark.parametrize("make", [digits_folder, cifar_folder])
def test_two_runs_give_the_same_bytes(tmp_path: Path, make: Any) -> None:
    for run in ("a", "b"):
        normalize(make(tmp_path / run / "raw"), tmp_path / run / "out", params=params())
    assert contents(tmp_path / "a" / "out") == contents(tmp_path / "b" / "out")


def test_the_output_does_not_depend_on_the_number_of_processes(tmp_path: Path, out: Path, monkeypatch: Any) -> None:
    files = plain_files(per_class=20)
    normalize_files(tmp_path, out, files)
    first = contents(out)
    for module, name, value in (
        (imagefolder, "MIN_BYTES_FOR_POOL", 0),
        (blocks_module, "BLOCK_IMAGES", 3),
        (imagefolder, "num_cores", lambda: 2),
        (decoding_pool, "num_cores", lambda: 2),
    ):
        monkeypatch.setattr(module, name, value)
    normalize_files(tmp_path, out, files)
    assert contents(out) == first


def test_each_image_has_its_name_and_the_hash_of_its_file(tmp_path: Path, out: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(step, "ROWS_PER_GROUP", 4)
    files = plain_files(per_class=20)
    normalize_files(tmp_path, out, files)
    for split, images in arrays(out).items():
        names, hashes = read_files(split, folder=out)
        assert hashes == [f"{hash_content(files[name]):016x}" for name in names]
        originals = [np.asarray(Image.open(io.BytesIO(files[name]))) for name in names]
        np.testing.assert_array_equal(np.stack(originals), images)


def test_a_name_that_is_no_text_is_written_with_question_marks(tmp_path: Path) -> None:
    write_files(files_path("test", folder=tmp_path), [(["a\udcff.png", "b\ud800", "日本.png"], [0, 1, 2**64 - 1])])
    names, hashes = read_files("test", folder=tmp_path)
    assert names == ["a?.png", "b?", "日本.png"]
    assert hashes == ["0" * 16, "0" * 15 + "1", "f" * 16]


def test_the_recorded_checksums_are_those_of_the_files(tmp_path: Path, out: Path) -> None:
    md5 = normalize_files(tmp_path, out, plain_files(per_class=5))["md5"]
    assert md5 == {path.name: file_md5(path) for path in out.glob("*.npy")}
    assert len(md5) == 6


@pytest.mark.parametrize(("module", "failing"), [(step, "write_json"), (duplicate_search, "most_similar")])
def test_a_failure_keeps_the_previous_output_and_leaves_no_temporary_file(
    tmp_path: Path, out: Path, monkeypatch: Any, module: Any, failing: str
) -> None:
    normalize_files(tmp_path, out, plain_files(per_class=5))
    before = contents(out)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(module, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        normalize_files(tmp_path, out, plain_files(per_class=6))
    assert contents(out) == before
    assert [path.name for path in out.parent.iterdir()] == ["normalize"]


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path, out: Path) -> None:
    leftover = out.parent / ".normalize.new.tmp"
    leftover.mkdir(parents=True)
    (leftover / "half.npy").write_bytes(b"half")
    normalize_files(tmp_path, out, plain_files(per_class=5))
    assert "half.npy" not in contents(out)
    assert not leftover.exists()


def test_many_classes_are_summarized() -> None:
    names = [f"class{number:02}" for number in range(100)]
    counts = {name: number + 1 for number, name in enumerate(names)}
    nothing = {"exact_duplicates": {"within": {}, "across": {}}, "unreadable_files": [], "ignored_files": []}
    nothing["groups"] = {"named": 0, "drawn_splits": []}
    near = {"near_duplicates": {"correlation": 0.9, "test_images_with_one_in_train": 0}}
    lines = report({"class_names": names, "counts": dict.fromkeys(SPLITS, counts), **nothing, **near}).splitlines()
    assert len(lines) <= 12
    assert [line.split("  ")[0] for line in lines[1:4]] == ["class00 (fewest)", "class99 (most)", "all 100 classes"]


def run_step(folder: Path) -> subprocess.CompletedProcess[str]:
    project = Path(__file__).parents[1]
    (folder / "params.yaml").write_text((project / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    command = [sys.executable, "-m", "pipeline.normalize"]
    return subprocess.run(
        command, cwd=folder, env={"PYTHONPATH": str(project)}, capture_output=True, text=True, check=False
    )


def test_the_step_prints_a_report_and_writes_its_files(tmp_path: Path) -> None:
    image_folder(tmp_path / "artifacts" / "download", plain_files(per_class=10))
    done = run_step(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[3].split() == ["all", "14", "2", "4"]
    assert set(contents(tmp_path / "artifacts" / "normalize")) == {"checksums.md5", "dataset.json"} | {
        f"{split}_{kind}" for split in SPLITS for kind in ("images.npy", "labels.npy", "files.parquet")
    }


def test_missing_input_is_reported_in_one_line_with_status_2(tmp_path: Path) -> None:
    done = run_step(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: artifacts/download/checksums.md5: no such file")
    assert done.stderr.count("\n") == 1
