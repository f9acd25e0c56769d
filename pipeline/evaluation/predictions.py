"""Write and read `predictions.parquet`, from which all figures of an evaluation except the loss can be computed."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.artifacts import Labels, bytes_md5
from pipeline.parquet import parquet_reader, parquet_writer

Probabilities = npt.NDArray[np.float32]  # (N, num_classes)

CLASS_NAMES_KEY = b"class_names"  # in the metadata of the schema: the class names in their order, as JSON
WEIGHTS_MD5_KEY = b"weights_md5"  # in the metadata of the schema: the MD5 of the weights file in hexadecimal, if known
VALUES_PER_GROUP = 2**21  # probabilities in a row group, of which one is in memory at a time


@dataclass(frozen=True)
class Predictions:
    """The predictions for the images of a split, in the order of its arrays.

    `names` and `content_hashes` (16 hexadecimal digits) are those of the image files. `actual` and `predicted` (N,)
    int64 are indices into `class_names`. `probabilities` (N, num_classes) float32 are the softmax of the logits;
    `calibrated_probabilities` are those after the temperature, or None where the model has no known temperature.
    `weights_md5` is the MD5 of the weights file in hexadecimal, or None if it is unknown.
    """

    class_names: tuple[str, ...]
    names: Sequence[str]
    content_hashes: Sequence[str]
    actual: Labels
    predicted: Labels
    probabilities: Probabilities
    calibrated_probabilities: Probabilities | None
    weights_md5: str | None = None

    def __len__(self) -> int:
        return len(self.actual)

    @property
    def is_correct(self) -> npt.NDArray[np.bool_]:
        """Return for each image (N,) whether the predicted class is the actual one."""
        return np.equal(self.predicted, self.actual)

    @property
    def best_probabilities(self) -> Probabilities:
        """Return the calibrated probabilities or, where the temperature is unknown, the raw ones."""
        return self.probabilities if self.calibrated_probabilities is None else self.calibrated_probabilities

    def confidences(self, probabilities: Probabilities) -> npt.NDArray[np.float32]:
        """Return the probability of the predicted class of each image: (N,)."""
        return probabilities[np.arange(len(self)), self.predicted]


def split_md5(predictions: Predictions) -> str:
    """Return the identity of the split that the predictions are of: an MD5 over its images and their classes.

    It is that of the sorted lines `<content hash> <class name>`, one for each image. So it depends neither on the order
    of images and classes, nor on names, `normalize.image_size` and other parameters that change only pixels: a smaller
    copy of the same test images is the same test split.
    """
    actual = [predictions.class_names[index] for index in predictions.actual]
    return _split_md5(predictions.content_hashes, actual)


def _split_md5(content_hashes: Iterable[str], actual: Iterable[str]) -> str:
    lines = sorted(f"{each} {name}\n" for each, name in zip(content_hashes, actual, strict=True))
    return bytes_md5("".join(lines).encode())


def read_identity(path: Path) -> tuple[str | None, str]:
    """Return the MD5 of the weights, None if it is unknown, and the `split_md5` of a file of predictions.

    The probabilities are not read. Raises UserError where the file is missing or damaged.
    """
    with parquet_reader(path) as file:
        weights_md5 = (file.schema_arrow.metadata or {}).get(WEIGHTS_MD5_KEY)
        text = file.read(columns=["content_hash", "actual"])
        split = _split_md5(text["content_hash"].to_pylist(), text["actual"].to_pylist())
        return weights_md5.decode() if weights_md5 else None, split


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write one row for each image; the same predictions give the same bytes.

    The columns are `content_hash`, `name`, `actual`, `predicted` (both as class names), `probabilities` and, with a
    known temperature, `calibrated_probabilities` (both as lists of float32, one number for each class).
    """
    num_classes = len(predictions.class_names)
    schema = _schema(predictions)
    class_names = pa.array(predictions.class_names, pa.string())
    rows = max(1, VALUES_PER_GROUP // num_classes)
    with parquet_writer(path, schema) as writer:
        for start in range(0, len(predictions), rows):
            block = slice(start, start + rows)
            columns = [
                pa.array(predictions.content_hashes[block], pa.string()),
                pa.array(predictions.names[block], pa.string()),
                class_names.take(pa.array(predictions.actual[block])),
                class_names.take(pa.array(predictions.predicted[block])),
                _lists(predictions.probabilities[block]),
            ]
            if predictions.calibrated_probabilities is not None:
                columns.append(_lists(predictions.calibrated_probabilities[block]))
            writer.write_table(pa.table(columns, schema=schema))


def read_predictions(path: Path) -> Predictions:
    """Read what `write_predictions` wrote; raises UserError where the file is missing or damaged."""
    with parquet_reader(path) as file:
        metadata = file.schema_arrow.metadata or {}
        class_names = tuple(json.loads(metadata[CLASS_NAMES_KEY]))
        shape = file.metadata.num_rows, len(class_names)
        text = file.read(columns=["content_hash", "name", "actual", "predicted"])
        is_calibrated = "calibrated_probabilities" in file.schema_arrow.names
        return Predictions(
            class_names=class_names,
            names=text["name"].to_pylist(),
            content_hashes=text["content_hash"].to_pylist(),
            actual=_read_labels(text["actual"], class_names),
            predicted=_read_labels(text["predicted"], class_names),
            probabilities=_read_lists(file, "probabilities", shape=shape),
            calibrated_probabilities=(
                _read_lists(file, "calibrated_probabilities", shape=shape) if is_calibrated else None
            ),
            weights_md5=metadata[WEIGHTS_MD5_KEY].decode() if WEIGHTS_MD5_KEY in metadata else None,
        )


def _schema(predictions: Predictions) -> pa.Schema:
    text, lists = pa.string(), pa.list_(pa.float32(), len(predictions.class_names))
    fields = {"content_hash": text, "name": text, "actual": text, "predicted": text, "probabilities": lists}
    if predictions.calibrated_probabilities is not None:
        fields["calibrated_probabilities"] = lists
    metadata = {CLASS_NAMES_KEY: json.dumps(predictions.class_names).encode()}
    if predictions.weights_md5 is not None:
        metadata[WEIGHTS_MD5_KEY] = predictions.weights_md5.encode()
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields.items()], metadata=metadata)


def _lists(rows: Probabilities) -> pa.Array:
    """Return rows (n, num_classes) as a column of lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(rows).reshape(-1)), rows.shape[1])


def _read_labels(column: pa.ChunkedArray, class_names: Sequence[str]) -> Labels:
    """Return a column of class names as indices (N,) int64; raises KeyError for a name that is no class."""
    index = {name: position for position, name in enumerate(class_names)}
    return np.array([index[name] for name in column.to_pylist()], np.int64)


def _read_lists(file: Any, name: str, *, shape: tuple[int, int]) -> Probabilities:
    """Return a column of lists as an array (N, num_classes) float32; one row group at a time is in memory besides."""
    rows, start = np.empty(shape, np.float32), 0
    for group in range(file.num_row_groups):
        for chunk in file.read_row_group(group, columns=[name])[name].chunks:
            rows[start : start + len(chunk)] = chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, shape[1])
            start += len(chunk)
    return rows
