"""Result files: Parquet with a schema version in its footer, or CSV for spreadsheets, written whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from kvsim.batch.rows import file_metadata
from kvsim.documents import check_output_path, write_output

if TYPE_CHECKING:
    import polars as pl

RESULT_SUFFIXES = (".parquet", ".csv")


def write_results(frame: pl.DataFrame, path: Path) -> None:
    """Write rows as Parquet (ZSTD) or CSV, by the name's suffix."""
    check_output_path(path, RESULT_SUFFIXES)
    buffer = io.BytesIO()
    if path.suffix == ".csv":
        _without_formulas(frame).write_csv(buffer)
    else:
        frame.write_parquet(buffer, compression="zstd", metadata=file_metadata())
    write_output(path, buffer.getvalue())


def _without_formulas(frame: pl.DataFrame) -> pl.DataFrame:
    """Put an apostrophe before text that a spreadsheet would run as a formula."""
    import polars.selectors as cs

    return frame.with_columns(cs.string().str.replace(r"^([=+\-@\t\r])", "'${1}"))


def read_metadata(path: Path) -> dict[str, str]:
    """Footer of a result file."""
    import polars as pl

    return {key: value for key, value in pl.read_parquet_metadata(path).items() if key.startswith("kvsim.")}
