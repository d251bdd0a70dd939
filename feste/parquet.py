"""Parquet files as documents: each row of a column of strings is one. Read by pyarrow, which is an extra."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from feste.text import TextError

ROWS = 1024  # in a batch


def rows(path: Path, column: str) -> Iterator[list[str | None]]:
    """The texts of a file, a batch at a time, None for a row without one. TextError for a file that cannot be read."""
    try:
        from pyarrow import ArrowException, types
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise TextError(f"{path} is a Parquet file, which pyarrow reads; pip install 'feste[parquet]'") from None
    try:
        with ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise TextError(f"{path} has no column {column!r}, only {', '.join(file.schema_arrow.names) or 'none'}",
                                "json_field")
            kind = file.schema_arrow.field(column).type
            if not (types.is_string(kind) or types.is_large_string(kind)):
                raise TextError(f"the column {column!r} of {path} holds {kind}, not strings", "json_field")
            for batch in file.iter_batches(ROWS, columns=[column]):
                yield batch.column(0).to_pylist()
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise TextError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())}", "data") from None
