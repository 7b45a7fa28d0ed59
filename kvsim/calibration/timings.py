"""Measured timings in one shape, whatever tool took them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl

KEY_COLUMNS = ("device", "operation", "kernel", "version", "dtype", "kv_dtype")
"""What one fit covers. ``device`` is the name in hardware_specs; ``kernel`` is framework and kernel, such as
``vllm/flash_attn_fa3`` or ``kvsim/best``; ``dtype`` what it multiplies in; ``kv_dtype`` how K and V are stored (a
dtype or a format of kvsim's kernels), "" where the operation reads no KV."""

SHAPE_COLUMNS = {
    "decode_attention": ("batch", "context_tokens", "num_heads", "num_kv_heads", "head_dim", "window_tokens"),
    "prefill_attention": (
        "batch", "prompt_tokens", "context_tokens", "num_heads", "num_kv_heads", "head_dim", "window_tokens",
    ),
    "mla_decode": ("batch", "context_tokens", "num_heads"),
    "mla_prefill": ("batch", "prompt_tokens", "context_tokens", "num_heads"),
    "gemm": ("m", "n", "k"),
    "all_reduce": ("ranks", "message_bytes"),
    "kernel": ("read_bytes", "written_bytes", "flops", "units"),
}  # fmt: skip
"""Shape of a row by operation; ``kernel`` is any other kernel of kvsim, priced by what it moves. Context counts the
tokens that attention reads, the new one included; ``window_tokens`` 0 is none; ``message_bytes`` is one rank's."""

HELD_OUT_BY = {
    "decode_attention": ("num_heads", "num_kv_heads", "head_dim"),
    "prefill_attention": ("num_heads", "num_kv_heads", "head_dim"),
    "mla_decode": ("batch", "num_heads"),
    "mla_prefill": ("batch", "num_heads"),
    "gemm": ("n", "k"),
    "all_reduce": ("message_bytes",),
    "kernel": ("units",),
}
"""Columns that make a shape for holding out: all rows that agree in them are fitted or held out together, so that a
neighbour in batch or context does not give a held-out row away."""

ONE_SHAPE_HELD_OUT_BY = {
    "decode_attention": ("batch",),
    "prefill_attention": ("prompt_tokens",),
    "mla_decode": ("context_tokens",),
    "mla_prefill": ("prompt_tokens",),
    "gemm": ("m",),
    "all_reduce": ("message_bytes",),
    "kernel": ("units",),
}
"""The same where a table has one shape only, such as a profile of one model: whole sizes are held out instead."""


@dataclass(frozen=True)
class Excluded:
    """Rows left out, and why."""

    reason: str
    """Short and constant, such as ``above peak bandwidth``; reports count by it."""
    count: int
    example: str = ""


@dataclass(frozen=True)
class Origin:
    """Where rows came from: a file, its tool and its licence."""

    path: str
    """Relative to the folder that was read."""
    sha256: str
    origin: str
    licence: str


@dataclass(frozen=True)
class Timings:
    """Rows of one operation.

    ``frame`` has KEY_COLUMNS, the operation's SHAPE_COLUMNS (int64) and ``seconds`` (float64), nothing null, one row
    per distinct key and shape (repeats are reduced to their median).
    """

    operation: str
    frame: pl.DataFrame
    excluded: tuple[Excluded, ...] = ()
    origins: tuple[Origin, ...] = field(default=())
