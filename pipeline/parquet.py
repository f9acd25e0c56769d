"""Write Parquet files whose bytes depend only on their rows and on the version of pyarrow, and read them again."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts import NORMALIZE, atomic, missing_file_message
from pipeline.core.errors import UserError, first_line

# of `<split>_files.parquet`: a row for each image of the split, in the order of the arrays; `content_hash` is in
# hexadecimal (16 digits)
FILES_SCHEMA = pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("name", "content_hash")])


@contextmanager
def parquet_writer(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """Open a Parquet file for writing; each table that is written is a row group, and one is in memory at a time.

    The file appears at `path` when the block ends, as `atomic` states. It contains no time and no name of a program
    other than that of pyarrow.
    """
    with atomic(path) as file, pq.ParquetWriter(file, schema, compression="zstd", compression_level=3) as writer:
        yield writer


@contextmanager
def parquet_reader(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file for reading; raises UserError where it is missing or damaged, also within the block."""
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except FileNotFoundError:
        raise UserError(missing_file_message(path)) from None
    except (pa.ArrowException, KeyError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: damaged ({first_line(error)}); remove it and run `dvc repro` to make it again"
        ) from None


def files_path(split: str, *, folder: Path = NORMALIZE) -> Path:
    """Return the path of the file with the names and the content hashes of the images of a split."""
    return folder / f"{split}_files.parquet"


def write_files(path: Path, blocks: Iterable[tuple[Sequence[str], Sequence[int]]]) -> None:
    """Write names and content hashes (uint64) of images, given in blocks.

    Characters of a name that UTF-8 cannot represent, which stand for the bytes of an odd file name, become `?`.
    """
    with parquet_writer(path, FILES_SCHEMA) as writer:
        for names, hashes in blocks:
            texts = [name.encode(errors="replace").decode() for name in names]
            writer.write_table(pa.table([texts, [f"{each:016x}" for each in hashes]], schema=FILES_SCHEMA))


def read_files(split: str, *, folder: Path = NORMALIZE) -> tuple[list[str], list[str]]:
    """Return the names and the content hashes (16 hexadecimal digits) of the images of a split, in its order.

    Raises UserError where the file is missing or damaged.
    """
    with parquet_reader(files_path(split, folder=folder)) as file:
        table = file.read(columns=FILES_SCHEMA.names)
        return table["name"].to_pylist(), table["content_hash"].to_pylist()
