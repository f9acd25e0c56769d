"""Answer blocks of images with one row for each, and give the rows their form in Parquet, CSV and JSON lines."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.processes import num_cores
from pipeline.params import Views
from pipeline.parquet import parquet_writer
from pipeline.prediction.decoding import ReadImage
from pipeline.prediction.model import LoadedModel, answer_of

INPUTS_KEY = b"inputs"  # in the metadata of a part: the digest of its inputs


@dataclass(frozen=True)
class Row:
    """The answer for one input, or the reason (`error`) why it has none.

    `class_name`, `probability`, `top` and `is_unknown` are those of `Answer`. An input with an error has no class,
    no probability and an empty `top`. `is_unknown` is also None where no coverage was asked for. `content_hash` (16
    hexadecimal digits) is None where the file cannot be read. `model_md5` is the MD5 of the weights file.
    """

    path: str
    model_md5: str
    content_hash: str | None = None
    class_name: str | None = None
    probability: float | None = None
    top: tuple[tuple[str, float], ...] = ()
    is_unknown: bool | None = None
    error: str | None = None


def answer_blocks(
    blocks: Iterable[Sequence[ReadImage]],
    *,
    model: LoadedModel,
    top: int,
    threshold: float | None = None,
    views: Views = "none",
) -> Iterator[list[Row]]:
    """Yield the rows of each block of images, in their order, with the `top` most probable classes of each image.

    With a threshold, an image whose highest probability is below it is unknown.
    """
    for block in blocks:
        pixels = [image.pixels for image in block if image.pixels is not None]
        answers = iter(model.probabilities(np.stack(pixels), threads=num_cores(), views=views) if pixels else ())
        yield [
            _unanswered(image, model=model)
            if image.pixels is None
            else _answered(image, next(answers), model=model, top=top, threshold=threshold)
            for image in block
        ]


def _unanswered(image: ReadImage, *, model: LoadedModel) -> Row:
    return Row(image.path, model.files.weights_md5, content_hash=image.content_hash or None, error=image.error)


def _answered(image: ReadImage, probabilities: Any, *, model: LoadedModel, top: int, threshold: float | None) -> Row:
    answer = answer_of(probabilities, config=model.config, top=top, threshold=threshold)
    return Row(
        path=image.path,
        model_md5=model.files.weights_md5,
        content_hash=image.content_hash,
        class_name=answer.class_name,
        probability=answer.probability,
        top=answer.top,
        is_unknown=None if threshold is None else answer.is_unknown,
    )


def row_schema(*, with_unknown: bool) -> pa.Schema:
    """Return the columns of the rows; `is_unknown` is among them only where a coverage was asked for."""
    text, number = pa.string(), pa.float64()
    fields = {"path": text, "class": text, "probability": number}
    if with_unknown:
        fields["is_unknown"] = pa.bool_()
    fields["top"] = pa.list_(pa.struct([("class", text), ("probability", number)]))
    fields |= {"content_hash": text, "model_md5": text, "error": text}
    required = ("path", "top", "model_md5")
    return pa.schema([pa.field(name, kind, nullable=name not in required) for name, kind in fields.items()])


def write_part(path: Path, rows: Iterable[Row], *, schema: pa.Schema, inputs_digest: str) -> None:
    """Write rows as a Parquet file, whole or not at all, with the digest of their inputs in its metadata."""
    schema = schema.with_metadata({INPUTS_KEY: inputs_digest.encode()})
    with parquet_writer(path, schema) as writer:
        writer.write_table(pa.Table.from_pylist([_values(row) for row in rows], schema=schema))


def read_part(path: Path) -> tuple[pa.Table, str] | None:
    """Return the rows of a part and the digest of their inputs; None where the file is missing or damaged."""
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
            return table.replace_schema_metadata(None), table.schema.metadata[INPUTS_KEY].decode()
    except (pa.ArrowException, KeyError, OSError, TypeError, ValueError):
        return None


def _values(row: Row) -> dict[str, Any]:
    """Return the values of a row by column.

    Bytes of a path that are not UTF-8 are escaped as in `\\udcff`: neither Parquet, nor most readers of JSON, allow
    them.
    """
    return {
        "path": row.path.encode(errors="backslashreplace").decode(),
        "class": row.class_name,
        "probability": row.probability,
        "is_unknown": row.is_unknown,
        "top": [{"class": name, "probability": probability} for name, probability in row.top],
        "content_hash": row.content_hash,
        "model_md5": row.model_md5,
        "error": row.error and row.error.encode(errors="backslashreplace").decode(),
    }


def csv_header(schema: pa.Schema, *, top: int) -> list[str]:
    """Return the columns of a CSV file: those of the schema, with `class_1, probability_1, …` in place of `top`."""
    ranked = [f"{name}_{rank}" for rank in range(1, top + 1) for name in ("class", "probability")]
    names: list[str] = schema.names
    position = names.index("top")
    return names[:position] + ranked + names[position + 1 :]


def csv_values(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a row of a part by column of the CSV file."""
    values = {name: value for name, value in row.items() if name != "top"}
    for rank, entry in enumerate(row["top"], start=1):
        values |= {f"{name}_{rank}": value for name, value in entry.items()}
    return values
