from pathlib import Path

import numpy as np
import pytest

from pipeline.artifacts import (
    atomic,
    file_md5,
    read_array,
    read_json,
    read_split,
    replace_folder,
    write_array,
    write_json,
)
from pipeline.core.errors import UserError


def test_a_file_appears_only_once_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    with pytest.raises(RuntimeError), atomic(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert list(path.parent.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "value.json", {"kept": True})
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "value.json", {"loss": float("nan")})
    assert read_json(tmp_path / "value.json") == {"kept": True}


def test_a_folder_is_replaced_completely_or_not_at_all(tmp_path: Path) -> None:
    for content in ("first", "second"):
        with replace_folder(tmp_path / "out") as folder:
            (folder / content).touch()
    with pytest.raises(RuntimeError), replace_folder(tmp_path / "out") as folder:
        (folder / "third").touch()
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checksums.md5", "out", "second"]


def test_a_folder_is_restored_after_a_kill_between_the_two_renames(tmp_path: Path) -> None:
    with replace_folder(tmp_path / "out") as folder:
        (folder / "good").touch()
    (tmp_path / "out").rename(tmp_path / ".out.old.tmp")
    with pytest.raises(RuntimeError), replace_folder(tmp_path / "out"):
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checksums.md5", "good", "out"]


def test_an_array_written_in_blocks_is_read_back_equal(tmp_path: Path) -> None:
    array = np.arange(60, dtype=np.int64).reshape(10, 2, 3)
    md5 = write_array(tmp_path / "a.npy", [array[:4], array[4:]], shape=array.shape, dtype=np.int64)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), array)
    assert md5 == file_md5(tmp_path / "a.npy")


def test_writing_into_a_mapped_array_does_not_change_the_file(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(5, dtype=np.uint8))
    read_array(tmp_path / "a.npy", dtype=np.uint8, dimensions=1)[:] = 1
    assert np.load(tmp_path / "a.npy").sum() == 0


@pytest.mark.parametrize("kept", [0, 5, 60, 130])
def test_a_truncated_array_is_reported(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "train_images.npy"
    np.save(path, np.zeros(100, dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"train_images\.npy: damaged"):
        read_array(path, dtype=np.uint8, dimensions=1)


def test_a_pickled_array_is_not_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"any": "object"}]), allow_pickle=True)
    with pytest.raises(UserError, match="damaged"):
        read_array(tmp_path / "a.npy", dtype=np.uint8, dimensions=1)


def test_an_array_of_a_wrong_type_is_reported(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 2)))
    with pytest.raises(UserError, match="found 2-dimensional float64; allowed: 4-dimensional uint8"):
        read_array(tmp_path / "a.npy", dtype=np.uint8, dimensions=4)


def test_different_numbers_of_images_and_labels_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "train_images.npy", np.zeros((3, 8, 8, 1), dtype=np.uint8))
    np.save(tmp_path / "train_labels.npy", np.zeros(2, dtype=np.int64))
    with pytest.raises(UserError, match="3 train images but 2 labels"):
        read_split("train", folder=tmp_path)


def test_the_error_about_a_missing_file_names_the_step_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"`dvc repro normalize` makes it"):
        read_split("train")
