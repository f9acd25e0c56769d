"""`predictions.parquet` has all that the figures need, and the same bytes for the same predictions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.artifacts import file_md5
from pipeline.comparison.pairing import take
from pipeline.core.errors import UserError
from pipeline.evaluation import predictions as module
from pipeline.evaluation.logits import predictions_of
from pipeline.evaluation.metrics import evaluate, prediction_rows
from pipeline.evaluation.predictions import Predictions, read_identity, read_predictions, split_md5, write_predictions

CLASSES = ("cat", "dog, big", 'the "third"', "日本")


def predictions(number: int = 50, *, temperature: float | None = 2.0) -> Predictions:
    random = torch.Generator().manual_seed(0)
    return predictions_of(
        torch.randn(number, len(CLASSES), generator=random) * 3,
        torch.randint(len(CLASSES), (number,), generator=random).numpy(),
        class_names=CLASSES,
        names=[f"test/{index}, <b>.png" for index in range(number)],
        content_hashes=[f"{index:016x}" for index in range(number)],
        temperature=temperature,
        weights_md5="a" * 32,
    )


@pytest.mark.parametrize("temperature", [None, 2.0])
def test_all_predictions_are_read_as_they_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float | None
) -> None:
    monkeypatch.setattr(module, "VALUES_PER_GROUP", 60)  # 15 images in a row group
    expected = predictions(temperature=temperature)
    write_predictions(tmp_path / "x.parquet", expected)
    assert pq.ParquetFile(tmp_path / "x.parquet").num_row_groups == 4
    found = read_predictions(tmp_path / "x.parquet")
    for name, value in vars(expected).items():
        np.testing.assert_array_equal(vars(found)[name], value)
    assert evaluate(found, top_k=2, duplicates=[1]).metrics == evaluate(expected, top_k=2, duplicates=[1]).metrics


def test_other_programs_find_the_columns_and_the_class_names(tmp_path: Path) -> None:
    write_predictions(tmp_path / "x.parquet", predictions(3))
    table = pq.read_table(tmp_path / "x.parquet")
    assert table.column_names == [
        "content_hash", "name", "actual", "predicted", "probabilities", "calibrated_probabilities",
    ]  # fmt: skip
    assert table.schema.field("probabilities").type == pa.list_(pa.float32(), 4)
    assert pa.schema(table.schema).metadata[b"class_names"] == (
        b'["cat", "dog, big", "the \\"third\\"", "\\u65e5\\u672c"]'
    )
    assert pa.schema(table.schema).metadata[b"weights_md5"] == b"a" * 32
    assert table["predicted"].to_pylist() == [CLASSES[row.argmax()] for row in predictions(3).probabilities]


def test_the_same_predictions_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_predictions(tmp_path / name, predictions())
    assert file_md5(tmp_path / "a") == file_md5(tmp_path / "b")


def test_a_file_of_an_earlier_version_has_unknown_weights(tmp_path: Path) -> None:
    write_predictions(tmp_path / "x.parquet", replace(predictions(3), weights_md5=None))
    assert read_predictions(tmp_path / "x.parquet").weights_md5 is None


def test_the_temperature_changes_no_predicted_class() -> None:
    logits = torch.tensor([[0.1, 0.1 + 1e-7, 0.0], [5.0, 5.0 + 1e-6, 5.0 - 1e-6]])
    for temperature in (None, 0.05, 1.0, 20.0):
        found = predictions_of(logits, np.array([0, 0]), class_names=["a", "b", "c"], temperature=temperature)
        assert found.predicted.tolist() == [1, 1]


def test_people_see_calibrated_probabilities() -> None:
    found = predictions(1)
    assert found.calibrated_probabilities is not None
    assert found.calibrated_probabilities.max() < found.probabilities.max()
    (row,) = prediction_rows(found)
    assert row["probability"] == f"{found.calibrated_probabilities.max():.6f}"
    (row,) = prediction_rows(replace(found, calibrated_probabilities=None))
    assert row["probability"] == f"{found.probabilities.max():.6f}"


@pytest.mark.parametrize("damage", ["missing", "truncated", "another table", "unknown class"])
def test_a_file_that_cannot_be_used_is_reported(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.parquet"
    if damage != "missing":
        write_predictions(path, predictions(3))
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "another table":
        pq.write_table(pa.table({"x": [1]}), path)
    elif damage == "unknown class":
        table = pq.read_table(path)
        pq.write_table(table.set_column(2, "actual", pa.array(["cat", "bird", "cat"])), path)
    with pytest.raises(UserError, match=r"x\.parquet: (no such file|damaged)"):
        read_predictions(path)


def test_the_identity_of_a_split_is_that_of_its_images_and_their_classes(tmp_path: Path) -> None:
    one = predictions(20)
    order = np.arange(20)[::-1]
    turned = replace(take(one, order), class_names=CLASSES[::-1], actual=3 - one.actual[order], names=["other"] * 20)
    assert split_md5(turned) == split_md5(one)
    assert split_md5(predictions(19)) != split_md5(one)
    assert split_md5(replace(one, actual=(one.actual + 1) % 4)) != split_md5(one)
    write_predictions(tmp_path / "x.parquet", one)
    assert read_identity(tmp_path / "x.parquet") == ("a" * 32, split_md5(one))
