"""Mooncake traces: JSON lines with 512-token prefix hashes (kvcache-ai/Mooncake FAST25-release, Apache-2.0)."""

from __future__ import annotations

from pathlib import Path

from kvsim.traces.files import json_lines, read_trace_bytes
from kvsim.traces.json_rows import JsonFields, read_json_rows
from kvsim.traces.rows import Origin, TraceRows, check_rows
from kvsim.units import MILLISECONDS_PER_SECOND

HASH_BLOCK_TOKENS = 512


def read_mooncake(path: Path) -> TraceRows:
    """Read ``{"timestamp" (ms), "input_length", "output_length", "hash_ids"}`` lines, plain or gzip. Raise TraceError.

    The last hash id of a request stands for its last, mostly partly filled, chunk of 512 tokens.
    """
    origin = Origin(path, "mooncake", "line", "input_length", "output_length", "timestamp")
    fields = JsonFields("input_length", "output_length", "timestamp", "hash_ids", HASH_BLOCK_TOKENS)
    lines = json_lines(read_trace_bytes(origin), origin)
    raw = read_json_rows(lines, fields, origin, times_per_second=MILLISECONDS_PER_SECOND)
    return check_rows(raw, origin, zero_output_is_failure=False)
