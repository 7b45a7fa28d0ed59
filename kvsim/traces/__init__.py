"""Readers of public request traces, one module per format."""

from __future__ import annotations

from pathlib import Path

from kvsim.errors import TraceError
from kvsim.specs.workload import TraceColumns, TraceFormat
from kvsim.traces.azure import read_azure
from kvsim.traces.burstgpt import read_burstgpt
from kvsim.traces.columns import read_columns
from kvsim.traces.mooncake import read_mooncake
from kvsim.traces.rows import TraceRows
from kvsim.traces.sharegpt import read_sharegpt
from kvsim.traces.vllm_bench import read_vllm_bench

_READERS = {
    "azure": read_azure,
    "mooncake": read_mooncake,
    "burstgpt": read_burstgpt,
    "vllm_bench": read_vllm_bench,
    "sharegpt": read_sharegpt,
}


def read_trace(trace_format: TraceFormat, path: Path, columns: TraceColumns | None = None) -> TraceRows:
    """Read a trace file; ``columns`` belongs to the format ``columns`` alone. Raise TraceError."""
    if trace_format == "columns":
        return read_columns(path, columns or TraceColumns())
    if columns is not None:
        msg = f"{path}: columns: only format 'columns' takes column names; {trace_format} has its own"
        raise TraceError(msg)
    return _READERS[trace_format](path)


__all__ = ["TraceRows", "read_trace"]
