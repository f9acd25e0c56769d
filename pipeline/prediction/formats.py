"""Write rows as Parquet, CSV and JSON lines; parts of a file are Parquet."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts import atomic
from pipeline.parquet import parquet_writer
from pipeline.prediction.rows import Row

SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet")
INPUTS_KEY = b"inputs"  # in the metadata of a part: the digest of its inputs


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
        with pq.ParquetFile(path.absolute()) as file:  # pyarrow replaces a `~` at the beginning
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


def write_csv(path: Path, tables: Iterator[pa.Table], *, schema: pa.Schema, top: int) -> None:
    """Write the rows of parts as CSV in UTF-8, with `class_1, probability_1, …, class_<top>, probability_<top>`."""
    with atomic(path) as file:
        # the module quotes a value that has a character of the line terminator in it
        writer = csv.DictWriter(_Utf8Lines(file), _csv_header(schema, top=top), lineterminator="\r\n")
        writer.writeheader()
        for table in tables:
            writer.writerows(_csv_values(row) for row in table.to_pylist())


class _Utf8Lines:
    """A text file for the module `csv` that writes UTF-8 to a binary file, and ends rows with a line feed alone."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, text: str) -> int:
        return self._file.write((text.removesuffix("\r\n") + "\n").encode())


def _csv_header(schema: pa.Schema, *, top: int) -> list[str]:
    """Return the columns of a CSV file: those of the schema, with a pair for each rank in place of `top`."""
    ranked = [f"{name}_{rank}" for rank in range(1, top + 1) for name in ("class", "probability")]
    names: list[str] = schema.names
    position = names.index("top")
    return names[:position] + ranked + names[position + 1 :]


def _csv_values(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a row of a part by column of the CSV file."""
    values = {name: value for name, value in row.items() if name != "top"}
    for rank, entry in enumerate(row["top"], start=1):
        values |= {f"{name}_{rank}": value for name, value in entry.items()}
    return values


def write_json_lines(path: Path, tables: Iterator[pa.Table]) -> None:
    """Write the rows of parts as one JSON object a line, in UTF-8."""
    with atomic(path) as file:
        for table in tables:
            for row in table.to_pylist():
                file.write(f"{json.dumps(row, ensure_ascii=False)}\n".encode())


def write_parquet(path: Path, tables: Iterator[pa.Table], *, schema: pa.Schema, parts_per_group: int) -> None:
    """Write the rows of parts as Parquet, with this many parts in a row group, of which one is in memory at a time."""
    with parquet_writer(path, schema) as writer:
        while group := list(islice(tables, parts_per_group)):
            table = pa.concat_tables(group)
            writer.write_table(table, row_group_size=len(table))
