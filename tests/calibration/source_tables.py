"""Tables as the tools write them, made up: what the readers are tested on without any measurement."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from kvsim.calibration.sources import aiconfigurator
from kvsim.calibration.sources.kvsim_rows import COLUMNS
from kvsim.calibration.timings import Timings

H100 = "NVIDIA H100 80GB HBM3"
DECODE: dict[str, Any] = {
    "framework": "VLLM", "version": "0.24.0", "device": H100, "op_name": "generation_attention",
    "kernel_source": "vllm_flash_attn_fa3", "batch_size": 64, "isl": 1, "num_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "beam_width": 1, "attn_dtype": "bfloat16", "kv_cache_dtype": "fp8", "step": 4095,
    "window_size": 0, "latency": 0.21,
}  # fmt: skip
GEMM: dict[str, Any] = {
    "framework": "SGLang", "version": "0.5.14", "device": H100, "op_name": "gemm", "kernel_source": "sglang",
    "gemm_dtype": "bfloat16", "m": 16, "n": 4096, "k": 4096, "latency": 0.02,
}  # fmt: skip
NCCL: dict[str, Any] = {
    "framework": "TRTLLM", "version": "2.29.2", "device": H100, "op_name": "all_reduce", "kernel_source": "NCCL",
    "nccl_dtype": "half", "num_gpus": 8, "message_size": 1 << 20, "latency": 0.038,
}  # fmt: skip
CUSTOM: dict[str, Any] = {
    "framework": "vLLM", "version": "0.24.0", "device": H100, "op_name": "all_reduce",
    "kernel_source": "vLLM_custom_graph", "allreduce_dtype": "bfloat16", "num_gpus": 8, "message_size": 1 << 20,
    "latency": 0.019, "backend": "vllm_graph",
}  # fmt: skip


def layout(
    root: Path, table: str, rows: Sequence[Mapping[str, Any]], *, place: str = "h100_sxm/attention/vllm/0.24.0"
) -> Path:
    """Write one table of aiconfigurator's layout and give its path."""
    path = root / place / f"{table}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(list(rows)).write_parquet(path)
    return path


def measured_row(**more: Any) -> dict[str, Any]:
    """A row of kvsim's own rows.csv, of decode attention over fp8."""
    shape = {
        "dtype": "bfloat16", "num_query_heads": 32, "num_kv_heads": 8, "head_dim": 128, "block_size": 16,
        "context_lens": {"value": 4096, "count": 64}, "num_splits": None,
    }  # fmt: skip
    row = dict.fromkeys(COLUMNS, "") | {
        "device": "cuda", "basis": "measured", "gpu": H100, "source_sha256": "ab" * 32,
        "variant": "decode_attention/fp8_e4m3/best", "operation": "decode_attention", "kv_format": "fp8_e4m3",
        "form": "best", "case": "64x4096-32/8", "shape": shape, "config": "block_n=64", "method": "events",
        "part": "total", "read_bytes": 536870912, "written_bytes": 524288, "flops": 4294967296, "units": 2097152,
        "median_s": 2.1e-4,
    } | more  # fmt: skip
    return row | {"shape": row["shape"] if isinstance(row["shape"], str) else json.dumps(row["shape"])}


def write_rows(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows.csv and give its path."""
    path = folder / "rows.csv"
    folder.mkdir(parents=True, exist_ok=True)
    pl.DataFrame([{name: str(value) for name, value in row.items()} for row in rows]).write_csv(path)
    return path


def read_one(path: Path, **more: Any) -> Timings:
    """Read a place that gives one table."""
    (timings,) = aiconfigurator.read(path, **more)
    return timings


def only_row(timings: Timings) -> dict[str, Any]:
    """The one row of a table."""
    (row,) = timings.frame.rows(named=True)
    return row


def reasons(timings: Timings) -> dict[str, int]:
    """Rows left out, by reason."""
    return {one.reason: one.count for one in timings.excluded}
